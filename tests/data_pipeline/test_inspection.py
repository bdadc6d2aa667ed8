"""Inspecting shards: the numbers, the contact sheet, and IoU with true masks."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from alpha_clip.regions import encode_rle
from data_pipeline.inspection import inspect_shards
from data_pipeline.runner import PipelineConfig, ShardTask, process_shard
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.shards import ShardWriter, read_manifests, read_shard
from data_pipeline.sources.base import Reject
from data_pipeline.sources.grit import GritSource

# Boxes that fall on whole pixels of 80 x 60: 32 x 36 and 32 x 48.
AREAS = (32 * 36, 32 * 48)


@pytest.fixture
def dataset(grit, tmp_path):
    """Two shards of two samples of two regions; one phrase was rejected."""
    for index in range(2):
        bad = grit.sample(f"{index}2", ref_exps=[*grit.ref_exps, [0, 9, 0.5, 0.5, 0.1, 0.1, 1.0]])
        path = grit.tar(tmp_path / f"{index}.tar", grit.sample(f"{index}1"), bad)
        config = PipelineConfig(GritSource(), BoxSegmenter())
        process_shard(ShardTask(path, index), tmp_path / "shards", config)
    return tmp_path / "shards"


def truth_file(path, images, share=1.0):
    """True masks: the first phrase's box of each image, filled from the left to a share."""
    mask = np.zeros((60, 80), bool)
    mask[12:48, 8 : 8 + round(32 * share)] = True
    box = [0.1, 0.2, 0.5, 0.8]
    lines = [
        {"key": key, "masks": [{"text": "x", "box": box, "rle": encode_rle(mask)}]}
        for key in images
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_numbers(dataset, tmp_path):
    found = inspect_shards(dataset, tmp_path / "report")
    assert (found.shards, found.samples, found.regions) == (2, 4, 8)
    assert found.rejects == {"bad_box": 2}
    assert found.phrases == 2
    assert found.mean_area == pytest.approx(sum(AREAS) / 2 / (80 * 60))
    assert (found.true_masks, found.mean_iou, found.iou_above_half) == (0, None, None)
    assert json.loads((tmp_path / "report" / "inspection.json").read_text()) == asdict(found)


def test_iou_with_true_masks(grit, dataset, tmp_path):
    truth_file(tmp_path / "a.jsonl", ["01", "02"], share=0.75)
    truth_file(tmp_path / "b.jsonl", ["11"], share=0.25)
    found = inspect_shards(dataset, tmp_path / "report", masks=str(tmp_path / "*.jsonl"))
    # Samples without an id of their own are named by their key, as a scene is by its number.
    assert found.true_masks == 1
    assert found.mean_iou == pytest.approx(0.25)
    assert found.iou_above_half == 0.0


def test_iou_of_several(grit, tmp_path):
    samples = [grit.sample(key, id=int(key)) for key in ("1", "2", "3")]
    path = grit.tar(tmp_path / "in.tar", *samples)
    config = PipelineConfig(GritSource(), BoxSegmenter())
    process_shard(ShardTask(path, 0), tmp_path / "shards", config)
    truth_file(tmp_path / "a.jsonl", ["1"])
    truth_file(tmp_path / "b.jsonl", ["2"], share=0.25)
    found = inspect_shards(
        tmp_path / "shards", tmp_path / "report", masks=str(tmp_path / "*.jsonl")
    )
    assert found.true_masks == 2
    assert found.mean_iou == pytest.approx((1 + 0.25) / 2)
    assert found.iou_above_half == 0.5


@pytest.mark.parametrize(("tiles", "columns", "rows"), [(48, 8, 1), (3, 3, 1), (1, 1, 1)])
def test_contact_sheet_has_as_many_tiles_as_asked(dataset, tmp_path, tiles, columns, rows):
    inspect_shards(dataset, tmp_path / "report", tiles=tiles)
    sheet = Image.open(tmp_path / "report" / "contact_sheet.png")
    assert sheet.size == (8 + columns * 188, 8 + rows * 222)
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 10


def test_shards_without_a_region_have_numbers_and_no_sheet(tmp_path):
    writer = ShardWriter(tmp_path / "shards", 0)
    writer.reject(Reject("1", None, "missing_json"))
    writer.commit("", "")
    found = inspect_shards(tmp_path / "shards", tmp_path / "report")
    assert (found.samples, found.mean_area, found.rejects) == (0, 0.0, {"missing_json": 1})
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["inspection.json"]


def test_unfinished_shards_do_not_count(dataset, tmp_path):
    (dataset / "00001.done.json").unlink()
    assert inspect_shards(dataset, tmp_path / "report").samples == 2


@pytest.mark.parametrize("folder", ["shards", "nowhere"])
def test_folder_without_finished_shards_is_an_error(tmp_path, folder):
    (tmp_path / "shards").mkdir()
    with pytest.raises(ValueError, match="holds no finished shards"):
        inspect_shards(tmp_path / folder, tmp_path / "report")


def test_true_masks_that_are_none_are_an_error(dataset, tmp_path):
    with pytest.raises(ValueError, match="no file matches"):
        inspect_shards(dataset, tmp_path / "report", masks=str(tmp_path / "*.jsonl"))


@pytest.mark.parametrize("where", ["inside a member", "between two samples", "at the end"])
def test_truncated_shard_is_an_error(grit, dataset, tmp_path, where):
    path = dataset / read_manifests(dataset)["00001"].tar
    second = grit.offsets(path)["12.jpg"][0]
    size = {"inside a member": 700, "between two samples": second, "at the end": -512}[where]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(OSError, match="is damaged"):
        inspect_shards(dataset, tmp_path / "report")


def test_missing_tar_is_an_error(dataset, tmp_path):
    (dataset / read_manifests(dataset)["00001"].tar).unlink()
    with pytest.raises(OSError, match="No such file"):
        inspect_shards(dataset, tmp_path / "report")


def test_shards_are_left_as_they_are(dataset, tmp_path):
    before = [list(read_shard(dataset / m.tar)) for m in read_manifests(dataset).values()]
    names = sorted(p.name for p in dataset.iterdir())
    inspect_shards(dataset, tmp_path / "report")
    assert sorted(p.name for p in dataset.iterdir()) == names
    assert [list(read_shard(dataset / m.tar)) for m in read_manifests(dataset).values()] == before
