"""The local engine: the same bytes however many work, and no waiting on workers that died."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline.engines.local import run_local
from data_pipeline.runner import PipelineConfig, ShardTask, plan
from data_pipeline.segmenters.base import Segmenter
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.shards import ShardManifest, read_manifests
from data_pipeline.sources.grit import GritSource

BOXES = PipelineConfig(GritSource(), BoxSegmenter())


@dataclass(frozen=True)
class Mortal(Segmenter):
    """Fills boxes; its process dies at once, as if killed, while the marker file is there."""

    marker: str

    def segment(self, rgb, boxes_xyxy_px):
        if Path(self.marker).exists():
            os._exit(9)
        return BoxSegmenter().segment(rgb, boxes_xyxy_px)


@dataclass(frozen=True)
class Breaks(Segmenter):
    """Fails as a device fails."""

    def segment(self, rgb, boxes_xyxy_px):
        raise RuntimeError("device lost")


@pytest.fixture
def inputs(grit, tmp_path):
    """Three tars, the second of which is none."""
    paths = [
        grit.tar(tmp_path / f"{i}.tar", grit.sample(f"{i}1"), grit.sample(f"{i}2"))
        for i in range(3)
    ]
    paths[1].write_bytes(b"no tar")
    return paths


def run(inputs, output, config=BOXES, workers=1):
    return list(run_local(plan(inputs, output, config), output, config, workers))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_one_and_two_workers_give_the_same_bytes_and_outcomes(inputs, tmp_path):
    outcomes = {}
    for workers in (1, 2):
        found = run(inputs, tmp_path / str(workers), workers=workers)
        outcomes[workers] = {task.index: outcome for task, outcome in found}
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert outcomes[1] == outcomes[2]
    assert set(outcomes[1]) == {0, 1, 2}
    assert isinstance(outcomes[1][0], ShardManifest)
    assert "1.tar is no readable tar" in outcomes[1][1]
    assert set(read_manifests(tmp_path / "1")) == {"00000", "00002"}


def test_second_run_does_only_what_is_missing(inputs, tmp_path):
    out = tmp_path / "out"
    run(inputs, out)
    before = contents(out)
    (out / "00002.done.json").unlink()
    kept = (out / "00000.done.json").stat().st_ino
    assert [task.index for task, _ in run(inputs, out)] == [1, 2]
    assert contents(out) == before
    assert (out / "00000.done.json").stat().st_ino == kept


def test_killed_worker_stops_the_run_and_finished_shards_stay(inputs, tmp_path):
    marker, out = tmp_path / "marker", tmp_path / "out"
    config = PipelineConfig(GritSource(), Mortal(str(marker)))
    list(run_local([ShardTask(inputs[0], 0)], out, config, 1))
    finished = contents(out)
    marker.touch()
    with pytest.raises(RuntimeError, match=r"a worker process was killed.*run the same command"):
        run([inputs[0], inputs[2], inputs[2]], out, config, workers=2)
    still = contents(out)
    assert {name: still[name] for name in finished} == finished
    assert set(read_manifests(out)) == {"00000"}
    marker.unlink()
    assert [t.index for t, _ in run([inputs[0], inputs[2]], out, config)] == [1]
    assert set(read_manifests(out)) == {"00000", "00001"}


@pytest.mark.parametrize("workers", [1, 2])
def test_missing_weights_stop_the_run_before_any_work(inputs, tmp_path, workers):
    from data_pipeline.segmenters.sam import SamSegmenter  # not above: workers import this file

    config = PipelineConfig(GritSource(), SamSegmenter("nowhere.pth"))
    with pytest.raises(ValueError, match="does not exist"):
        run(inputs, tmp_path / "out", config, workers)
    assert not (tmp_path / "out").exists()


def test_systemic_error_stops_the_run_and_commits_nothing(inputs, tmp_path):
    with pytest.raises(RuntimeError, match="device lost"):
        run(inputs, tmp_path / "out", PipelineConfig(GritSource(), Breaks()))
    assert contents(tmp_path / "out") == {}


def test_nothing_to_do_is_nothing_done(tmp_path):
    assert list(run_local([], tmp_path / "out", BOXES, 2)) == []
    assert not (tmp_path / "out").exists()
