import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import _build_vision_tower
from PIL import Image

from alpha_clip.attention_masking import attending_to
from alpha_clip.dense import dense_features, pool_boxes, pool_masks
from alpha_clip.evaluation.focus_baselines import ATTENTION_MASK, FOCUS, ways_for
from alpha_clip.model import AlphaClip
from alpha_clip.regions import Box
from alpha_clip.transforms import OPENAI_MEAN

CLASS_TOKEN = ["attention mask", "mask pooling", "RoIAlign"]  # not for every tower
H, W = 60, 80
BOX = Box(20.2, 10.4, 50.4, 40.3)
X1, Y1, X2, Y2 = BOX.pixels(H, W)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (H, W, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    """A disc inside the box."""
    y, x = np.mgrid[:H, :W]
    return (x - 35) ** 2 + (y - 25) ** 2 < 12**2


def test_all_ways_are_there() -> None:
    ways = ["no alpha", "alpha", "box alpha", "crop", "masked crop", "masked background"]
    ways += ["alpha blur", "alpha gray", "red circle", "red box", "red contour", "blur", "gray"]
    assert list(FOCUS) == [*ways, *CLASS_TOKEN]


@pytest.mark.parametrize("name", FOCUS)
def test_the_image_itself_is_not_changed(name: str, pixels: np.ndarray, mask: np.ndarray) -> None:
    image, before = Image.fromarray(pixels.copy()), mask.copy()
    FOCUS[name].show(image, mask, BOX)
    np.testing.assert_array_equal(np.asarray(image), pixels)
    np.testing.assert_array_equal(mask, before)


def test_alpha_ways_change_the_region_alone(pixels: np.ndarray, mask: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    for name, expected in (("no alpha", None), ("alpha", mask), ("box alpha", BOX)):
        shown, region = FOCUS[name].show(image, mask, BOX)
        assert shown is image
        assert region is expected


def test_crop_is_the_box(pixels: np.ndarray, mask: np.ndarray) -> None:
    shown, region = FOCUS["crop"].show(Image.fromarray(pixels), mask, BOX)
    assert region is None
    np.testing.assert_array_equal(np.asarray(shown), pixels[Y1:Y2, X1:X2])


def test_masked_crop_shows_the_object_on_the_mean_colour(
    pixels: np.ndarray, mask: np.ndarray
) -> None:
    shown, region = FOCUS["masked crop"].show(Image.fromarray(pixels), mask, BOX)
    assert region is None
    inside, seen = mask[Y1:Y2, X1:X2], np.asarray(shown)
    np.testing.assert_array_equal(seen[inside], pixels[Y1:Y2, X1:X2][inside])
    mean = [round(255 * c) for c in OPENAI_MEAN]
    assert (seen[~inside] == mean).all()
    assert (~inside).any()


def test_red_circle_is_drawn_around_the_box(pixels: np.ndarray, mask: np.ndarray) -> None:
    shown, region = FOCUS["red circle"].show(Image.fromarray(pixels), mask, BOX)
    assert region is None
    seen = np.asarray(shown)
    red = (seen == (255, 0, 0)).all(-1)
    ys, xs = np.nonzero(red)
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == (X1 - 1, Y1 - 1, X2, Y2)
    np.testing.assert_array_equal(seen[~red], pixels[~red])
    assert not red[mask].any()
    assert not red[Y1, X1]  # an ellipse leaves the corners alone
    assert red.sum() < 200


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
@pytest.mark.parametrize("name", FOCUS)
def test_any_image_mode_and_a_box_at_the_edge(name: str, mode: str) -> None:
    image = Image.new(mode, (W, H))
    edge, whole = Box(-5, 0, W + 5, 3), np.ones((H, W), bool)
    shown, region = FOCUS[name].show(image, whole, edge)
    expected = (W, 3) if "crop" in name else (W, H)
    assert shown.size == expected
    marks = [way for way in FOCUS if "alpha" in way and way != "no alpha"]
    marks += ["masked background", *CLASS_TOKEN]
    assert (region is not None) == (name in marks)


def test_red_box_and_contour_are_drawn_around(pixels: np.ndarray, mask: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    red = {}
    for name in ("red box", "red contour"):
        shown, region = FOCUS[name].show(image, mask, BOX)
        assert region is None
        seen = np.asarray(shown)
        red[name] = (seen == (255, 0, 0)).all(-1)
        np.testing.assert_array_equal(seen[~red[name]], pixels[~red[name]])
        assert not red[name][mask].any()
    assert red["red box"].sum() == 2 * (X2 - X1 + 2 + Y2 - Y1)  # a line of one pixel
    assert red["red box"][Y1 - 1, X1 - 1 : X2 + 1].all()
    y, x = np.nonzero(red["red contour"])
    distance = np.hypot(x - 35, y - 25)
    assert (distance.min(), distance.max()) == (
        pytest.approx(12, abs=0.3),
        pytest.approx(13, abs=1),
    )
    angles = np.sort(np.arctan2(y - 25, x - 35))
    assert np.diff(angles).max() < 0.15  # it is closed


def test_gray_keeps_the_objects_colour(pixels: np.ndarray, mask: np.ndarray) -> None:
    shown, region = FOCUS["gray"].show(Image.fromarray(pixels), mask, BOX)
    assert region is None
    seen = np.asarray(shown).astype(int)
    np.testing.assert_array_equal(seen[mask], pixels[mask])
    luma = pixels[~mask] @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(seen[~mask], luma[:, None].repeat(3, 1), atol=1)


@pytest.mark.parametrize("name", ["blur", "gray"])
def test_alpha_may_mark_what_is_kept_besides(
    name: str, pixels: np.ndarray, mask: np.ndarray
) -> None:
    plain, _ = FOCUS[name].show(Image.fromarray(pixels), mask, BOX)
    shown, region = FOCUS[f"alpha {name}"].show(Image.fromarray(pixels), mask, BOX)
    assert region is mask
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(plain))


def test_masked_background_marks_the_object_as_well(pixels: np.ndarray, mask: np.ndarray) -> None:
    shown, region = FOCUS["masked background"].show(Image.fromarray(pixels), mask, BOX)
    assert region is mask
    seen = np.asarray(shown)
    np.testing.assert_array_equal(seen[mask], pixels[mask])
    assert (seen[~mask] == [round(255 * c) for c in OPENAI_MEAN]).all()


def test_dense_features_are_pooled_over_mask_and_box(
    model: AlphaClip, pixels: np.ndarray, mask: np.ndarray
) -> None:
    transform = model.transform.replace(geometry="squash")
    pictures = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    regions = [(0, mask), (0, ~mask), (1, mask)]
    rgba = torch.stack([transform(pictures[i], m) for i, m in regions])
    boxes = torch.stack([transform(pictures[i], BOX) for i, _ in regions])
    with torch.no_grad():
        plain = rgba.clone()
        plain[:, 3] = model.normalisation.whole_image
        dense = torch.cat([dense_features(model.visual, r[None]) for r in plain])
        marks = model.normalisation.inverse(rgba)[:, 3:]
        found = FOCUS["mask pooling"].encode(model, rgba)
        torch.testing.assert_close(found, pool_masks(dense, marks))
        found = FOCUS["RoIAlign"].encode(model, boxes)
        marks = model.normalisation.inverse(boxes)[:, 3:]
        torch.testing.assert_close(found, pool_boxes(dense, marks))


def test_blur_keeps_the_object_and_hides_the_rest(pixels: np.ndarray, mask: np.ndarray) -> None:
    shown, region = FOCUS["blur"].show(Image.fromarray(pixels), mask, BOX)
    assert region is None
    seen = np.asarray(shown)
    np.testing.assert_array_equal(seen[mask], pixels[mask])
    # Noise of +-58 that is averaged over a Gaussian of sigma 12.5 px keeps 58 / (2 sqrt(pi) 12.5).
    assert 0.5 < seen[~mask].std(0).mean() < 4
    np.testing.assert_allclose(seen[~mask].mean(0), pixels.mean((0, 1)), atol=4)


def test_blur_is_relative_to_the_image() -> None:
    """ReCLIP's 100 px on COCO's 640: an edge is as wide as the picture is large."""
    widths = []
    for side in (64, 640):
        edge = np.zeros((side, side, 3), np.uint8)
        edge[:, side // 2 :] = 255
        shown, _ = FOCUS["blur"].show(Image.fromarray(edge), np.zeros((side, side), bool), BOX)
        profile = np.asarray(shown)[side // 2, :, 0] / 255
        # Between these levels a Gaussian edge is one standard deviation wide on either side.
        widths.append(((profile > 0.1587) & (profile < 0.8413)).sum() / side)
    assert widths == pytest.approx([2 * 100 / 640] * 2, abs=0.035)


def test_attention_mask_points_the_tower_and_leaves_alpha_alone(
    model: AlphaClip, pixels: np.ndarray, mask: np.ndarray
) -> None:
    way = FOCUS[ATTENTION_MASK]
    image, region = way.show(Image.fromarray(pixels), mask, BOX)
    rgba = model.transform.replace(geometry="squash")(image, region)[None]
    with torch.no_grad():
        pointed = way.encode(model, rgba)
        marked = model.transform.replace(geometry="squash")(Image.fromarray(mask))[:1] > 0
        with attending_to(model.visual, marked[None].float()):
            expected = model.encode_image(rgba[:, :3], normalize=True)
        plain = model.encode_image(rgba[:, :3], normalize=True)
    torch.testing.assert_close(pointed, expected)
    torch.testing.assert_close(pointed.norm(dim=-1), torch.ones(1))
    assert not torch.allclose(pointed, plain, atol=1e-3)
    for name in set(FOCUS) - set(CLASS_TOKEN):
        with torch.no_grad():
            encoded = FOCUS[name].encode(model, rgba)
        assert torch.equal(encoded, model.encode_image(rgba, normalize=True)), name


def test_a_tower_that_cannot_be_masked_has_all_other_ways(
    model: AlphaClip, caplog: pytest.LogCaptureFixture
) -> None:
    assert ways_for(model) == list(FOCUS)
    config = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": 32}
    resnet: Any = SimpleNamespace(visual=_build_vision_tower(16, config))
    with caplog.at_level(logging.WARNING):
        assert ways_for(resnet) == [name for name in FOCUS if name not in CLASS_TOKEN]
    assert "attention mask, mask pooling, RoIAlign are left out" in caplog.text
    assert "ModifiedResNet" in caplog.text
