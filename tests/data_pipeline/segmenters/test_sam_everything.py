import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator
from test_sam import build_tiny_sam, picture

from alpha_clip.regions import SampleError
from data_pipeline.segmenters.sam_everything import SamEverything

LOOSE = {"points_per_side": 4, "min_iou": -10.0, "min_stability": 0.2, "max_box_iou": 1.0}


def make(**options):
    made = SamEverything("", device="cpu", **{**LOOSE, **options})
    made.use(build_tiny_sam())
    return made


@pytest.mark.parametrize(("height", "width"), [(50, 80), (200, 40)])
def test_masks_are_those_of_sams_own_generator(height, width):
    rgb = picture(1, height, width)
    theirs = SamAutomaticMaskGenerator(
        build_tiny_sam(),
        points_per_side=4,
        pred_iou_thresh=-10.0,
        stability_score_thresh=0.2,
        box_nms_thresh=1.0,
    )
    expected = theirs.generate(rgb)
    found = make().segment_everything(rgb)
    assert len(found) == len(expected) > 3
    for one, other in zip(found, expected, strict=True):
        assert one.mask.shape == (height, width)
        assert (one.mask != other["segmentation"]).mean() < 0.001  # sums in another order
        assert one.iou == pytest.approx(other["predicted_iou"], abs=1e-5)
        assert one.stability == pytest.approx(other["stability_score"], abs=1e-3)


def test_nothing_good_enough_is_no_mask():
    assert make(min_iou=10.0).segment_everything(picture(1)) == []


def test_finer_grids_find_more():
    few, many = (len(make(points_per_side=n).segment_everything(picture(2))) for n in (1, 5))
    assert few < many


def test_no_picture_gets_the_masks_of_another():
    segmenter = make()
    first = segmenter.segment_everything(picture(1))
    broken = segmenter._model.image_encoder.forward
    segmenter._model.image_encoder.forward = lambda _: torch.full((1, 32, 16, 16), torch.nan)
    with pytest.raises(SampleError, match="not finite"):
        segmenter.segment_everything(picture(2))
    segmenter._model.image_encoder.forward = broken
    again = segmenter.segment_everything(picture(1))
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(first, again, strict=True))


def test_settings_tell_the_grid(tmp_path):
    file = tmp_path / "sam.pth"
    torch.save({}, file)
    settings = [SamEverything(str(file), points_per_side=n).settings() for n in (16, 32)]
    assert [s["points_per_side"] for s in settings] == [16, 32]
