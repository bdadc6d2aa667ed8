from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from alpha_clip.geometry import (
    Window,
    cut_window,
    resize,
    window_around,
)
from alpha_clip.pictures import split_batch, split_channels
from alpha_clip.regions import Box
from alpha_clip.transforms import Normalisation, RegionTransform

SIZE = 48
PLAIN = Normalisation((0.0,) * 3, (1.0,) * 3, alpha_mean=0.0, alpha_std=1.0)
ALL = ["center_crop", "pad", "squash", "crop_box"]


def shapes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A rectangle or an ellipse, of a pixel to the whole image."""
    sides = [max(1, round(n * np.exp(rng.uniform(-5, 0)))) for n in (height, width)]
    y, x = rng.integers(height - sides[0] + 1), rng.integers(width - sides[1] + 1)
    mask = np.zeros((height, width), bool)
    if rng.random() < 0.5:
        mask[y : y + sides[0], x : x + sides[1]] = True
    else:
        rows, columns = np.ogrid[:height, :width]
        far = ((rows + 0.5 - y) / sides[0] - 0.5) ** 2 + ((columns + 0.5 - x) / sides[1] - 0.5) ** 2
        mask = far <= 0.25
    return mask


def painted(kind: str, transform: RegionTransform) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield, for 70 sizes, the sides of an image and, transformed, a white region on black."""
    rng = np.random.default_rng(0)
    for _ in range(70):
        longer = round(np.exp(rng.uniform(0, np.log(700))))
        shorter = max(1, round(longer / np.exp(rng.uniform(0, np.log(20)))))
        height, width = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
        masks = np.stack([shapes(rng, height, width) for _ in range(3)])
        white = np.repeat(masks[..., None], 3, axis=3).astype(np.uint8) * 255
        if kind == "PIL":
            rgba = [transform(Image.fromarray(w), m) for w, m in zip(white, masks, strict=True)]
        else:
            images = torch.from_numpy(white).permute(0, 3, 1, 2)
            if kind == "floating":
                images = images / 255
            rgba = transform(images, torch.from_numpy(masks))
        yield from ((shorter, longer, picture) for picture in rgba)


def centre_of_mass(part: torch.Tensor) -> torch.Tensor:
    weights, places = part.double(), torch.arange(part.shape[-1]).double()
    return torch.stack([weights.sum(1) @ places, weights.sum(0) @ places]) / weights.sum()


@pytest.mark.filterwarnings("ignore:center_crop cut a region away")
@pytest.mark.parametrize("kind", ["PIL", "batch", "floating"])
@pytest.mark.parametrize("geometry", ALL)
def test_image_and_alpha_never_come_apart(geometry: Any, kind: str) -> None:
    """Regions painted into the image are found where alpha says, to half a pixel of the result.

    Bicubic and bilinear agree on a straight edge and differ at corners: of a square of 4 x 4 pixels
    (of image and result), at most the 4 at its corners, which is an overlap of 12 / 16.
    """
    compared, well_seen = 0, 0
    for shorter, longer, rgba in painted(kind, RegionTransform(SIZE, PLAIN, geometry)):
        red, alpha = rgba[0], rgba[3]
        if alpha.max() < 0.5:  # cut away, but for a rim perhaps
            assert geometry == "center_crop"
            assert red.max() < 0.6
            continue
        # A pixel of the image, in pixels of the result, where it has grown.
        zoom = max(1.0, SIZE / (longer if geometry == "pad" else shorter))
        # What the crop cuts off differs by a share of a pixel of the image, which may be large.
        limit = max(0.6, zoom / 20) if geometry == "center_crop" else 0.6
        assert (centre_of_mass(red) - centre_of_mass(alpha)).abs().max() < limit
        compared += 1
        bright, marked = red > 0.5, alpha > 0.5
        if min(int(marked.any(0).sum()), int(marked.any(1).sum())) >= 4 * zoom:
            well_seen += 1
            assert (bright & marked).sum() >= 0.75 * (bright | marked).sum()
    assert compared > 100
    assert well_seen >= 10


