"""True masks: read from both kinds of file, and found by image and box."""

import json
from dataclasses import replace

import numpy as np
import pytest

from alpha_clip.regions import RegionAnnotation, RegionSample, encode_rle, region_to_alpha
from data_pipeline.runner import PipelineConfig, ShardTask, process_shard
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.shards import read_shard
from data_pipeline.sources.grit import GritSource
from data_pipeline.truth import TrueMask, TrueMasks, box_iou, mask_iou

REGION = RegionAnnotation(
    rid=0,
    text="thing",
    kind="class",
    span=None,
    box=(10.0, 20.0, 30.0, 40.0),
    rle={"size": [60, 80], "counts": ""},
    area=1,
)
SAMPLE = RegionSample("12", b"", "12", "test", 80, 60, "", (REGION,))


def block(x1, y1, x2, y2):
    mask = np.zeros((60, 80), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def coco(tmp_path, *annotations, name="instances.json"):
    records = [
        {"image_id": image, "bbox": bbox, "segmentation": mask} for image, bbox, mask in annotations
    ]
    (tmp_path / name).write_text(json.dumps({"annotations": records}))
    return str(tmp_path / name)


POLYGON = [[10, 20, 30, 20, 30, 40, 10, 40]]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (0, 0, 5, 5), 0.25),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
        ((0, 0, 10, 10), (20, 20, 30, 30), 0.0),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0.0),
    ],
)
def test_box_iou(a, b, expected):
    assert box_iou(a, b) == pytest.approx(expected)
    assert box_iou(b, a) == pytest.approx(expected)


def test_mask_iou():
    a, b, none = block(0, 0, 10, 10), block(5, 0, 15, 10), block(0, 0, 0, 0)
    assert mask_iou(a, a) == 1.0
    assert mask_iou(a, b) == pytest.approx(1 / 3)
    assert mask_iou(a, none) == 0.0
    assert mask_iou(none, none) == 1.0


def test_reads_coco_polygons_and_rle(tmp_path):
    rle = encode_rle(block(50, 0, 60, 10))
    truth = TrueMasks.read(
        coco(tmp_path, (12, [10, 20, 20, 20], POLYGON), (12, [50, 0, 10, 10], rle))
    )
    np.testing.assert_array_equal(truth.find(SAMPLE, REGION), block(10, 20, 30, 40))
    other = replace(REGION, box=(50.0, 0.0, 60.0, 10.0))
    np.testing.assert_array_equal(truth.find(SAMPLE, other), block(50, 0, 60, 10))


def test_reads_the_scenes_masks(tmp_path):
    masks = [
        {
            "text": "a",
            "box": [0.125, 1 / 3, 0.375, 2 / 3],
            "rle": encode_rle(block(10, 20, 30, 40)),
        },
        {"text": "b", "box": [0.5, 0.0, 1.0, 0.5], "rle": encode_rle(block(40, 0, 80, 30))},
    ]
    lines = [{"key": "000000012", "masks": masks}, {"key": "000000013", "masks": []}]
    path = tmp_path / "00000.masks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    truth = TrueMasks.read(str(path))
    assert set(truth.by_image) == {"12", "13"}
    np.testing.assert_array_equal(truth.find(SAMPLE, REGION), block(10, 20, 30, 40))
    assert truth.find(replace(SAMPLE, id="13"), REGION) is None


def test_reads_every_file_that_matches(tmp_path):
    coco(tmp_path, (1, [0, 0, 5, 5], POLYGON), name="a.json")
    coco(tmp_path, (2, [0, 0, 5, 5], POLYGON), name="b.json")
    assert set(TrueMasks.read(str(tmp_path / "*.json")).by_image) == {"1", "2"}


@pytest.mark.parametrize(
    ("box", "found"),
    [
        ((10.0, 20.0, 30.0, 40.0), True),
        ((10.0, 20.0, 30.0, 39.0), True),  # 0.95
        ((10.0, 20.0, 30.0, 37.0), False),  # 0.85
        ((11.0, 21.0, 31.0, 41.0), False),
        ((50.0, 0.0, 60.0, 10.0), False),
    ],
)
def test_box_must_be_the_same_within_a_tenth(tmp_path, box, found):
    truth = TrueMasks.read(coco(tmp_path, (12, [10, 20, 20, 20], POLYGON)))
    assert (truth.find(SAMPLE, replace(REGION, box=box)) is not None) == found


def test_closest_box_wins():
    near = TrueMask((10, 20, 30, 39), encode_rle(block(10, 20, 30, 39)))
    same = TrueMask((10, 20, 30, 40), encode_rle(block(10, 20, 30, 40)))
    for masks in ([near, same], [same, near]):
        found = TrueMasks({"12": masks}).find(SAMPLE, REGION)
        assert found.sum() == 400


def test_image_without_true_masks_has_none(tmp_path):
    truth = TrueMasks.read(coco(tmp_path, (99, [10, 20, 20, 20], POLYGON)))
    assert truth.find(SAMPLE, REGION) is None
    assert TrueMasks({}).find(SAMPLE, REGION) is None


def test_mask_of_another_size_is_an_error():
    truth = TrueMasks({"12": [TrueMask((10, 20, 30, 40), encode_rle(np.ones((50, 80), bool)))]})
    with pytest.raises(ValueError, match="as large as the image"):
        truth.find(SAMPLE, REGION)


def test_pattern_without_a_match_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"no file matches .*; give a COCO JSON"):
        TrueMasks.read(str(tmp_path / "*.json"))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize(
    "text", ["no json", "[1]", "{}", "3", '{"annotations": [{}]}', '{"key": "a", "masks": []}']
)
def test_files_of_something_else_are_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is neither COCO instances nor true masks"):
        TrueMasks.read(str(tmp_path / name))


def test_photographs_phrases_find_exactly_their_annotations(photos, tmp_path):
    ids = json.loads((photos / "phrase_annotation_ids.json").read_text())
    annotations = json.loads((photos / "instances.json").read_text())["annotations"]
    by_id = {a["id"]: a for a in annotations}
    truth = TrueMasks.read(str(photos / "instances.json"))
    compared = 0
    for index, tar in enumerate(sorted((photos / "grit").glob("*.tar"))):
        config = PipelineConfig(GritSource(), BoxSegmenter())
        manifest = process_shard(ShardTask(str(tar), index), tmp_path, config)
        for sample in read_shard(tmp_path / manifest.tar):
            for region in sample.regions:
                annotation = by_id[ids[sample.key][region.rid]]
                x, y, width, height = annotation["bbox"]
                assert str(annotation["image_id"]) == sample.id
                assert region.box == pytest.approx((x, y, x + width, y + height), abs=0.5)
                expected = region_to_alpha(annotation["segmentation"], sample.h, sample.w) > 0
                np.testing.assert_array_equal(truth.find(sample, region), expected)
                compared += 1
    assert compared == sum(map(len, ids.values())) == 216
