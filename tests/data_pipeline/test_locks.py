"""Leftovers of the dead are told from the files of the living."""

import os
import subprocess
import sys
import time

import pytest

from data_pipeline.locks import clear_leftovers, exclusive, hold


@pytest.fixture
def leftover(tmp_path):
    path = tmp_path / ".tmp" / "00000-abc.tar"
    path.parent.mkdir()
    path.write_bytes(b"half a shard")
    os.utime(path, (time.time() - 3600,) * 2)
    return path


def test_what_nobody_writes_is_deleted(leftover, tmp_path):
    assert clear_leftovers(tmp_path) == 1
    assert not leftover.exists()
    assert clear_leftovers(tmp_path) == 0


def test_what_somebody_writes_stays_however_old(leftover, tmp_path):
    with leftover.open("ab") as file:
        assert hold(file)
        os.utime(leftover, (time.time() - 3600,) * 2)
        assert clear_leftovers(tmp_path) == 0
    assert clear_leftovers(tmp_path) == 1


def test_what_is_young_stays(leftover, tmp_path):
    os.utime(leftover)
    assert clear_leftovers(tmp_path) == 0
    assert leftover.exists()


def test_only_temporary_files_of_shards_are_looked_at(leftover, tmp_path):
    kept = [tmp_path / "00000-abc.tar", tmp_path / ".tmp" / "lock"]
    for path in kept:
        path.touch()
        os.utime(path, (0, 0))
    clear_leftovers(tmp_path)
    assert all(path.exists() for path in kept)
    assert clear_leftovers(tmp_path / "nowhere") == 0


def test_one_process_at_a_time_goes_through(tmp_path):
    """Two processes add to a number, with a pause between reading and writing it."""
    number = tmp_path / "number"
    number.write_text("0")
    code = f"""
import time
from pathlib import Path
from data_pipeline.locks import exclusive
number = Path({str(number)!r})
for _ in range(20):
    with exclusive(Path({str(tmp_path / "lock")!r})):
        found = int(number.read_text())
        time.sleep(0.005)
        number.write_text(str(found + 1))
"""
    workers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert number.read_text() == "40"
    with exclusive(tmp_path / "lock"):
        pass
