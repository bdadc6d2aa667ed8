from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision import tv_tensors

from alpha_clip.regions import Box, encode_rle, masks_to_alphas, region_to_alpha

H, W = 12, 20
MASK = np.zeros((H, W), bool)
MASK[3:9, 5:15] = True
EXPECTED = MASK.astype(np.uint8) * 255
RECTANGLE = [5.0, 3.0, 15.0, 3.0, 15.0, 9.0, 5.0, 9.0]


def pil(mode: str) -> Image.Image:
    """A picture whose mask channel is MASK and whose colour says the opposite."""
    channel = Image.fromarray(EXPECTED)
    if mode in ("1", "L", "I"):
        return channel.convert(mode)
    if mode == "F":
        return Image.fromarray(MASK.astype(np.float32))
    if mode == "I;16":
        return Image.fromarray(EXPECTED.astype(np.uint16))
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
    "int16 0/1": MASK.astype(np.int16),
    "big-endian int32": EXPECTED.astype(">i4"),
    "uint32": EXPECTED.astype(np.uint32),
    "uint64 0/1": MASK.astype(np.uint64),
    "float16": MASK.astype(np.float16),
    "float32": MASK.astype(np.float32),
    "float64": MASK.astype(np.float64),
    "leading axis": MASK[None],
    "trailing axis": EXPECTED[..., None],
    "torch bool": torch.from_numpy(MASK),
    "torch uint8": torch.from_numpy(EXPECTED),
    "torch int8": torch.from_numpy(MASK).to(torch.int8),
    "torch uint16": torch.from_numpy(EXPECTED.astype(np.uint16)),
    "torch uint32": torch.from_numpy(EXPECTED.astype(np.uint32)),
    "torch uint64 0/1": torch.from_numpy(MASK.astype(np.uint64)),
    "torch int16": torch.from_numpy(EXPECTED.astype(np.int16)),
    "torch int32": torch.from_numpy(MASK).int(),
    "torch int64": torch.from_numpy(EXPECTED).long(),
    "torch float16": torch.from_numpy(MASK).half(),
    "torch float64": torch.from_numpy(MASK).double(),
    "torch leading axis": torch.from_numpy(EXPECTED)[None],
    "torch trailing axis": torch.from_numpy(MASK)[..., None],
    "torch not contiguous": torch.from_numpy(MASK.T.copy()).T,
    "tv_tensors.Mask": tv_tensors.Mask(torch.from_numpy(MASK)[None]),
    "torch bfloat16": torch.from_numpy(MASK).to(torch.bfloat16),
    "torch with gradient": torch.from_numpy(MASK).float().requires_grad_(),
    "PIL 1": pil("1"),
    "PIL L": pil("L"),
    "PIL LA": pil("LA"),
    "PIL RGBA": pil("RGBA"),
    "PIL PA": pil("PA"),
    "PIL I": pil("I"),
    "PIL I;16": pil("I;16"),
    "PIL F": pil("F"),
    "RLE": encode_rle(MASK),
    "RLE of pycocotools": coco_mask.encode(np.asfortranarray(MASK, np.uint8)),
    "uncompressed RLE": {"size": [H, W], "counts": [63, *[6, 6] * 9, 6, 63]},
    "polygons": [RECTANGLE],
    "one polygon": RECTANGLE,
    "polygon of points": [[[5, 3], [15, 3], [15, 9], [5, 9]]],
    "contour of OpenCV": [np.array([[[5, 3]], [[15, 3]], [[15, 9]], [[5, 9]]])],
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
    np.testing.assert_array_equal(region_to_alpha(torch.from_numpy(grey), H, W), grey)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        half = torch.full((H, W), 0.5, dtype=dtype)
        assert (region_to_alpha(half, H, W) == 128).all()
    coarse = torch.from_numpy(soft).bfloat16()  # read as stored, not scaled in 8 bits
    np.testing.assert_array_equal(
        region_to_alpha(coarse, H, W), np.round(coarse.float().numpy() * 255)
    )


def test_whole_numbers_are_0_to_1_only_if_none_is_above_1() -> None:
    """2 of 255 is a faint mask, not label 2."""
    for mask in (MASK.astype(np.uint8) * 2, torch.from_numpy(MASK).long() * 2):
        np.testing.assert_array_equal(region_to_alpha(mask, H, W), MASK * 2)


