"""The step from input shard to output shard, and the plan of what is left to do."""

import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest

from alpha_clip.regions import decode_rle
from data_pipeline import runner
from data_pipeline.filters import Filters
from data_pipeline.planning import RunSummary, plan
from data_pipeline.runner import PipelineConfig, ShardTask, process_shard
from data_pipeline.segmenters.base import MaskPrediction, Segmenter
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.segmenters.grabcut import GrabCutSegmenter
from data_pipeline.segmenters.sam import SamSegmenter
from data_pipeline.shard_files import TarShardFile, read_shard
from data_pipeline.shards import read_manifests
from data_pipeline.sources.base import BadShardError
from data_pipeline.sources.grit import GritSource
from data_pipeline.sources.grit_parquet import GritParquetSource
from data_pipeline.verification import verify_shards

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
        raise RuntimeError("CUDA error: device lost")


@dataclass(frozen=True)
class TooFew(Segmenter):
    """Gives a mask less than there are boxes."""

    def segment(self, rgb, boxes_xyxy_px):
        return [MaskPrediction(np.ones(rgb.shape[:2], bool)) for _ in boxes_xyxy_px[1:]]


@pytest.fixture
def inputs(grit, tmp_path):
    """Three tars of two samples."""
    return [
        str(grit.tar(tmp_path / f"{i}.tar", grit.sample(f"{i}1"), grit.sample(f"{i}2")))
        for i in range(3)
    ]


def files(folder):
    found = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name != ".tmp/lock")


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
    path = str(grit.tar(tmp_path / "in.tar", png, grit.sample("2")))
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
    monkeypatch.setattr(TarShardFile, "read_back", staticmethod(lambda path: (0, 0)))
    with pytest.raises(OSError, match="does not read back"):
        process_shard(ShardTask(inputs[0], 0), tmp_path / "out", BOXES)
    assert files(tmp_path / "out") == []


