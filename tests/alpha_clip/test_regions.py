from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from alpha_clip.regions import Box, encode_rle, region_to_alpha

H, W = 12, 20
MASK = np.zeros((H, W), bool)
MASK[3:9, 5:15] = True
EXPECTED = MASK.astype(np.uint8) * 255
RECTANGLE = [5.0, 3.0, 15.0, 3.0, 15.0, 9.0, 5.0, 9.0]


def pil(mode: str) -> Image.Image:
    """A picture whose mask channel is MASK and whose colour says the opposite."""
    channel = Image.fromarray(EXPECTED)
    if mode in ("1", "L"):
        return channel.convert(mode)
    colour = Image.fromarray(255 - EXPECTED)
    return Image.merge(mode, [colour] * (len(mode) - 1) + [channel])


SAME_REGION: dict[str, Any] = {
    "bool": MASK,
    "read-only bool": np.broadcast_to(MASK, (H, W)),
    "Fortran order": np.asfortranarray(MASK),
    "uint8 0/1": MASK.astype(np.uint8),
    "uint8 0..255": EXPECTED,
    "int8 0/1": MASK.astype(np.int8),
    "int64 0/1": MASK.astype(np.int64),
    "int64 0..255": EXPECTED.astype(np.int64),
    "uint16": EXPECTED.astype(np.uint16),
    "float16": MASK.astype(np.float16),
    "float64": MASK.astype(np.float64),
    "torch bool": torch.from_numpy(MASK),
    "torch uint8": torch.from_numpy(EXPECTED),
    "torch int8": torch.from_numpy(MASK).to(torch.int8),
    "torch bfloat16": torch.from_numpy(MASK).to(torch.bfloat16),
    "torch with gradient": torch.from_numpy(MASK).float().requires_grad_(),
    "PIL 1": pil("1"),
    "PIL L": pil("L"),
    "PIL LA": pil("LA"),
    "PIL RGBA": pil("RGBA"),
    "RLE": encode_rle(MASK),
    "RLE of pycocotools": coco_mask.encode(np.asfortranarray(MASK, np.uint8)),
    "uncompressed RLE": {"size": [H, W], "counts": [63, *[6, 6] * 9, 6, 63]},
    "polygons": [RECTANGLE],
    "one polygon": RECTANGLE,
    "polygon of points": [[[5, 3], [15, 3], [15, 9], [5, 9]]],
    "two polygons": [
        [5.0, 3.0, 10.0, 3.0, 10.0, 9.0, 5.0, 9.0],
        [10.0, 3.0, 15.0, 3.0, 15.0, 9.0, 10.0, 9.0],
    ],
    "polygons as arrays": [
        np.array([5.0, 3.0, 10.0, 3.0, 10.0, 9.0, 5.0, 9.0]),
        np.array([10.0, 3.0, 15.0, 3.0, 15.0, 9.0, 10.0, 9.0]),
    ],
    "box": Box(5, 3, 15, 9),
}


@pytest.mark.parametrize("region", SAME_REGION.values(), ids=SAME_REGION.keys())
def test_every_form_of_a_region_gives_the_same_alpha(region: Any) -> None:
    alpha = region_to_alpha(region, H, W)
    assert alpha.dtype == np.uint8
    np.testing.assert_array_equal(alpha, EXPECTED)


def test_none_is_the_whole_image() -> None:
    np.testing.assert_array_equal(region_to_alpha(None, 2, 3), np.full((2, 3), 255))


def test_soft_masks_stay_soft() -> None:
    soft = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)
    np.testing.assert_array_equal(region_to_alpha(soft, H, W), np.round(soft * 255))
    grey = np.round(soft * 255).astype(np.uint8)
    np.testing.assert_array_equal(region_to_alpha(grey, H, W), grey)
    np.testing.assert_array_equal(region_to_alpha(Image.fromarray(grey), H, W), grey)
    half = torch.full((H, W), 0.5, dtype=torch.bfloat16)
    assert (region_to_alpha(half, H, W) == 128).all()