def test_an_axis_of_1_is_no_leftover_where_the_image_has_it() -> None:
    line = np.array([[0, 1, 1]], np.uint8)
    for mask in (line, line[None], line[..., None]):
        np.testing.assert_array_equal(region_to_alpha(mask, 1, 3), line * 255)
    np.testing.assert_array_equal(region_to_alpha(line.T[None], 3, 1), line.T * 255)
    np.testing.assert_array_equal(region_to_alpha(line.T[..., None], 3, 1), line.T * 255)


def test_masks_of_a_batch_share_their_range() -> None:
    masks = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    masks[0], masks[1] = 1, 255
    alphas = masks_to_alphas(masks)
    assert alphas.shape == masks.shape
    assert torch.equal(alphas, masks)
    assert (masks_to_alphas(masks[:1]) == 255).all()
    masks[0] = 0
    with pytest.raises(ValueError, match=r"selects no pixel.*images \[0\] of the batch"):
        masks_to_alphas(masks)


def test_the_callers_mask_is_not_changed() -> None:
    for mask in (MASK.copy(), EXPECTED.copy(), MASK.astype(np.float32)):
        before = mask.copy()
        region_to_alpha(mask, H, W)[:] = 7
        region_to_alpha(torch.from_numpy(mask), H, W)[:] = 7
        np.testing.assert_array_equal(mask, before)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "wrong shape": (MASK.T, ValueError, r"as large as the image, \[H, W\] = \[12, 20\], got"),
    "two masks": (np.stack([MASK, MASK]), ValueError, "pass one mask at a time"),
    "torch two masks": (torch.ones(2, H, W), ValueError, r"got \[2, 12, 20\]"),
    "torch wrong shape": (torch.ones(W, H), ValueError, "as large as the image"),
    "PIL of another size": (Image.new("L", (H, W), 255), ValueError, "as large as the image"),
    "RLE of another image": (encode_rle(MASK.T), ValueError, "as large as the image"),
    "NaN": (np.where(MASK, 1.0, np.nan), ValueError, r"0\.\.1, got nan"),
    "float below 0": (MASK - 1.0, ValueError, r"0\.\.1, got -1\.\."),
    "float above 1": (MASK * 255.0, ValueError, "normalisation is applied by the transform"),
    "negative": (-MASK.astype(np.int64), ValueError, r"got -1\.\.0"),
    "above 255": (MASK * 256, ValueError, r"got 0\.\.256.*labels == 3"),
    "torch NaN": (torch.full((H, W), torch.nan), ValueError, r"0\.\.1, got nan"),
    "torch logits": (torch.full((H, W), 1.5), ValueError, "take the sigmoid"),
    "torch negative": (-torch.ones(H, W).int(), ValueError, r"got -1\.\.-1"),
    "torch above 255": (torch.full((H, W), 300), ValueError, r"got 300\.\.300"),
    "torch empty": (torch.zeros(H, W), ValueError, "selects no pixel"),
    "torch complex": (torch.ones(H, W, dtype=torch.cfloat), TypeError, "complex64"),
    "PIL 16 bit": (Image.fromarray(EXPECTED.astype(np.uint16) * 9), ValueError, r"got 0\.\.2295"),
    "complex": (MASK.astype(complex), TypeError, "complex128"),
    "objects": (MASK.astype(object), TypeError, "object"),
    "empty mask": (~MASK & MASK, ValueError, "selects no pixel; pass None"),
    "empty float mask": (np.zeros((H, W)), ValueError, "selects no pixel"),
    "empty RLE": (encode_rle(np.zeros((H, W))), ValueError, "selects no pixel"),
    "PIL colour": (Image.new("RGB", (W, H)), ValueError, r"convert\('L'\)"),
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
    "flat polygon": ([[1.0, 1.0, 9.0, 9.0, 5.0, 5.0]], ValueError, "selects no pixel"),
    "polygon of one point": ([[5.0, 3.0] * 4], ValueError, "selects no pixel"),
    "list of masks": ([MASK, MASK], TypeError, r"RegionTransform\.many or stack.*\[12, 20\] in it"),
    "list of PIL masks": ([pil("L")], TypeError, "read as COCO polygons"),
    "list of boxes": ([Box(5, 3, 15, 9)], TypeError, "got Box in it"),
    "list of RLEs": ([encode_rle(MASK)], TypeError, "got dict in it"),
    "ragged points": ([[[1, 2], [3]]], TypeError, "got list in it"),
    "runs that do not sum": ({"size": [H, W], "counts": [63, 6]}, ValueError, "must sum to"),
    "negative runs": ({"size": [H, W], "counts": [250, -10]}, ValueError, "must not be negative"),
    "no counts": ({"size": [H, W]}, ValueError, "RLE counts must be"),
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
