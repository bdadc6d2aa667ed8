import numpy as np
import pytest
from PIL import Image

from alpha_clip.evaluation.focus_baselines import FOCUS
from alpha_clip.regions import Box
from alpha_clip.transforms import OPENAI_MEAN

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
    ways = ["no alpha", "alpha", "box alpha", "crop", "masked crop", "red circle"]
    assert list(FOCUS) == ways


@pytest.mark.parametrize("name", FOCUS)
def test_the_image_itself_is_not_changed(name: str, pixels: np.ndarray, mask: np.ndarray) -> None:
    image, before = Image.fromarray(pixels.copy()), mask.copy()
    FOCUS[name](image, mask, BOX)
    np.testing.assert_array_equal(np.asarray(image), pixels)
    np.testing.assert_array_equal(mask, before)


def test_alpha_ways_change_the_region_alone(pixels: np.ndarray, mask: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    for name, expected in (("no alpha", None), ("alpha", mask), ("box alpha", BOX)):
        shown, region = FOCUS[name](image, mask, BOX)
        assert shown is image
        assert region is expected


def test_crop_is_the_box(pixels: np.ndarray, mask: np.ndarray) -> None:
    shown, region = FOCUS["crop"](Image.fromarray(pixels), mask, BOX)
    assert region is None
    np.testing.assert_array_equal(np.asarray(shown), pixels[Y1:Y2, X1:X2])


def test_masked_crop_shows_the_object_on_the_mean_colour(
    pixels: np.ndarray, mask: np.ndarray
) -> None:
    shown, region = FOCUS["masked crop"](Image.fromarray(pixels), mask, BOX)
    assert region is None
    inside, seen = mask[Y1:Y2, X1:X2], np.asarray(shown)
    np.testing.assert_array_equal(seen[inside], pixels[Y1:Y2, X1:X2][inside])
    mean = [round(255 * c) for c in OPENAI_MEAN]
    assert (seen[~inside] == mean).all()
    assert (~inside).any()


def test_red_circle_is_drawn_around_the_box(pixels: np.ndarray, mask: np.ndarray) -> None:
    shown, region = FOCUS["red circle"](Image.fromarray(pixels), mask, BOX)
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
    shown, region = FOCUS[name](image, whole, edge)
    expected = (W, 3) if "crop" in name else (W, H)
    assert shown.size == expected
    assert (region is not None) == ("alpha" in name and name != "no alpha")