def peak(shape: tuple[int, int], y: int, x: int, value: int = 255) -> torch.Tensor:
    alpha = torch.zeros(1, 1, *shape, dtype=torch.uint8)
    alpha[..., y, x] = value
    return alpha


@pytest.mark.parametrize(
    ("shape", "y", "x", "target"),
    [
        ((2000, 1600), 700, 1500, [64, 64]),
        ((500, 1), 250, 0, [16, 1]),
        ((1, 500), 0, 250, [1, 16]),
        ((500, 3), 250, 1, [16, 1]),
        ((300, 200), 299, 0, [1, 1]),
        ((225, 225), 112, 112, [224, 224]),
    ],
)
def test_a_region_never_vanishes(shape: tuple[int, int], y: int, x: int, target: list[int]) -> None:
    for value in (255, 90, 1):
        small = resize(peak(shape, y, x, value), target)
        assert small.dtype == torch.uint8
        assert small.shape == (1, 1, *target)
        assert int(small.max()) == value
        row, column = divmod(int(small.argmax()), target[1])
        assert abs((row + 0.5) * shape[0] / target[0] - y - 0.5) <= shape[0] / target[0]
        assert abs((column + 0.5) * shape[1] / target[1] - x - 0.5) <= shape[1] / target[1]
        assert (small > 0).float().mean() <= max(9 / small.numel(), 0.2)


def test_regions_that_survive_are_only_resized() -> None:
    """Bit for bit, also beside one that does not; exactly those below half of their peak change."""
    rng = np.random.default_rng(0)
    kept = changed = 0
    for _ in range(60):
        height, width = (int(v) for v in rng.integers(1, 400, 2))
        masks = np.stack([shapes(rng, height, width) for _ in range(5)])
        alphas = torch.from_numpy(masks * rng.integers(1, 256, (5, 1, 1)).astype(np.uint8))[:, None]
        before = alphas.clone()
        plain = functional.resize(alphas, [32, 32], InterpolationMode.BILINEAR, antialias=True)
        for large, simple, ours in zip(alphas, plain, resize(alphas, [32, 32]), strict=True):
            if 2 * int(simple.max()) < int(large.max()):
                assert ours.max() == large.max()
                changed += 1
            else:
                assert torch.equal(ours, simple)
                kept += 1
        assert torch.equal(alphas, before)
    assert min(kept, changed) > 50


