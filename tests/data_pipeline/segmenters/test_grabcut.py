"""GrabCut: finds what differs from its surroundings, and falls back to the box."""

import cv2
import numpy as np
import pytest

from alpha_clip.regions import Box, decode_rle
from data_pipeline.runner import PipelineConfig, ShardTask, process_shard
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.segmenters.grabcut import GrabCutSegmenter
from data_pipeline.shards import read_shard
from data_pipeline.sources.grit import GritSource
from data_pipeline.truth import TrueMasks, mask_iou


def disc(height=120, width=160, centre=(80, 60), radius=30, noise=4.0):
    """A red disc on green, its mask and its box."""
    y, x = np.mgrid[:height, :width]
    mask = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2
    pixels = np.where(mask[..., None], (200, 40, 30), (40, 140, 60)).astype(float)
    pixels += np.random.default_rng(0).normal(0, noise, pixels.shape)
    ys, xs = np.nonzero(mask)
    box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], float)
    return np.clip(pixels, 0, 255).astype(np.uint8), mask, box


def cut(rgb, *boxes, **settings):
    predictions = GrabCutSegmenter(**settings).segment(rgb, np.array(boxes, float))
    return [p.mask for p in predictions]


@pytest.mark.parametrize("scale", [1, 4], ids=["small", "larger than max_side_px"])
def test_finds_an_object_on_a_plain_background(scale):
    centre = (80 * scale, 60 * scale)
    rgb, mask, box = disc(120 * scale, 160 * scale, centre, 30 * scale)
    (found,) = cut(rgb, box)
    assert found.dtype == bool
    assert mask_iou(found, mask) > 0.9
    (filled,) = cut(rgb, box, max_fill=0.0)  # the box itself is far from as good
    assert mask_iou(filled, mask) < 0.85


def test_finds_an_object_at_the_edge():
    rgb, mask, box = disc(centre=(10, 60))
    assert mask_iou(cut(rgb, box)[0], mask) > 0.9


def test_each_box_gets_its_own_object():
    left, left_mask, left_box = disc(centre=(40, 60))
    right, right_mask, right_box = disc(centre=(120, 60))
    rgb = np.where(right_mask[..., None], right, left)
    first, second = cut(rgb, left_box, right_box)
    assert mask_iou(first, left_mask) > 0.9
    assert mask_iou(second, right_mask) > 0.9


@pytest.mark.parametrize("level", [0, 127, 255])
def test_flat_picture_falls_back_to_the_box(level):
    (found,) = cut(np.full((60, 80, 3), level, np.uint8), (10, 20, 50, 45))
    assert found.sum() == 40 * 25
    assert found[20:45, 10:50].all()


@pytest.mark.parametrize(
    "box", [(0, 0, 160, 120), (50, 50, 52, 52), (30, 0, 31, 120), (159.9, 119.9, 160, 120)]
)
def test_where_there_is_nothing_to_learn_from_the_box_is_the_mask(box):
    rgb, _, _ = disc()
    (found,) = cut(rgb, box)
    x1, y1, x2, y2 = Box(*box).pixels(120, 160)
    assert found.sum() == (x2 - x1) * (y2 - y1)
    assert found[y1:y2, x1:x2].all()


@pytest.mark.parametrize("box", [(0, 0, 3000, 1), (0, 0, 1, 3000), (0, 2999, 3000, 3000)])
def test_very_thin_box_in_a_large_picture_is_filled(box):
    rgb = np.random.default_rng(0).integers(0, 255, (3000, 3000, 3), dtype=np.uint8)
    (found,) = cut(rgb, box)
    x1, y1, x2, y2 = box
    assert found.sum() == found[y1:y2, x1:x2].sum() > 0


def test_cut_below_min_fill_counts_as_failed():
    rgb, mask, _ = disc(radius=4)
    box = (40, 20, 120, 100)
    assert cut(rgb, box)[0].sum() == 80 * 80
    assert mask_iou(cut(rgb, box, min_fill=0.001)[0], mask) > 0.5


def test_masks_stay_inside_their_boxes_and_are_never_empty():
    rng = np.random.default_rng(3)
    rgb = cv2.GaussianBlur(rng.integers(0, 255, (90, 130, 3), dtype=np.uint8), (0, 0), 4)
    corners = np.sort(rng.uniform(0, 1, (25, 2, 2)), axis=1) * (130, 90)
    corners[:, 1] += 0.5  # no box without an area
    boxes = np.minimum(corners.reshape(-1, 4), (130, 90, 130, 90))
    for box, mask in zip(boxes, cut(rgb, *boxes), strict=True):
        x1, y1, x2, y2 = Box(*box).pixels(90, 130)
        assert mask.shape == (90, 130)
        assert mask.any()
        assert mask.sum() == mask[y1:y2, x1:x2].sum()


def test_same_picture_same_mask_whatever_came_before():
    rgb, _, box = disc(noise=40)
    (first,) = cut(rgb, box)
    cut(disc(radius=20, noise=60)[0], (50, 30, 110, 90))
    cv2.setRNGSeed(12345)
    (second,) = cut(rgb, box)
    np.testing.assert_array_equal(first, second)


def test_picture_is_left_as_it_is():
    rgb, _, box = disc()
    before = rgb.copy()
    rgb.setflags(write=False)
    cut(rgb, box)
    np.testing.assert_array_equal(rgb, before)


@pytest.mark.slow
def test_photographs_get_better_masks_than_their_boxes(photos, tmp_path):
    truth = TrueMasks.read(str(photos / "instances.json"))
    mean = {}
    for segmenter in (GrabCutSegmenter(), BoxSegmenter()):
        output, ious = tmp_path / type(segmenter).__name__, []
        for index, tar in enumerate(sorted((photos / "grit").glob("*.tar"))):
            task = ShardTask(str(tar), index)
            manifest = process_shard(task, output, PipelineConfig(GritSource(), segmenter))
            assert manifest.rejects == {}
            for sample in read_shard(output / manifest.tar):
                for region in sample.regions:
                    made, true = decode_rle(region.rle), truth.find(sample, region)
                    x1, y1, x2, y2 = Box(*region.box).pixels(sample.h, sample.w)
                    assert made.sum() == made[y1:y2, x1:x2].sum() > 0
                    ious.append(mask_iou(made, true))
        assert len(ious) == 216
        mean[type(segmenter)] = np.mean(ious)
    assert mean[GrabCutSegmenter] > mean[BoxSegmenter] + 0.02
