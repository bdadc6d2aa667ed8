"""Shards: exact bytes, honest manifests, and either whole or not there."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from alpha_clip.regions import RegionAnnotation, RegionSample, SampleError, encode_rle
from data_pipeline.shard_files import TarShardFile, read_shard
from data_pipeline.shards import ShardManifest, ShardWriter, read_manifests
from data_pipeline.sources.base import Reject


@pytest.fixture
def sample(grit):
    """Make a sound sample with some regions."""

    def make(key, regions=2):
        mask = np.zeros((60, 80), bool)
        mask[10:20, 10:30] = True
        annotations = tuple(
            RegionAnnotation(
                rid=rid,
                text="a red box",
                kind="ref_exp",
                span=(0, 9),
                box=(10.0, 10.0, 30.0, 20.0),
                rle=encode_rle(mask),
                area=200,
                score=0.5,
            )
            for rid in range(regions)
        )
        jpeg = grit.encode(grit.image())
        return RegionSample(key, jpeg, f"id-{key}", "test", 80, 60, grit.caption, annotations)

    return make


@pytest.fixture
def commit(sample, tmp_path):
    """Commit a shard of two samples and four rejects."""

    def make(folder=tmp_path / "out", index=3):
        writer = ShardWriter(folder, index)
        writer.write(sample("7"))
        writer.write(sample("8", regions=3))
        writer.reject(Reject("7", 5, "empty_mask", "nothing there"))
        writer.reject(Reject("7", 6, "low_score"))
        writer.reject(Reject("9", None, "corrupt_image", "cut", regions=4))
        writer.reject(Reject("10", None, "missing_json"))
        return writer.commit("c0ffee", "in/00003.tar")

    return make


def files(folder):
    found = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name != ".tmp/lock")


def test_files_of_a_shard(commit, tmp_path):
    manifest = commit()
    assert files(tmp_path / "out") == sorted(
        [manifest.tar, "00003.rejects.jsonl", "00003.done.json"]
    )
    assert manifest.tar == f"00003-{manifest.sha256[:8]}.tar"


def test_members_are_adjacent_ustar_without_a_date(commit, sample, tmp_path):
    path = tmp_path / "out" / commit().tar
    assert path.read_bytes()[257:265] == b"ustar\x0000"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == ["7.jpg", "7.json", "8.jpg", "8.json"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        assert {m.type for m in members} == {tarfile.REGTYPE}
        assert tar.extractfile("7.jpg").read() == sample("7").jpeg
        text = tar.extractfile("7.json").read().decode()
    assert text == json.dumps(
        json.loads(text), sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )


def test_manifest_tells_the_truth(commit, tmp_path):
    manifest = commit()
    data = (tmp_path / "out" / manifest.tar).read_bytes()
    assert json.loads((tmp_path / "out" / "00003.done.json").read_text()) == vars(manifest)
    assert manifest == ShardManifest(
        tar=manifest.tar,
        samples=2,
        regions=5,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        rejects={"corrupt_image": 1, "empty_mask": 1, "low_score": 1, "missing_json": 1},
        rejected_samples=2,
        rejected_regions=6,
        config_hash="c0ffee",
        input={"path": "in/00003.tar", "samples": 4, "regions": 11},
    )


def test_rejects_file_names_each_one(commit, tmp_path):
    manifest = commit()
    lines = (tmp_path / "out" / "00003.rejects.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert Counter(r["reason"] for r in records) == manifest.rejects
    assert records[0] == {
        "key": "7",
        "rid": 5,
        "reason": "empty_mask",
        "detail": "nothing there",
        "regions": 0,
    }


def test_two_runs_give_the_same_bytes(commit, tmp_path):
    a, b = commit(tmp_path / "a"), commit(tmp_path / "b")
    assert a == b
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_samples_come_back_as_they_were_written(commit, sample, tmp_path):
    assert list(read_shard(tmp_path / "out" / commit().tar)) == [
        sample("7"),
        sample("8", regions=3),
    ]


def test_unsound_sample_leaves_the_shard_as_it_was(sample, tmp_path):
    writer = ShardWriter(tmp_path, 0)
    writer.write(sample("1"))
    for wrong in (replace(sample("2"), w=81), replace(sample("2"), regions=()), sample("two")):
        with pytest.raises(SampleError):
            writer.write(wrong)
    writer.write(sample("3"))
    manifest = writer.commit("", "")
    assert (manifest.samples, manifest.regions) == (2, 4)
    assert [s.key for s in read_shard(tmp_path / manifest.tar)] == ["1", "3"]


def test_shard_of_nothing_but_rejects(tmp_path):
    writer = ShardWriter(tmp_path, 0)
    writer.reject(Reject("1", None, "missing_json"))
    manifest = writer.commit("", "")
    assert (manifest.samples, manifest.input["samples"]) == (0, 1)
    assert list(read_shard(tmp_path / manifest.tar)) == []


# --- commit: all or nothing --------------------------------------------------------------------


def test_manifest_is_linked_last(commit, tmp_path, monkeypatch):
    seen = []

    def link(source, target, real=os.link):
        seen.append(files(tmp_path / "out"))
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    manifest = commit()
    (before,) = seen
    before = [name for name in before if not name.startswith(".tmp")]
    assert before == sorted([manifest.tar, "00003.rejects.jsonl"])


def test_data_is_on_the_disk_before_it_gets_its_name(commit, tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace", "link"):

        def note(real, name, *arguments):
            events.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, partial(note, getattr(os, name), name))
    commit()
    assert events == ["fsync", "replace", "fsync", "replace", "fsync", "fsync", "link"]


def test_finished_manifest_is_never_overwritten(commit, sample, tmp_path):
    commit()
    before = (tmp_path / "out" / "00003.done.json").read_bytes()
    writer = ShardWriter(tmp_path / "out", 3)
    writer.write(sample("99"))
    writer.commit("other", "other.tar")
    assert (tmp_path / "out" / "00003.done.json").read_bytes() == before
    (manifest,) = read_manifests(tmp_path / "out").values()
    assert [s.key for s in read_shard(tmp_path / "out" / manifest.tar)] == ["7", "8"]
    assert [name for name in files(tmp_path / "out") if name.startswith(".tmp")] == []


def test_second_worker_with_the_same_bytes_changes_nothing(commit, tmp_path):
    first = commit()
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    assert commit() == first
    after = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    assert after == before


def lose_a_sample(path):
    return 1, 2


def find_damage(path):
    raise OSError(f"{path} is damaged")


@pytest.mark.parametrize("broken", [lose_a_sample, find_damage])
def test_nothing_is_visible_when_it_does_not_read_back(commit, tmp_path, monkeypatch, broken):
    monkeypatch.setattr(TarShardFile, "read_back", staticmethod(broken))
    with pytest.raises(OSError, match=r"does not read back|damaged"):
        commit()
    assert [name for name in files(tmp_path / "out") if not name.startswith(".tmp")] == []
    assert read_manifests(tmp_path / "out") == {}


@pytest.mark.parametrize("step", ["fsync", "replace", "link"])
def test_failing_disk_finishes_nothing_and_the_next_run_does(commit, tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, step, fail)
        with pytest.raises(OSError, match="No space left"):
            commit()
    assert read_manifests(tmp_path / "out") == {}
    manifest = commit()
    assert read_manifests(tmp_path / "out") == {"00003": manifest}


def test_abandoned_shard_leaves_no_file(sample, tmp_path):
    writer = ShardWriter(tmp_path, 0)
    writer.write(sample("1"))
    assert len(files(tmp_path)) == 1
    writer.abandon()
    assert files(tmp_path) == []


# --- reading -----------------------------------------------------------------------------------


def write_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def members(commit, tmp_path):
    with tarfile.open(tmp_path / "out" / commit().tar) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]


def test_read_shard_refuses_members_out_of_place(members, tmp_path):
    a, b, c, d = members
    for wrong in ([b, a], [a, c, b, d], [a], [a, b, c], [a, d], [("x.txt", b"1"), a, b]):
        with pytest.raises(OSError, match=r"KEY\.jpg and KEY\.json in turn"):
            list(read_shard(write_tar(tmp_path / "x.tar", wrong)))


def test_read_shard_refuses_samples_that_are_not_sound(members, tmp_path):
    (_, jpeg), (_, text) = members[:2]
    changed = text.replace(b'"w":80', b'"w":81')
    assert changed != text
    for wrong in ([("7.jpg", b"x"), ("7.json", text)], [("7.jpg", jpeg), ("7.json", changed)]):
        with pytest.raises(OSError, match="is damaged"):
            list(read_shard(write_tar(tmp_path / "x.tar", wrong)))


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100])
def test_read_shard_refuses_what_is_no_tar(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(OSError, match="is damaged"):
        list(read_shard(tmp_path / "x.tar"))


def test_read_shard_refuses_a_tar_that_ends_inside_a_member(commit, tmp_path):
    path = tmp_path / "out" / commit().tar
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(OSError, match="is damaged"):
        list(read_shard(path))


def test_manifests_by_number(commit, tmp_path):
    first, second = commit(index=0), commit(index=12)
    assert read_manifests(tmp_path / "out") == {"00000": first, "00012": second}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: text.replace('"tar"', '"rat"'),
        lambda text: text.replace("{", '{"extra": 1,', 1),
        lambda text: "\0" * 40,
    ],
    ids=["empty", "cut", "list", "null", "renamed", "extra", "zeros"],
)
def test_damaged_manifest_says_what_to_do(commit, tmp_path, damage):
    commit()
    file = tmp_path / "out" / "00003.done.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=r"00003\.done\.json is damaged .*; delete it to make"):
        read_manifests(tmp_path / "out")