@pytest.mark.parametrize("target", [[16, 1], [1, 16], [1, 1], [16, 16]])
@pytest.mark.parametrize("shape", [(500, 1), (500, 5), (5, 500)])
def test_floating_colour_is_resized_as_uint8_is(shape: tuple[int, int], target: list[int]) -> None:
    """Torch's own kernel is wrong for a width of 1."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    grey = torch.from_numpy(128 + 80 * np.sin(y / 60) * np.cos(x / 60)).byte()
    colour = grey.expand(2, 3, *shape)
    expected = resize(colour, target).float() / 255
    torch.testing.assert_close(resize(colour / 255, target), expected, rtol=0, atol=2 / 255)


def test_floating_colour_does_not_overshoot() -> None:
    edge = (torch.arange(40) > 20).float().expand(3, 40, 40)
    assert resize(edge, [90, 90]).aminmax() == (0, 1)


def test_windows_stay_inside_the_image_where_they_fit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = (int(v) for v in rng.integers(1, 60, 2))
        mask = shapes(rng, height, width)
        mask[rng.integers(height), rng.integers(width)] = True
        scale = float(rng.uniform(1, 3))
        window = window_around(torch.from_numpy(mask)[None].byte(), scale)
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        longer = max(np.ptp(rows), np.ptp(columns)) + 1
        assert abs(window.side - min(scale * longer, max(height, width))) <= 0.5
        for start, places, limit in ((window.top, rows, height), (window.left, columns, width)):
            end = start + window.side
            assert start <= places[0]
            assert places[-1] < end
            if window.side <= limit:
                assert 0 <= start
                assert end <= limit
            else:  # nothing of the image is cut off in vain
                assert start <= 0
                assert limit <= end
            middle = (places[0] + places[-1] + 1) / 2
            free = min(max(middle, window.side / 2), limit - window.side / 2)
            if window.side > limit:
                free = max(min(middle, window.side / 2), limit - window.side / 2)
            assert abs((start + end) / 2 - free) <= 0.5


def test_soft_edges_belong_to_the_box() -> None:
    alpha = torch.zeros(1, 30, 30, dtype=torch.uint8)
    alpha[0, 10, 10], alpha[0, 10, 19] = 1, 255
    assert window_around(alpha, 1.0) == Window(top=5, left=10, side=10)


def test_a_window_beyond_the_image_is_padded_in_place() -> None:
    colour = torch.arange(3 * 20 * 40).remainder(251).byte().view(3, 20, 40)
    fill = (1.0, 0.5, 0.0)
    shown = cut_window(colour, Window(top=-9, left=4, side=32), 32, fill)
    assert torch.equal(shown[:, 9:29], colour[:, :, 4:36])
    for bar in (shown[:, :9], shown[:, 29:]):
        assert torch.equal(bar, torch.tensor([255, 128, 0])[:, None, None].byte().expand_as(bar))
    alpha = cut_window(torch.full((1, 20, 40), 9, dtype=torch.uint8), Window(-9, 4, 32), 32, fill)
    assert int(alpha.sum()) == 9 * 20 * 32
    assert cut_window(colour, Window(0, 0, 160), 8, fill).shape == (3, 8, 8)


def test_what_a_window_shows_is_never_cut_by_rounding() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = (int(v) for v in rng.integers(1, 10, 2))
        side = int(rng.integers(max(height, width), 90))
        top, left = int(rng.integers(height - side, 1)), int(rng.integers(width - side, 1))
        white = torch.full((1, height, width), 255, dtype=torch.uint8)
        shown = cut_window(white, Window(top, left, side), 15, (0, 0, 0))[0]
        rows, columns = shown.any(1).nonzero(), shown.any(0).nonzero()
        for places, start, length in ((rows, -top, height), (columns, -left, width)):
            assert len(places) == max(1, round(length * 15 / side))
            assert abs(float(places[0]) - start * 15 / side) <= 1


IMAGE = torch.zeros(3, 9, 12)
BATCH = torch.zeros(2, 3, 9, 12)
BAD_IMAGES: dict[str, tuple[Any, type[Exception], str]] = {
    "1 channel": (IMAGE[:1], ValueError, r"must be \[3, H, W\].*got \[1, 9, 12\].*expand grey"),
    "5 channels": (torch.zeros(5, 9, 12), ValueError, r"got \[5, 9, 12\]"),
    "channels last": (IMAGE.permute(1, 2, 0), ValueError, "with permute"),
    "grey": (IMAGE[0], ValueError, r"got \[9, 12\]"),
    "video": (BATCH[None], ValueError, r"got \[1, 2, 3, 9, 12\]"),
    "no pixels": (torch.zeros(3, 0, 12), ValueError, r"got \[3, 0, 12\]"),
    "no images": (BATCH[:0], ValueError, r"got \[0, 3, 9, 12\]"),
    "PIL without pixels": (Image.new("RGB", (0, 5)), ValueError, r"got \[3, 5, 0\]"),
    "normalised": (IMAGE - 1.8, ValueError, r"0\.\.1, got -1\.8.*already normalised\?"),
    "floating 0..255": (IMAGE + 255, ValueError, r"got 255\.\.255.*Divide 0\.\.255 by 255"),
    "NaN": (IMAGE * torch.nan, ValueError, "got nan"),
    "bad alpha": (torch.cat([IMAGE, IMAGE[:1] + 1.9]), ValueError, r"got 0\.\.1\.9"),
    "int64": (IMAGE.long(), TypeError, r"uint8 0\.\.255 or floating 0\.\.1, got torch\.int64"),
    "bool": (IMAGE.bool(), TypeError, r"got torch\.bool"),
    "grey array": (np.zeros((9, 12), np.uint8), ValueError, r"PIL\.Image\.fromarray"),
    "channels first": (
        np.zeros((3, 9, 12), np.uint8),
        ValueError,
        r"\[H, W, 3\].*got \[3, 9, 12\]",
    ),
    "array of batch": (np.zeros((2, 9, 12, 3), np.uint8), ValueError, r"tensors \[B, 3, H, W\]"),
    "int array": (np.zeros((9, 12, 3), int), TypeError, r"got torch\.int64"),
    "path": ("photo.jpg", TypeError, r"got str; open files with PIL\.Image\.open"),
    "list": ([IMAGE], TypeError, r"got list.*torch\.stack"),
    "nothing": (None, TypeError, "got NoneType"),
}


@pytest.mark.parametrize(("image", "error", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_images_are_refused(image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RegionTransform(16)(image)


BAD_PAIRS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "fewer masks": (BATCH, torch.ones(1, 9, 12), ValueError, r"\[2, 9, 12\] or .*got \[1, 9, 12\]"),
    "other size": (BATCH, torch.ones(2, 12, 9), ValueError, r"got \[2, 12, 9\]"),
    "two channels": (BATCH, torch.ones(2, 2, 9, 12), ValueError, r"got \[2, 2, 9, 12\]"),
    "one mask": (BATCH, torch.ones(9, 12), ValueError, r"got \[9, 12\]"),
    "no batch": (IMAGE, torch.ones(2, 9, 12), ValueError, "pass one mask at a time"),
    "an empty one": (
        BATCH,
        torch.eye(2)[:, :1, None].expand(2, 9, 12),
        ValueError,
        r"images \[1\]",
    ),
    "NaN": (BATCH, torch.full((2, 9, 12), torch.nan), ValueError, "got nan"),
    "fewer regions": (BATCH, [None], ValueError, "2 images takes 2 regions, got 1"),
    "polygon": (BATCH, [1.0, 1.0, 9.0, 1.0, 5.0, 8.0], ValueError, "got 6"),
    "a number each": (BATCH, [1.0, 2.0], TypeError, "a region must be .* got float"),
    "array of others": (BATCH, np.ones((3, 9, 12)), ValueError, "got 3"),
    "one box": (
        BATCH,
        Box(0, 0, 5, 5),
        TypeError,
        r"got Box; repeat one region with \[region\] \* 2",
    ),
    "an RLE": (BATCH, {"size": [9, 12], "counts": [0, 108]}, TypeError, "got dict"),
    "text": (BATCH, "ab", TypeError, "got str"),
    "elsewhere": (
        IMAGE,
        torch.ones(9, 12, device="meta"),
        ValueError,
        r"mask\.to\(image\.device\)",
    ),
    "all elsewhere": (BATCH, torch.ones(2, 9, 12, device="meta"), ValueError, "cpu, got meta"),
    "one elsewhere": (BATCH, [None, torch.ones(9, 12, device="meta")], ValueError, "got meta"),
}


@pytest.mark.parametrize(
    ("image", "region", "error", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys()
)
def test_regions_that_do_not_fit_are_refused(
    image: Any, region: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        RegionTransform(16)(image, region)


def test_many_regions_belong_to_one_image() -> None:
    for method in (RegionTransform(16).many, RegionTransform(16).stack):
        with pytest.raises(ValueError, match="expected one image and its regions, got a batch"):
            method(BATCH, [None, None])
        with pytest.raises(ValueError, match="at least one region"):
            method(IMAGE, [])


def test_channels_keep_what_they_were_given() -> None:
    """No copy of a tensor's colours, and masks of one image as one tensor."""
    image = torch.randint(0, 256, (4, 9, 12), dtype=torch.uint8)
    masks = torch.rand(5, 9, 12)
    rgb, alphas = split_channels(image, list(masks))
    assert rgb.data_ptr() == image.data_ptr()
    assert torch.equal(alphas[:, 0], masks.mul(255).round().byte())
    rgb, alphas = split_batch(image[None], None)
    assert torch.equal(rgb[0], image[:3])
    assert torch.equal(alphas[0], image[3:])