def test_the_callers_mask_is_not_changed() -> None:
    for mask in (MASK.copy(), EXPECTED.copy(), MASK.astype(np.float32)):
        before = mask.copy()
        region_to_alpha(mask, H, W)[:] = 7
        np.testing.assert_array_equal(mask, before)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "wrong shape": (MASK.T, ValueError, r"as large as the image, \[H, W\] = \[12, 20\], got"),
    "extra axis": (MASK[None], ValueError, "squeeze extra axes"),
    "torch extra axis": (torch.ones(1, H, W), ValueError, "squeeze extra axes"),
    "PIL of another size": (Image.new("L", (H, W), 255), ValueError, "as large as the image"),
    "RLE of another image": (encode_rle(MASK.T), ValueError, "as large as the image"),
    "NaN": (np.where(MASK, 1.0, np.nan), ValueError, r"0\.\.1, got nan"),
    "float below 0": (MASK - 1.0, ValueError, r"0\.\.1, got -1\.0"),
    "float above 1": (MASK * 255.0, ValueError, "normalisation is applied by the transform"),
    "negative": (-MASK.astype(np.int64), ValueError, r"got -1\.\.0"),
    "above 255": (MASK * 256, ValueError, r"got 0\.\.256"),
    "complex": (MASK.astype(complex), TypeError, "complex128"),
    "objects": (MASK.astype(object), TypeError, "object"),
    "empty mask": (~MASK & MASK, ValueError, "selects no pixel; pass None"),
    "empty float mask": (np.zeros((H, W)), ValueError, "selects no pixel"),
    "empty RLE": (encode_rle(np.zeros((H, W))), ValueError, "selects no pixel"),
    "PIL colour": (Image.new("RGB", (W, H)), ValueError, "mode 1, L, LA or RGBA, got RGB"),
    "PIL palette": (Image.new("P", (W, H)), ValueError, "got P"),
    "two points": ([[1.0, 1.0, 5.0, 5.0]], ValueError, "at least 3 points"),
    "odd numbers": ([[1.0, 1.0, 5.0, 5.0, 3.0, 9.0, 4.0]], ValueError, "got 7 numbers"),
    "no polygon": ([], ValueError, "empty list"),
    "an empty polygon": ([[]], ValueError, "got 0 numbers"),
    "polygon with NaN": ([[float("nan"), *RECTANGLE[1:]]], ValueError, "finite pixels"),
    "polygon far away": ([[v + 1e9 for v in RECTANGLE]], ValueError, "near the image"),
    "polygon outside": ([[v + 30 for v in RECTANGLE]], ValueError, "selects no pixel"),
    "box outside": (Box(W, 0, W + 5, H), ValueError, r"outside the image of 20 x 12 px"),
    "box left of it": (Box(-5, 0, 0, H), ValueError, "outside the image"),
    "text": ("mask.png", TypeError, "got str"),
    "number": (3, TypeError, "got int"),
    "mapping": ({"mask": MASK}, ValueError, "RLE size"),
}


@pytest.mark.parametrize(("region", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_regions_are_refused(region: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        region_to_alpha(region, H, W)


@pytest.mark.parametrize(
    ("corners", "message"),
    [
        ((5, 5, 5, 9), "x1 < x2"),
        ((5, 5, 9, 2), r"from \[x, y, width, height\]"),
        ((float("nan"), 0, 1, 1), "finite"),
        ((0, 0, float("inf"), 1), "finite"),
    ],
)
def test_boxes_without_area_are_refused(corners: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Box(*corners)


def test_box_takes_the_pixels_whose_centres_are_inside() -> None:
    rng = np.random.default_rng(0)
    centres_y, centres_x = np.mgrid[:H, :W] + 0.5
    for _ in range(300):
        x1, y1 = rng.uniform(-4, 16, 2)
        box = Box(x1, y1, x1 + rng.uniform(1, 12), y1 + rng.uniform(1, 12))
        if box.x2 <= 0.5 or box.y2 <= 0.5 or box.x1 > W - 0.5 or box.y1 > H - 0.5:
            continue  # at the very edge the box keeps one pixel; tested below
        inside = (centres_x >= box.x1) & (centres_x < box.x2)
        inside &= (centres_y >= box.y1) & (centres_y < box.y2)
        np.testing.assert_array_equal(region_to_alpha(box, H, W) > 0, inside)


@pytest.mark.parametrize(
    ("box", "pixel"),
    [
        (Box(3.6, 4.6, 3.9, 4.9), (4, 4)),
        (Box(-3, -3, 0.2, 0.2), (0, 0)),
        (Box(W - 0.2, H - 0.2, W + 9, H + 9), (W - 1, H - 1)),
    ],
)
def test_box_smaller_than_a_pixel_keeps_one(box: Box, pixel: tuple[int, int]) -> None:
    x1, y1, x2, y2 = box.pixels(H, W)
    assert (x2 - x1, y2 - y1) == (1, 1)
    assert abs(x1 - pixel[0]) <= 1
    assert abs(y1 - pixel[1]) <= 1
    assert region_to_alpha(box, H, W).sum() == 255
    assert 0 <= x1 < W
    assert 0 <= y1 < H


def test_box_is_clipped_to_the_image() -> None:
    assert Box(-100, -100, 100, 100).pixels(H, W) == (0, 0, W, H)
