"""The local engine: the same bytes however many work, and no shard lost with a worker."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline.engines.local import LocalEngine
from data_pipeline.planning import plan
from data_pipeline.runner import PipelineConfig, ShardTask
from data_pipeline.segmenters.base import Segmenter
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.shards import ShardManifest, read_manifests
from data_pipeline.sources.base import StorageError
from data_pipeline.sources.grit import GritSource

BOXES = PipelineConfig(GritSource(), BoxSegmenter())


@dataclass(frozen=True)
class Mortal(Segmenter):
    """Fills boxes; dies as if killed, in pictures this wide, as often as the file has bytes."""

    marker: str
    width: int = 80

    def segment(self, rgb, boxes_xyxy_px):
        lives = Path(self.marker).read_bytes() if rgb.shape[1] == self.width else b""
        if lives:
            Path(self.marker).write_bytes(lives[1:])
            os._exit(9)
        return BoxSegmenter().segment(rgb, boxes_xyxy_px)


@dataclass(frozen=True)
class Breaks(Segmenter):
    """Fails as a device fails."""

    def segment(self, rgb, boxes_xyxy_px):
        raise RuntimeError("CUDA error: device lost")


@dataclass
class Notes(Segmenter):
    """Fills boxes; leaves a note when it loads its weights, as SAM does at its first picture."""

    folder: str
    _worker: int | None = None
    _loaded: bool = False

    def place(self, worker):
        self._worker = worker

    def segment(self, rgb, boxes_xyxy_px):
        if not self._loaded:
            assert not Path(self.folder, f"{self._worker}-{os.getpid()}").exists()
            Path(self.folder, f"{self._worker}-{os.getpid()}").touch()
            self._loaded = True
        return BoxSegmenter().segment(rgb, boxes_xyxy_px)


@dataclass(frozen=True)
class SlowOrBroken(Segmenter):
    """Works for a minute on wide pictures; fails soon on others, as a device fails."""

    def segment(self, rgb, boxes_xyxy_px):
        time.sleep(60 if rgb.shape[1] == 90 else 3)
        raise RuntimeError("CUDA error: device lost")


@dataclass(frozen=True)
class Flaky(GritSource):
    """Reads GRIT from a storage that fails, as often as the file has bytes."""

    marker: str = ""

    def read(self, shard):
        if failures := Path(self.marker).read_bytes():
            Path(self.marker).write_bytes(failures[1:])
            raise StorageError("connection reset")
        yield from super().read(shard)


@pytest.fixture
def inputs(grit, tmp_path):
    """Three tars, the second of which is none."""
    paths = [
        grit.tar(tmp_path / f"{i}.tar", grit.sample(f"{i}1"), grit.sample(f"{i}2"))
        for i in range(3)
    ]
    paths[1].write_bytes(b"no tar")
    return [str(path) for path in paths]


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "marker"
    path.touch()
    return path


def run(inputs, output, config=BOXES, workers=1, engine=None):
    tasks = plan(inputs, output, config)
    return list((engine or LocalEngine(pause_s=0)).run(tasks, output, config, workers))


def contents(folder):
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name != ".tmp/lock"}


def test_one_and_two_workers_give_the_same_bytes_and_outcomes(inputs, tmp_path):
    outcomes = {}
    for workers in (1, 2):
        found = run(inputs, tmp_path / str(workers), workers=workers)
        outcomes[workers] = {o.task.index: (o.manifest, o.bad_input, o.failure) for o in found}
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert outcomes[1] == outcomes[2]
    assert set(outcomes[1]) == {0, 1, 2}
    assert isinstance(outcomes[1][0][0], ShardManifest)
    assert "1.tar is no readable tar" in outcomes[1][1][1]
    assert set(read_manifests(tmp_path / "1")) == {"00000", "00002"}


def test_second_run_does_only_what_is_missing(inputs, tmp_path):
    out = tmp_path / "out"
    run(inputs, out)
    before = contents(out)
    (out / "00002.done.json").unlink()
    kept = (out / "00000.done.json").stat().st_ino
    assert [outcome.task.index for outcome in run(inputs, out)] == [1, 2]
    assert contents(out) == before
    assert (out / "00000.done.json").stat().st_ino == kept


def test_shard_of_a_killed_worker_is_done_again(inputs, tmp_path, marker):
    marker.write_bytes(b"!!")
    config = PipelineConfig(GritSource(), Mortal(str(marker)))
    outcomes = run(inputs, tmp_path / "out", config, workers=2)
    assert marker.read_bytes() == b""
    assert {o.task.index for o in outcomes if o.manifest} == {0, 2}
    assert all(outcome.failure is None for outcome in outcomes)
    run(inputs, tmp_path / "alone", config)
    made, alone = contents(tmp_path / "out"), contents(tmp_path / "alone")
    # What the dead left in .tmp/ is cleared by a later run, when it is surely nobody's.
    assert {n: d for n, d in made.items() if not n.startswith(".tmp")} == alone


def test_shard_that_kills_every_worker_is_given_up_and_the_others_are_made(
    grit, inputs, tmp_path, marker
):
    marker.write_bytes(b"!" * 100)
    deadly = grit.sample("11", grit.encode(grit.image(width=90)))
    grit.tar(Path(inputs[1]), deadly)
    config = PipelineConfig(GritSource(), Mortal(str(marker), width=90))
    engine = LocalEngine(attempts=2, pause_s=0)
    outcomes = {o.task.index: o for o in run(inputs, tmp_path / "out", config, 2, engine)}
    assert outcomes[1].failure == "its worker process was killed (out of memory?), 2 times"
    assert len(marker.read_bytes()) == 98
    assert set(read_manifests(tmp_path / "out")) == {"00000", "00002"}
    marker.write_bytes(b"")
    (again,) = run(inputs, tmp_path / "out", config, workers=2)
    assert again.manifest is not None


@pytest.mark.parametrize("workers", [1, 2])
def test_failing_storage_is_tried_again(inputs, tmp_path, marker, workers):
    marker.write_bytes(b"!!")
    config = PipelineConfig(Flaky(marker=str(marker)), BoxSegmenter())
    outcomes = run(inputs, tmp_path / "out", config, workers)
    assert {o.task.index for o in outcomes if o.manifest} == {0, 2}


def test_storage_that_keeps_failing_is_reported(inputs, tmp_path, marker):
    marker.write_bytes(b"!" * 100)
    config = PipelineConfig(Flaky(marker=str(marker)), BoxSegmenter())
    (outcome,) = run(inputs[:1], tmp_path / "out", config)
    assert outcome.failure == "connection reset, 3 times"
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_missing_weights_stop_the_run_before_any_work(inputs, tmp_path, workers):
    from data_pipeline.segmenters.sam import SamSegmenter  # not above: workers import this file

    tasks = [ShardTask(path, index) for index, path in enumerate(inputs)]
    config = PipelineConfig(GritSource(), SamSegmenter("nowhere.pth"))
    with pytest.raises(ValueError, match="does not exist"):
        list(LocalEngine().run(tasks, tmp_path / "out", config, workers))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_systemic_error_stops_the_run_and_commits_nothing(inputs, tmp_path, workers):
    with pytest.raises(RuntimeError, match="device lost"):
        run(inputs, tmp_path / "out", PipelineConfig(GritSource(), Breaks()), workers)
    assert not any(name.endswith("json") for name in contents(tmp_path / "out"))


def test_systemic_error_ends_the_other_workers_at_once(grit, tmp_path):
    """One worker would go on for a minute; the run ends as soon as the other one fails."""
    wide = str(grit.tar(tmp_path / "0.tar", grit.sample("1", grit.encode(grit.image(width=90)))))
    plain = str(grit.tar(tmp_path / "1.tar", grit.sample("2")))
    config = PipelineConfig(GritSource(), SlowOrBroken())
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="device lost"):
        run([wide, plain], tmp_path / "out", config, 2, LocalEngine(pause_s=30))
    assert time.monotonic() - start < 25
    assert [name for name in contents(tmp_path / "out") if name.startswith(".tmp")] == []


def test_no_worker_outlives_a_run_that_was_killed(inputs, tmp_path):
    """The worker waits in the segmenter; its parent is killed; the worker must go, too."""
    code = f"""
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from data_pipeline.engines.local import LocalEngine
from data_pipeline.runner import PipelineConfig, ShardTask
from data_pipeline.segmenters.base import Segmenter
from data_pipeline.sources.grit import GritSource

