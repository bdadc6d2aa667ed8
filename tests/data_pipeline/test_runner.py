"""The step from input shard to output shard, and the plan of what is left to do."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from alpha_clip.regions import decode_rle
from data_pipeline import shards
from data_pipeline.runner import PipelineConfig, RunSummary, ShardTask, plan, process_shard
from data_pipeline.segmenters.base import MaskPrediction, Segmenter
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.segmenters.grabcut import GrabCutSegmenter
from data_pipeline.segmenters.sam import SamSegmenter
from data_pipeline.shards import read_manifests, read_shard
from data_pipeline.sources.base import BadShardError
from data_pipeline.sources.grit import GritSource

BOXES = PipelineConfig(GritSource(), BoxSegmenter())


@dataclass(frozen=True)
class EmptyFirst(Segmenter):
    """Finds nothing in the first box, everything in the others, and says how sure it is."""

    def segment(self, rgb, boxes_xyxy_px):
        masks = [np.full(rgb.shape[:2], i > 0) for i in range(len(boxes_xyxy_px))]
        return [MaskPrediction(mask, iou=0.75, stability=0.5) for mask in masks]


@dataclass(frozen=True)
class Breaks(Segmenter):
    """Fails as a device fails."""

    def segment(self, rgb, boxes_xyxy_px):
        raise RuntimeError("device lost")


@dataclass(frozen=True)
class TooFew(Segmenter):
    """Gives a mask less than there are boxes."""

    def segment(self, rgb, boxes_xyxy_px):
        return [MaskPrediction(np.ones(rgb.shape[:2], bool)) for _ in boxes_xyxy_px[1:]]


@pytest.fixture
def inputs(grit, tmp_path):
    """Three tars of two samples."""
    return [
        grit.tar(tmp_path / f"{i}.tar", grit.sample(f"{i}1"), grit.sample(f"{i}2"))
        for i in range(3)
    ]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_regions_carry_phrase_box_mask_and_estimates(inputs, tmp_path):
    config = PipelineConfig(GritSource(), EmptyFirst())
    manifest = process_shard(ShardTask(inputs[0], 0), tmp_path / "out", config)
    first, _ = read_shard(tmp_path / "out" / manifest.tar)
    (region,) = first.regions
    assert (first.key, first.source, first.w, first.h) == ("01", "grit", 80, 60)
    assert (region.rid, region.text, region.kind) == (1, "a blue thing", "ref_exp")
    assert region.span == (13, 25)
    assert region.box == (44, 6, 76, 54)
    assert region.score == pytest.approx(0.7)
    assert (region.sam_iou, region.stability) == (0.75, 0.5)
    assert decode_rle(region.rle).all()
    assert region.area == 80 * 60


def test_empty_masks_are_counted(inputs, tmp_path):
    config = PipelineConfig(GritSource(), EmptyFirst())
    manifest = process_shard(ShardTask(inputs[0], 0), tmp_path / "out", config)
    assert manifest.rejects == {"empty_mask": 2}
    assert (manifest.samples, manifest.regions, manifest.rejected_regions) == (2, 2, 2)


def test_reencoded_pictures_are_flagged(grit, tmp_path):
    png = grit.sample("1", grit.encode(grit.image(), "PNG"), "png")
    path = grit.tar(tmp_path / "in.tar", png, grit.sample("2"))
    manifest = process_shard(ShardTask(path, 0), tmp_path / "out", BOXES)
    first, second = read_shard(tmp_path / "out" / manifest.tar)
    assert (first.reencoded, second.reencoded) == (True, False)


def test_manifest_knows_its_input_and_config(inputs, tmp_path):
    manifest = process_shard(ShardTask(inputs[1], 7), tmp_path / "out", BOXES)
    assert manifest.tar.startswith("00007-")
    assert manifest.config_hash == BOXES.hash
    assert manifest.input == {"path": str(inputs[1]), "samples": 2, "regions": 4}
    assert read_manifests(tmp_path / "out") == {"00007": manifest}


@pytest.mark.parametrize("segmenter", [BoxSegmenter(), GrabCutSegmenter()])
def test_two_runs_give_the_same_bytes(inputs, tmp_path, segmenter):
    config = PipelineConfig(GritSource(phrases="both"), segmenter)
    made = [process_shard(ShardTask(inputs[0], 0), tmp_path / out, config) for out in "ab"]
    assert made[0] == made[1]
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(("segmenter", "error"), [(Breaks(), RuntimeError), (TooFew(), ValueError)])
def test_systemic_error_commits_nothing_and_cleans_up(inputs, tmp_path, segmenter, error):
    with pytest.raises(error):
        process_shard(
            ShardTask(inputs[0], 0), tmp_path / "out", PipelineConfig(GritSource(), segmenter)
        )
    assert files(tmp_path / "out") == []


def test_failed_commit_leaves_nothing(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "read_shard", lambda path: iter(()))
    with pytest.raises(OSError, match="does not read back"):
        process_shard(ShardTask(inputs[0], 0), tmp_path / "out", BOXES)
    assert files(tmp_path / "out") == []


def test_bad_input_commits_nothing(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    with pytest.raises(BadShardError):
        process_shard(ShardTask(tmp_path / "bad.tar", 0), tmp_path / "out", BOXES)
    assert files(tmp_path / "out") == []


# --- what decides the output -------------------------------------------------------------------


def test_hash_depends_on_every_setting_and_on_nothing_else():
    configs = [
        BOXES,
        PipelineConfig(GritSource(phrases="both"), BoxSegmenter()),
        PipelineConfig(GritSource(min_score=0.5), BoxSegmenter()),
        PipelineConfig(GritSource(max_image_px=10_000), BoxSegmenter()),
        PipelineConfig(GritSource(), GrabCutSegmenter()),
        PipelineConfig(GritSource(), GrabCutSegmenter(iterations=2)),
        PipelineConfig(GritSource(), SamSegmenter("a.pth")),
        PipelineConfig(GritSource(), SamSegmenter("b.pth")),
    ]
    assert len({config.hash for config in configs}) == len(configs)
    assert PipelineConfig(GritSource(), BoxSegmenter()).hash == BOXES.hash


def test_hash_does_not_change_when_weights_are_loaded():
    sam = SamSegmenter("a.pth")
    config = PipelineConfig(GritSource(), sam)
    before = config.hash
    sam._predictor = object()
    assert config.hash == before


# --- resuming ----------------------------------------------------------------------------------


def test_plan_of_a_new_folder_is_everything_in_order(inputs, tmp_path):
    assert plan(inputs, tmp_path / "out", BOXES) == [
        ShardTask(path, index) for index, path in enumerate(inputs)
    ]


def test_plan_leaves_out_what_is_done(inputs, tmp_path):
    process_shard(ShardTask(inputs[1], 1), tmp_path, BOXES)
    assert plan(inputs, tmp_path, BOXES) == [ShardTask(inputs[0], 0), ShardTask(inputs[2], 2)]


def test_shard_without_its_manifest_is_made_again(inputs, tmp_path):
    manifest = process_shard(ShardTask(inputs[0], 0), tmp_path, BOXES)
    (tmp_path / "00000.done.json").unlink()
    assert plan(inputs[:1], tmp_path, BOXES) == [ShardTask(inputs[0], 0)]
    assert process_shard(ShardTask(inputs[0], 0), tmp_path, BOXES) == manifest


def test_more_inputs_at_the_end_are_welcome(inputs, tmp_path):
    process_shard(ShardTask(inputs[0], 0), tmp_path, BOXES)
    assert [task.index for task in plan(inputs, tmp_path, BOXES)] == [1, 2]


def test_changed_settings_are_refused(inputs, tmp_path):
    process_shard(ShardTask(inputs[0], 0), tmp_path, BOXES)
    changed = replace(BOXES, source=GritSource(min_score=0.5))
    with pytest.raises(ValueError, match=r"other settings .*; write to another folder, or delete"):
        plan(inputs, tmp_path, changed)


def test_changed_list_of_inputs_is_refused(inputs, tmp_path):
    process_shard(ShardTask(inputs[1], 1), tmp_path, BOXES)
    with pytest.raises(ValueError, match=r"made shard 00001 of .*1\.tar, now it would be .*2\.tar"):
        plan([inputs[0], inputs[2]], tmp_path, BOXES)


def test_shorter_list_of_inputs_is_refused(inputs, tmp_path):
    process_shard(ShardTask(inputs[1], 1), tmp_path, BOXES)
    with pytest.raises(ValueError, match="00001"):
        plan(inputs[:1], tmp_path, BOXES)


def test_damaged_manifest_is_refused_before_any_work(inputs, tmp_path):
    process_shard(ShardTask(inputs[0], 0), tmp_path, BOXES)
    (tmp_path / "00000.done.json").write_text('{"tar": "x"')
    with pytest.raises(ValueError, match=r"is damaged .*; delete it to make the shard again"):
        plan(inputs, tmp_path, BOXES)


def test_summary_adds_up_and_reads_well(inputs, tmp_path):
    summary = RunSummary()
    config = PipelineConfig(GritSource(), EmptyFirst())
    for index, path in enumerate(inputs[:2]):
        summary.add(process_shard(ShardTask(path, index), tmp_path, config))
    summary.bad_shards["b.tar"] = "no tar"
    assert (summary.shards, summary.samples, summary.regions) == (2, 4, 4)
    assert str(summary).splitlines() == [
        "2 shards: 4 samples, 4 regions",
        "  skipped        4 empty_mask",
        "  skipped the whole of b.tar: no tar",
    ]
