"""SAM 2's masks of everything: those of transformers' own pipeline, where that is right."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from test_sam2 import CONFIG, build_processor, picture, stir
from transformers import Sam2Config, Sam2Model, pipeline

from alpha_clip.regions import SampleError
from data_pipeline.segmenters import sam2_everything
from data_pipeline.segmenters.promptable import stability_score
from data_pipeline.segmenters.sam2_everything import Sam2Everything

LOOSE = {"points_per_side": 4, "min_iou": 0.0, "min_stability": 0.05, "max_box_iou": 1.0}


@pytest.fixture(scope="module")
def model():
    """A SAM 2 whose masks are spots here and there, so that their boxes differ."""
    torch.manual_seed(0)
    built = stir(Sam2Model(Sam2Config(**CONFIG)))
    built.mask_decoder.register_forward_hook(lambda _, given, out: (out[0] - 8, *out[1:]))
    return built


@pytest.fixture
def make(model):
    def build(**options):
        made = Sam2Everything("", device="cpu", **{**LOOSE, **options})
        made.use(model, build_processor())
        return made

    return build


def assert_same(ones, others):
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert (one.mask != other.mask).mean() < 0.001  # sums in another order
        assert one.iou == pytest.approx(other.iou, abs=1e-5)
        assert one.stability == pytest.approx(other.stability, abs=1e-3)


@pytest.mark.parametrize(
    ("min_iou", "min_stability", "max_box_iou", "expected"),
    [
        (0.0, 0.05, 1.0, 47),  # three for each of 16 points, one of them without a pixel
        (0.5, 0.05, 1.0, 14),
        (0.0, 0.3, 1.0, 33),
        (0.0, 0.05, 0.95, 8),
        (0.0, 0.05, 0.7, 4),
    ],
)
@pytest.mark.parametrize("points_per_batch", [5, 64])
def test_masks_are_those_of_transformers_own_pipeline(
    model, make, min_iou, min_stability, max_box_iou, expected, points_per_batch
):
    rgb = picture(1, 96, 96)
    theirs = pipeline(
        "mask-generation",
        model=model,
        image_processor=build_processor().image_processor,
        device="cpu",
    )(
        Image.fromarray(rgb),
        points_per_crop=4,
        points_per_batch=points_per_batch,
        pred_iou_thresh=min_iou,
        stability_score_thresh=min_stability,
        crops_nms_thresh=max_box_iou,
    )
    found = make(
        min_iou=min_iou,
        min_stability=min_stability,
        max_box_iou=max_box_iou,
        points_per_batch=points_per_batch,
    ).segment_everything(rgb)
    assert len(found) == len(theirs["masks"])
    assert abs(len(found) - expected) < 3
    for one, mask, iou in zip(found, theirs["masks"], theirs["scores"], strict=True):
        assert one.mask.shape == (96, 96)
        assert (one.mask != np.asarray(mask)).mean() < 0.001  # sums in another order
        assert one.iou == pytest.approx(iou.item(), abs=1e-5)


@pytest.mark.parametrize(("height", "width"), [(50, 80), (200, 40), (3, 90)])
def test_pictures_of_every_shape_get_points_all_over(model, make, height, width):
    """Each mask is that of the stock model at a point of the grid, in pixels of the picture."""
    rgb = picture(1, height, width)
    processor = build_processor()
    inputs = processor(
        images=rgb,
        input_points=[[[[x * width, y * height]] for y in (0.25, 0.75) for x in (0.25, 0.75)]],
        input_data_format="channels_last",
        return_tensors="pt",
    )
    with torch.no_grad():
        out = model(**inputs)
    (logits,) = processor.post_process_masks(
        out.pred_masks, inputs["original_sizes"], binarize=False
    )
    logits, ious = logits.flatten(0, 1), out.iou_scores.flatten()
    order = [i for i in ious.argsort(descending=True).tolist() if (logits[i] > 0).any()]
    found = make(points_per_side=2, min_stability=-1).segment_everything(rgb)
    assert len(found) == len(order) > 6
    for one, index in zip(found, order, strict=True):
        assert one.mask.dtype == bool
        assert type(one.iou) is type(one.stability) is float
        assert (one.mask != (logits[index] > 0).numpy()).mean() < 0.001
        assert one.iou == pytest.approx(ious[index].item(), abs=1e-5)
        assert one.stability == pytest.approx(stability_score(logits[index]).item(), abs=1e-3)


def test_masks_depend_on_their_points(make):
    found = make().segment_everything(picture(1))
    shares = [one.mask.mean() for one in found]
    assert max(shares) > 0.3 > 0.1 > min(shares)  # or these tests could not fail
    assert len({one.mask.tobytes() for one in found}) == len(found) > 20


def test_nothing_good_enough_is_no_mask(make):
    assert make(min_iou=1.0).segment_everything(picture(1)) == []
    assert make(min_stability=1.1).segment_everything(picture(1)) == []


def test_masks_without_a_pixel_are_left_out(make, monkeypatch):
    segmenter = make(min_stability=-1)
    decode = segmenter._decode_points

    def darken(*given):
        logits, ious = decode(*given)
        return logits - 1000 * (torch.arange(len(logits)) % 2)[:, None, None], ious

    monkeypatch.setattr(segmenter, "_decode_points", darken)
    found = segmenter.segment_everything(picture(1))
    assert 12 < len(found) <= 24
    assert all(one.mask.any() for one in found)


def test_large_pictures_take_masks_a_few_at_a_time(make, monkeypatch):
    rgb = picture(2)
    expected = make().segment_everything(rgb)
    seen = []
    upscale = Sam2Everything.upscale
    monkeypatch.setattr(
        Sam2Everything,
        "upscale",
        lambda self, logits, size: seen.append(len(logits)) or upscale(self, logits, size),
    )
    monkeypatch.setattr(sam2_everything, "_UPSCALED_PX", 5 * 50 * 80)
    assert_same(make().segment_everything(rgb), expected)
    assert seen == [5] * 9 + [3]


def test_the_picture_is_embedded_once(make, monkeypatch):
    segmenter = make(points_per_batch=3)
    embed, seen = segmenter.encode, []
    monkeypatch.setattr(
        segmenter, "encode", lambda images: seen.append(len(images)) or embed(images)
    )
    segmenter.segment_everything(picture(1))
    assert seen == [1]


def test_no_picture_gets_the_masks_of_another(make, monkeypatch):
    segmenter = make()
    first = segmenter.segment_everything(picture(1))
    with monkeypatch.context() as patch:
        patch.setattr(segmenter, "encode", lambda _: (torch.full((1, 32, 8, 8), torch.nan),))
        with pytest.raises(SampleError, match="not finite") as caught:
            segmenter.segment_everything(picture(2))
    assert caught.value.reason == "segmenter_not_finite"
    assert_same(segmenter.segment_everything(picture(1)), first)


def test_numbers_that_are_not_finite_are_no_masks(model, make, monkeypatch):
    weight = model.mask_decoder.iou_prediction_head.proj_out.bias
    with torch.no_grad():
        before = weight.clone()
        weight.fill_(torch.nan)
    try:
        with pytest.raises(SampleError, match="not finite") as caught:
            make().segment_everything(picture(1))
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert caught.value.reason == "segmenter_not_finite"


def test_failures_of_the_model_cost_a_picture(make, monkeypatch):
    segmenter = make()
    monkeypatch.setattr(segmenter, "encode", lambda _: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(SampleError) as caught:
        segmenter.segment_everything(picture(1))
    assert caught.value.reason == "segmenter_failed"


def test_checkpoints_load_and_boxes_work_as_before(model, make, tmp_path):
    model.save_pretrained(tmp_path)
    build_processor().save_pretrained(tmp_path)
    loaded = Sam2Everything(str(tmp_path), device="cpu", **LOOSE)
    given = make()
    given.use(Sam2Model.from_pretrained(tmp_path), build_processor())
    assert_same(loaded.segment_everything(picture(1)), given.segment_everything(picture(1)))
    assert len(loaded.segment(picture(1), np.array([[5.0, 5, 40, 30]]))) == 1


def test_settings_tell_the_grid_and_can_be_sent(tmp_path):
    settings = [Sam2Everything("x", points_per_side=n).settings() for n in (16, 32)]
    assert [s["points_per_side"] for s in settings] == [16, 32]
    assert {"points_per_batch", "min_iou", "min_stability", "max_box_iou"} < settings[0].keys()
    made = Sam2Everything("x", device="cpu", points_per_side=16)
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize("name", ["points_per_side", "points_per_batch", "images_per_batch"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        Sam2Everything("x", **{name: 0})