@dataclass(frozen=True)
class Waits(Segmenter):
    def segment(self, rgb, boxes_xyxy_px):
        Path({str(tmp_path)!r}, f"pid-{{os.getpid()}}").touch()
        time.sleep(60)

if __name__ == "__main__":
    tasks = [ShardTask(path, i) for i, path in enumerate({inputs[::2]!r})]
    config = PipelineConfig(GritSource(), Waits())
    list(LocalEngine().run(tasks, Path({str(tmp_path / "out")!r}), config, 2))
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)])
    try:
        workers = wait_for(lambda: [*tmp_path.glob("pid-*")][1:] and [*tmp_path.glob("pid-*")])
    finally:
        parent.kill()
        parent.wait()
    pids = [int(path.name.removeprefix("pid-")) for path in workers]
    assert wait_for(lambda: not any(alive(pid) for pid in pids))


def alive(pid):
    """Whether a process runs; one that ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=25.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def test_workers_load_once_and_know_their_numbers(grit, tmp_path):
    paths = [str(grit.tar(tmp_path / f"{i}.tar", grit.sample(str(i)))) for i in range(6)]
    notes = tmp_path / "notes"
    notes.mkdir()
    config = PipelineConfig(GritSource(), Notes(str(notes)))
    outcomes = run(paths, tmp_path / "out", config, workers=2)
    assert sum(outcome.manifest is not None for outcome in outcomes) == 6
    loaded = [note.name for note in notes.iterdir()]
    assert 1 <= len(loaded) <= 2  # the first one may do it all
    assert {name.split("-")[0] for name in loaded} <= {"0", "1"}


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_counts_every_sample_once(inputs, tmp_path, workers):
    told = []
    tasks = plan(inputs, tmp_path / "out", BOXES)
    list(LocalEngine().run(tasks, tmp_path / "out", BOXES, workers, told.append))
    assert sum(told) == 4  # the second of the three inputs is no tar


def test_nothing_to_do_is_nothing_done(tmp_path):
    assert run([], tmp_path / "out", workers=2) == []
    assert not (tmp_path / "out").exists()


def test_attempts_are_checked():
    with pytest.raises(ValueError, match="expected attempts >= 1 and pause_s >= 0, got 0"):
        LocalEngine(attempts=0)
