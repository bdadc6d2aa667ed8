from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from alpha_clip.regions import Box
from alpha_clip.transforms import (
    Normalisation,
    RegionAugment,
    RegionTransform,
    pad_to_square,
    split_channels,
)

GEOMETRIES = ["center_crop", "pad", "squash"]
SIZE = 64


def rectangle(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """A white rectangle on black, and the same rectangle as a mask."""
    height, width = (int(v) for v in rng.integers(40, 200, 2))
    mask = np.zeros((height, width), bool)
    side_y, side_x = rng.integers(height // 4, height // 2), rng.integers(width // 4, width // 2)
    # In the middle half, so that a centre crop shows something of it.
    y = rng.integers(height // 4, height // 2)
    x = rng.integers(width // 4, width // 2)
    mask[y : y + side_y, x : x + side_x] = True
    return Image.fromarray(np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255), mask


def seen(rgb: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where colour is bright, and where alpha says to look."""
    picture = Normalisation().inverse(torch.cat([rgb, alpha]))
    return picture[:3].mean(0) > 0.5, picture[3] > 0.5


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


def outline(mask: torch.Tensor) -> int:
    """Most pixels that may differ: those at the rectangle's edge."""
    return int(2 * (mask.any(0).sum() + mask.any(1).sum()))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_image_and_alpha_stay_aligned(geometry: Any) -> None:
    rng = np.random.default_rng(0)
    transform = RegionTransform(SIZE, geometry=geometry)
    for _ in range(25):
        image, mask = rectangle(rng)
        rgba = transform(image, mask)
        assert rgba.shape == (4, SIZE, SIZE)
        assert rgba.dtype == torch.float32
        bright, marked = seen(rgba[:3], rgba[3:])
        if geometry == "pad":  # the bars have the mean colour
            bright &= _content(image)
        assert marked.any()
        assert (bright ^ marked).sum() <= outline(marked) // 2
        assert iou(bright, marked) > 0.8


def _content(image: Image.Image) -> torch.Tensor:
    """Where the padded square shows the picture."""
    return (
        pad_to_square(
            torch.full((1, image.height, image.width), 255, dtype=torch.uint8), SIZE, (0, 0, 0)
        )[0]
        > 0
    )


def test_augment_keeps_image_and_alpha_aligned() -> None:
    rng = np.random.default_rng(0)
    for flip in (0.0, 1.0):
        augment = RegionAugment(SIZE, scale=(0.3, 1.0), flip=flip)
        for _ in range(25):
            image, mask = rectangle(rng)
            rgb, alphas = augment.many(image, [mask])
            bright, marked = seen(rgb, alphas[0])
            assert (bright ^ marked).sum() <= outline(marked) // 2
            assert iou(bright, marked) > 0.8


def test_augment_never_loses_a_region() -> None:
    """With `min_kept` 1, no crop may cut anything off either of two far regions."""
    pixels = np.zeros((90, 90, 3), np.uint8)
    corners = [Box(0, 0, 9, 9), Box(81, 81, 90, 90)]
    image = Image.fromarray(pixels)
    strict = RegionAugment(90, scale=(0.2, 0.5), min_kept=1.0)
    loose = RegionAugment(90, scale=(0.2, 0.5), min_kept=0.0)
    for _ in range(10):
        assert [int((a > 0).sum()) for a in strict.many(image, corners)[1]] == [81, 81]
    lost = [float((loose.many(image, corners)[1] > 0).float().mean()) for _ in range(10)]
    assert lost != [81 / 8100] * 10


def test_augment_keeps_the_asked_share() -> None:
    image, mask = Image.new("RGB", (100, 100)), np.zeros((100, 100), bool)
    mask[:, :50] = True
    kept = []
    augment = RegionAugment(100, scale=(0.3, 0.9), ratio=(1.0, 1.0), min_kept=0.6)
    for _ in range(40):
        window = augment._crop(*split_channels(image, [mask]), augment.crop)
        kept.append(float(window[1][0].sum() / 255 / mask.sum()))
    assert min(kept) >= 0.6
    assert min(kept) < 1


def test_augment_flips_and_is_a_function_of_the_seed() -> None:
    image, mask = rectangle(np.random.default_rng(3))
    plain = RegionAugment(SIZE, scale=(1, 1), ratio=(1, 1), min_kept=1.0)
    mirrored = RegionAugment(SIZE, scale=(1, 1), ratio=(1, 1), min_kept=1.0, flip=1.0)
    mask[:] = True  # so that only the whole image keeps everything
    for ours, theirs in zip(plain.many(image, [mask]), mirrored.many(image, [mask]), strict=True):
        assert torch.equal(ours.flip(-1), theirs)
    random = RegionAugment(SIZE, scale=(0.3, 1), flip=0.5, jitter=0.4)
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(torch.cat([t.flatten() for t in random.many(image, [Box(0, 0, 9, 9)])]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_jitter_changes_colour_and_not_alpha() -> None:
    image = Image.new("RGB", (SIZE, SIZE), (200, 60, 90))
    plain = RegionAugment(SIZE, min_kept=1.0)
    jittered = RegionAugment(SIZE, min_kept=1.0, jitter=0.8)
    box = [Box(0, 0, SIZE, SIZE)]
    rgb, alpha = plain.many(image, box)
    other_rgb, other_alpha = jittered.many(image, box)
    assert not torch.allclose(rgb, other_rgb, atol=0.01)
    assert torch.equal(alpha, other_alpha)


@pytest.mark.parametrize("geometry", ["center_crop", "squash"])
def test_whole_image_is_alpha_one(geometry: Any) -> None:
    rgba = RegionTransform(SIZE, geometry=geometry)(Image.new("RGB", (50, 90)))
    torch.testing.assert_close(rgba[3], torch.full((SIZE, SIZE), (1 - 0.5) / 0.26))
    outside = RegionTransform(SIZE, geometry="squash")(Image.new("RGB", (50, 50)), Box(0, 0, 1, 1))
    assert float(outside[3].min()) == pytest.approx(-0.5 / 0.26)


def test_pad_marks_only_the_picture() -> None:
    rgba = RegionTransform(SIZE, geometry="pad")(Image.new("RGB", (32, 64), "white"))
    alpha = Normalisation().inverse(rgba)[3]
    assert torch.equal(alpha[:, 16:48], torch.ones(64, 32))
    assert alpha[:, :16].max() == 0
    assert alpha[:, 48:].max() == 0
    # The bars have the tower's mean colour, which normalises to about 0.
    assert rgba[:3, :, :16].abs().max() < 0.01


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_colours_under_alpha_0_are_kept(geometry: Any) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (70, 50, 3), dtype=np.uint8)
    transform = RegionTransform(SIZE, geometry=geometry)
    corner = transform(Image.fromarray(colours), Box(24, 34, 26, 36))
    assert torch.equal(corner[:3], transform(Image.fromarray(colours))[:3])
    mask = Image.fromarray(np.full((70, 50), 0, np.uint8))
    mask.putpixel((25, 35), 255)
    rgba_image = Image.fromarray(colours)
    rgba_image.putalpha(mask)  # transparent nearly everywhere
    assert torch.equal(transform(rgba_image, rgba_image), transform(Image.fromarray(colours), mask))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_many_equals_one_by_one(geometry: Any) -> None:
    image, mask = rectangle(np.random.default_rng(1))
    transform = RegionTransform(32, geometry=geometry)
    regions = [mask, None, Box(20, 20, 30, 39)]
    rgb, alphas = transform.many(image, list(regions))
    assert alphas.shape == (3, 1, 32, 32)
    for region, alpha in zip(regions, alphas, strict=True):
        assert torch.equal(transform(image, region), torch.cat([rgb, alpha]))


def test_centre_crop_is_clips_own() -> None:
    """Same sizes as torchvision's Resize and CenterCrop, which CLIP's preprocessing is made of."""
    rng = np.random.default_rng(0)
    clip = v2.Compose([v2.Resize(48, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(48)])
    n = Normalisation()
    sizes = [(int(a), int(b)) for a, b in rng.integers(10, 160, (60, 2))]
    for width, height in [*sizes, (11, 33), (147, 49), (49, 147), (1, 1), (48, 48)]:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = RegionTransform(48)(Image.fromarray(pixels))[:3]
        theirs = n.rgb(clip(torch.from_numpy(pixels).permute(2, 0, 1)))
        assert torch.equal(ours, theirs), (width, height)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_extreme_shapes(geometry: Any, size: tuple[int, int]) -> None:
    rgba = RegionTransform(16, geometry=geometry)(Image.new("RGB", size, "white"))
    assert rgba.shape == (4, 16, 16)
    assert rgba.isfinite().all()
    assert rgba[3].max() > 0


def test_alpha_does_not_overshoot() -> None:
    mask = np.indices((37, 53)).sum(0) % 7 < 3
    for geometry in GEOMETRIES:
        rgba = RegionTransform(90, geometry=geometry)(Image.new("RGB", (53, 37)), mask)  # type: ignore[arg-type]
        assert -1.9231 < float(rgba[3].min())
        assert float(rgba[3].max()) < 1.9231


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_any_image_mode_is_read_as_rgb(mode: str) -> None:
    image = Image.new(mode, (20, 20))
    expected = RegionTransform(16)(image.convert("RGB"))
    assert torch.equal(RegionTransform(16)(image), expected)


def test_normalisation_inverts_itself_and_is_the_towers_own() -> None:
    own = Normalisation((0.5, 0.4, 0.3), (0.2, 0.1, 0.3), alpha_mean=0.0, alpha_std=1.0)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    rgba = RegionTransform(16, own)(Image.fromarray(pixels), np.eye(16))
    for channel, mean, std in zip(range(3), own.mean, own.std, strict=True):
        expected = (torch.from_numpy(pixels[..., channel]) / 255 - mean) / std
        torch.testing.assert_close(rgba[channel], expected)
    torch.testing.assert_close(rgba[3], torch.eye(16))
    assert own.whole_image == 1
    back = own.inverse(rgba)
    torch.testing.assert_close(back[:3], torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert Normalisation().whole_image == pytest.approx(1.923, abs=1e-3)


@pytest.mark.parametrize("image", [np.zeros((9, 9, 3), np.uint8), torch.zeros(3, 9, 9), "a.jpg"])
def test_only_pil_images_are_taken(image: Any) -> None:
    with pytest.raises(TypeError, match="expected a PIL image"):
        RegionTransform(16)(image)


def test_a_region_of_another_image_is_refused() -> None:
    with pytest.raises(ValueError, match="as large as the image"):
        RegionTransform(16)(Image.new("RGB", (20, 10)), np.ones((20, 10), bool))


def test_unknown_geometry_is_refused() -> None:
    with pytest.raises(ValueError, match=r"center_crop.*got 'stretch'"):
        RegionTransform(16, geometry="stretch")  # type: ignore[arg-type]


def test_repr_says_what_it_does() -> None:
    assert "size=16, geometry='pad'" in repr(RegionTransform(16, geometry="pad"))
