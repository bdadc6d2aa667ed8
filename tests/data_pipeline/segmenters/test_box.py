"""The box as a mask."""

import numpy as np
import pytest

from data_pipeline.segmenters.box import BoxSegmenter

RGB = np.zeros((40, 60, 3), np.uint8)


def masks(*boxes):
    return [p.mask for p in BoxSegmenter().segment(RGB, np.array(boxes, float))]


def test_fills_each_box_in_order():
    first, second = masks((10, 5, 30, 20), (0, 0, 60, 40))
    assert first.dtype == bool
    assert first.shape == (40, 60)
    assert first.sum() == 20 * 15
    assert first[5:20, 10:30].all()
    assert second.all()


def test_pixels_belong_whose_centres_are_inside():
    (mask,) = masks((9.6, 5.4, 29.6, 20.4))
    assert mask[5:20, 10:30].all()
    assert mask.sum() == 20 * 15


@pytest.mark.parametrize("box", [(10.6, 5.6, 10.9, 5.9), (59.9, 39.9, 60, 40), (0, 0, 0.1, 0.1)])
def test_smallest_box_has_one_pixel(box):
    assert masks(box)[0].sum() == 1


def test_gives_no_estimate_of_its_own():
    (prediction,) = BoxSegmenter().segment(RGB, np.array([[1.0, 1, 9, 9]]))
    assert (prediction.iou, prediction.stability) == (None, None)