def test_bad_input_commits_nothing(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    with pytest.raises(BadShardError):
        process_shard(ShardTask(str(tmp_path / "bad.tar"), 0), tmp_path / "out", BOXES)
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
    sam._model = object()
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


# --- batches: one bad picture does not touch the others ----------------------------------------


@dataclass(frozen=True)
class Batches(BoxSegmenter):
    """Fills boxes, in batches; fails on pictures of given widths."""

    size: int = 3
    bad: tuple[int, ...] = ()

    def batch_size(self):
        return self.size

    def segment(self, rgb, boxes_xyxy_px):
        if rgb.shape[1] in self.bad:
            raise ValueError("cannot encode this")
        return super().segment(rgb, boxes_xyxy_px)


@pytest.fixture
def many(grit, tmp_path):
    """Ten samples of their own sizes, among them one that is no picture and one without a box."""
    samples = [grit.sample(str(i), grit.encode(grit.image(width=80 + i))) for i in range(8)]
    samples[2:2] = [grit.sample("8", b"no picture"), grit.sample("9", ref_exps=[])]
    return str(grit.tar(tmp_path / "many.tar", *samples))


def made(task, output, segmenter, **more):
    manifest = process_shard(task, output, PipelineConfig(GritSource(), segmenter, **more))
    return manifest, list(read_shard(output / manifest.tar))


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_batches_give_what_one_by_one_gives(many, tmp_path, size):
    _, expected = made(ShardTask(many, 0), tmp_path / "alone", BoxSegmenter())
    manifest, samples = made(ShardTask(many, 0), tmp_path / "out", Batches(size))
    assert samples == expected
    assert [s.key for s in samples] == list("01234567")
    assert manifest.rejects == {"corrupt_image": 1, "no_phrases": 1}
    rejects = (tmp_path / "out" / "00000.rejects.jsonl").read_bytes()
    assert rejects == (tmp_path / "alone" / "00000.rejects.jsonl").read_bytes()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("bad", [(81, 86), (80, 81), (86, 87)])
def test_a_picture_that_fails_gets_nobody_elses_masks(many, tmp_path, size, bad):
    _, expected = made(ShardTask(many, 0), tmp_path / "alone", BoxSegmenter())
    manifest, samples = made(ShardTask(many, 0), tmp_path / "out", Batches(size, bad=bad))
    assert samples == [s for s in expected if s.w not in bad]
    assert manifest.rejects["segmenter_failed"] == 2
    assert (manifest.rejected_samples, manifest.input["samples"]) == (4, 10)
    assert (manifest.regions, manifest.rejected_regions) == (12, 6)


def test_a_segmenter_that_never_works_stops_the_run(many, tmp_path):
    with pytest.raises(RuntimeError, match=r"failed on every picture: .*cannot encode this"):
        made(ShardTask(many, 0), tmp_path / "out", Batches(1, bad=tuple(range(80, 90))))
    assert files(tmp_path / "out") == []


def test_a_segmenter_that_never_works_is_given_up_early(grit, tmp_path, monkeypatch):
    asked = []

    class Never(BoxSegmenter):
        def segment(self, rgb, boxes_xyxy_px):
            asked.append(1)
            raise ValueError("no")

    monkeypatch.setattr(runner, "_HOPELESS", 5)
    path = str(grit.tar(tmp_path / "in.tar", *(grit.sample(str(i)) for i in range(30))))
    with pytest.raises(RuntimeError, match="failed on every picture"):
        made(ShardTask(path, 0), tmp_path / "out", Never())
    assert len(asked) == 5


def test_phrases_with_one_box_share_its_mask(grit, tmp_path):
    asked = []

    class Counts(BoxSegmenter):
        def segment(self, rgb, boxes_xyxy_px):
            asked.append(len(boxes_xyxy_px))
            return super().segment(rgb, boxes_xyxy_px)

    path = str(grit.tar(tmp_path / "in.tar", grit.sample("1")))
    config = PipelineConfig(GritSource(phrases="both"), Counts())
    manifest = process_shard(ShardTask(path, 0), tmp_path / "out", config)
    (sample,) = read_shard(tmp_path / "out" / manifest.tar)
    assert asked == [2]
    assert [r.text for r in sample.regions] == ["a red box", "a blue thing", "red box"]
    assert sample.regions[0].rle == sample.regions[2].rle != sample.regions[1].rle


# --- filters -----------------------------------------------------------------------------------

# Of ten samples, eight come to the filters, with two phrases each.
FILTERS = {
    "image_too_small": (Filters(min_side_px=61), 8),
    "image_aspect": (Filters(max_aspect_ratio=1.4), 3),
    "near_duplicate_image": (Filters(near_duplicate_bits=4), 7),
    "phrase_too_short": (Filters(min_words=4), 16),
    "phrase_too_long": (Filters(max_characters=9), 8),
    "blocked_phrase": (Filters(blocked_words=["blue"]), 8),
    "mask_too_large": (Filters(max_mask_share=0.28), 8),
    "mask_too_small": (Filters(min_mask_share=0.28), 8),
}


@pytest.mark.parametrize("reason", FILTERS)
def test_what_filters_refuse_is_counted(many, tmp_path, reason):
    filters, expected = FILTERS[reason]
    manifest, kept = made(ShardTask(many, 0), tmp_path / "out", BoxSegmenter(), filters=filters)
    assert manifest.rejects[reason] == expected
    assert (manifest.input["samples"], manifest.input["regions"]) == (10, 18)
    assert manifest.regions + manifest.rejected_regions == 18
    assert manifest.samples == len(kept) == 10 - manifest.rejected_samples


def test_a_duplicate_region_goes_and_the_better_one_stays(grit, tmp_path):
    twice = [[0, 9, 0.1, 0.2, 0.5, 0.8, 0.5], [0, 9, 0.1, 0.2, 0.51, 0.8, 0.9]]
    path = str(grit.tar(tmp_path / "in.tar", grit.sample("1", ref_exps=twice)))
    filters = Filters(duplicate_mask_iou=0.9)
    manifest, (sample,) = made(
        ShardTask(path, 0), tmp_path / "out", BoxSegmenter(), filters=filters
    )
    assert manifest.rejects == {"duplicate_region": 1}
    assert [r.rid for r in sample.regions] == [1]


# --- when too much is lost ---------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "total", "limit"), [(95, 101, 0.9), (60, 110, 0.5)])
def test_a_shard_of_almost_nothing_but_rejects_is_not_committed(grit, tmp_path, bad, total, limit):
    samples = [grit.sample(str(i), b"no picture" if i < bad else None) for i in range(total)]
    path = str(grit.tar(tmp_path / "in.tar", *samples))
    config = PipelineConfig(GritSource(), BoxSegmenter(), max_reject_rate=limit)
    match = f"{bad} of {total} samples were rejected .*'corrupt_image': {bad}.*max_reject_rate"
    with pytest.raises(RuntimeError, match=match):
        process_shard(ShardTask(path, 0), tmp_path / "out", config)
    assert files(tmp_path / "out") == []
    higher = replace(config, max_reject_rate=1.0)
    assert higher.hash == config.hash
    assert process_shard(ShardTask(path, 0), tmp_path / "out", higher).samples == total - bad


def test_a_small_shard_says_nothing_about_a_rate(grit, tmp_path):
    samples = [grit.sample(str(i), b"no picture") for i in range(99)]
    path = str(grit.tar(tmp_path / "in.tar", *samples))
    assert process_shard(ShardTask(path, 0), tmp_path / "out", BOXES).rejected_samples == 99


# --- sidecars ----------------------------------------------------------------------------------


def test_sidecar_and_tar_count_alike(many, tmp_path):
    counts = []
    for layout in ("tar", "sidecar"):
        config = PipelineConfig(GritSource(), BoxSegmenter(), layout=layout)
        manifest = process_shard(ShardTask(many, 0), tmp_path / layout, config)
        counts.append((manifest.samples, manifest.regions, manifest.rejects, manifest.input))
        assert next(manifest.read(tmp_path / layout)).key == "0"
    assert counts[0] == counts[1]
    assert manifest.sidecar == "00000.regions.jsonl"
    assert manifest.tar == many
    names = ["00000.done.json", "00000.regions.jsonl", "00000.rejects.jsonl"]
    assert files(tmp_path / "sidecar") == names


def test_sidecar_needs_a_source_of_tars(tmp_path):
    config = PipelineConfig(GritParquetSource(), BoxSegmenter(), layout="sidecar")
    with pytest.raises(ValueError, match="GritParquetSource reads none; take layout: tar"):
        plan(["a.parquet"], tmp_path, config)


# --- a full disk -------------------------------------------------------------------------------


def test_full_disk_leaves_finished_shards_and_resumes(grit, inputs, tmp_path):
    """The system itself refuses to write on: no file may grow beyond a few kB."""
    big = [grit.sample(str(i), grit.encode(grit.image(300, 400), quality=100)) for i in range(40)]
    paths = [inputs[0], str(grit.tar(tmp_path / "big.tar", *big))]
    command = ["grit", "--input", paths[0], "--input+", paths[1], "--workers", "1"]
    command += ["--output", str(tmp_path / "out")]
    command += ["--segmenter", "data_pipeline.segmenters.box.BoxSegmenter"]
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from data_pipeline.__main__ import main
sys.exit(main({command!r}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert "File too large" in run.stderr
    first = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    assert set(read_manifests(tmp_path / "out")) == {"00000"}
    assert not any(name.startswith(".tmp") for name in first)
    for task in plan(paths, tmp_path / "out", BOXES):
        process_shard(task, tmp_path / "out", BOXES)
    assert set(read_manifests(tmp_path / "out")) == {"00000", "00001"}
    assert {name: (tmp_path / "out" / name).read_bytes() for name in first} == first
    assert verify_shards(tmp_path / "out").problems == []
