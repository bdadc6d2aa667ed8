from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from alpha_clip.geometry import pad_to_square
from alpha_clip.pictures import split_channels
from alpha_clip.regions import Box, encode_rle
from alpha_clip.transforms import (
    Normalisation,
    RegionAugment,
    RegionTransform,
)

GEOMETRIES = ["center_crop", "pad", "squash"]  # that share one picture among regions
ALL = [*GEOMETRIES, "crop_box"]
SIZE = 64
PLAIN = Normalisation((0.0,) * 3, (1.0,) * 3, alpha_mean=0.0, alpha_std=1.0)


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


@pytest.mark.parametrize("geometry", ALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_extreme_shapes(geometry: Any, size: tuple[int, int]) -> None:
    rgba = RegionTransform(16, geometry=geometry)(Image.new("RGB", size, "white"))
    assert rgba.shape == (4, 16, 16)
    assert rgba.isfinite().all()
    assert float(rgba[3].max()) == pytest.approx(Normalisation().whole_image)
    image = Image.new("RGB", size)
    middle = Box(size[0] // 2, size[1] // 2, size[0] // 2 + 1, size[1] // 2 + 1)
    assert RegionTransform(16, PLAIN, geometry)(image, middle)[3].max() >= 0.5


def test_alpha_does_not_overshoot() -> None:
    mask = np.indices((37, 53)).sum(0) % 7 < 3
    for geometry in GEOMETRIES:
        rgba = RegionTransform(90, geometry=geometry)(Image.new("RGB", (53, 37)), mask)  # type: ignore[arg-type]
        assert -1.9231 < float(rgba[3].min())
        assert float(rgba[3].max()) < 1.9231


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "I;16"])
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


def test_a_region_of_another_image_is_refused() -> None:
    with pytest.raises(ValueError, match="as large as the image"):
        RegionTransform(16)(Image.new("RGB", (20, 10)), np.ones((20, 10), bool))


def test_unknown_geometry_is_refused() -> None:
    with pytest.raises(ValueError, match=r"center_crop.*got 'stretch'"):
        RegionTransform(16, geometry="stretch")  # type: ignore[arg-type]


def test_repr_says_what_it_does() -> None:
    assert "size=16, geometry='pad', inter" in repr(RegionTransform(16, geometry="pad", scale=2))
    assert "'crop_box', scale=2, inter" in repr(RegionTransform(16, geometry="crop_box", scale=2))


def test_replace_keeps_the_other_arguments() -> None:
    transform = RegionTransform(16, PLAIN, "crop_box", 2.0, "bilinear")
    other = transform.replace(geometry="pad")
    assert repr(other.replace(geometry="crop_box")) == repr(transform)
    assert (other.geometry, transform.geometry) == ("pad", "crop_box")


@pytest.mark.parametrize("geometry", ALL)
def test_interpolation_is_that_of_colour(geometry: Any) -> None:
    """Alpha stays bilinear; the grey picture of a mask is then what its alpha is."""
    mask = np.zeros((40, 60), np.uint8)
    mask[10:25, 20:45] = 255
    image = np.repeat(mask[..., None], 3, axis=2)
    bicubic = RegionTransform(32, PLAIN, geometry)(image, mask)
    bilinear = RegionTransform(32, PLAIN, geometry, interpolation="bilinear")(image, mask)
    assert torch.equal(bicubic[3], bilinear[3])
    assert torch.equal(bilinear[0], bilinear[3])
    assert not torch.equal(bicubic[0], bilinear[0])
    augment = RegionAugment(32, PLAIN, scale=(1, 1), interpolation="bilinear")
    rgb, alphas = augment.many(image, [mask])
    assert torch.equal(rgb[0], alphas[0, 0])


def test_unknown_interpolation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bicubic.*got 'nearest'"):
        RegionTransform(16, interpolation="nearest")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.99, -2, float("nan"), float("inf")])
def test_a_window_smaller_than_the_region_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be finite and at least 1"):
        RegionTransform(16, geometry="crop_box", scale=scale)


def pictures() -> dict[str, tuple[Any, float]]:
    """One picture in every form, with how far its colours may be off, in 0..1."""
    y, x, channel = np.indices((50, 70, 3))
    # Smooth: where bicubic overshoots, uint8 is cut off after each direction, float32 at the end.
    pixels = (128 + 90 * np.sin(y / 5 + channel) * np.cos(x / 6)).astype(np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    rounded = 1.5 / 255  # as is rounding
    return {
        "array": (pixels, 0),
        "read-only array": (np.broadcast_to(pixels, pixels.shape), 0),
        "array of BGR": (pixels[..., ::-1].copy()[..., ::-1], 0),
        "tensor": (tensor, 0),
        "contiguous tensor": (tensor.contiguous(), 0),
        "tv_tensors.Image": (tv_tensors.Image(tensor), 0),
        "float array": (pixels / 255, rounded),
        "float32": (tensor / 255, rounded),
        "float64": (tensor.double() / 255, rounded),
        "float16": (tensor.half() / 255, rounded),
        "bfloat16": (tensor.bfloat16() / 255, rounded + 2**-9),
    }


@pytest.mark.parametrize("geometry", ALL)
@pytest.mark.parametrize("form", pictures())
def test_every_form_of_an_image_gives_the_same(geometry: Any, form: str) -> None:
    transform = RegionTransform(32, Normalisation((0.4,) * 3, (1.0,) * 3), geometry)
    box = Box(20, 10, 60, 30)
    expected = transform(Image.fromarray(pictures()["array"][0]), box)
    image, tolerance = pictures()[form]
    rgba = transform(image, box)
    assert rgba.dtype == torch.float32
    assert torch.equal(rgba[3], expected[3])
    torch.testing.assert_close(rgba[:3], expected[:3], rtol=0, atol=tolerance)
    if isinstance(image, torch.Tensor):
        assert torch.equal(transform(image[None], [box])[0], rgba)


def test_tv_tensors_are_tensors() -> None:
    """Their own resizing is nearest for masks."""
    image, soft = pictures()["tensor"][0], torch.rand(50, 70)
    for geometry in ALL:
        transform = RegionTransform(32, geometry=geometry)  # type: ignore[arg-type]
        expected = transform(image, soft)
        with tv_tensors.set_return_type("TVTensor"):
            rgba = transform(tv_tensors.Image(image), tv_tensors.Mask(soft))
        assert type(rgba) is torch.Tensor
        assert torch.equal(rgba, expected)


def with_alpha() -> dict[str, tuple[Any, Any, np.ndarray]]:
    """Images that hold their region: the image, the same without, the region."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    grey = Image.fromarray(pixels[..., 0])
    mask = rng.integers(0, 256, (40, 60), dtype=np.uint8)
    mask[:, :25] = 0
    rgb, alpha = Image.fromarray(pixels), Image.fromarray(mask)
    both = np.dstack([pixels, mask])
    tensor = torch.from_numpy(both).permute(2, 0, 1)
    palette, clear = Image.fromarray(pixels[..., 0] % 8).convert("P"), palette_with_alpha(8)
    palette.putpalette(pixels[0, :8].tobytes())
    opaque = palette.copy()
    palette.info["transparency"] = clear.tobytes()
    in_palette = clear[pixels[..., 0] % 8]
    key = palette.copy()
    key.info["transparency"] = 3
    return {
        "RGBA": (Image.fromarray(both), rgb, mask),
        "LA": (Image.merge("LA", [grey, alpha]), grey, mask),
        "PA": (palette.convert("PA"), opaque, in_palette),
        "P": (palette, opaque, in_palette),
        "P with a key": (key, opaque, pixels[..., 0] % 8 != 3),
        "array": (both, pixels, mask),
        "float array": (both / 255, pixels / 255, mask),
        "tensor": (tensor, tensor[:3], mask),
        "float tensor": (tensor / 255, tensor[:3] / 255, mask),
    }


def palette_with_alpha(colours: int) -> np.ndarray:
    return np.array([0, 255, 0, 128, 255, 7, 0, 90][:colours], np.uint8)


@pytest.mark.parametrize("geometry", ALL)
@pytest.mark.parametrize("form", with_alpha())
def test_an_images_own_alpha_is_its_region(geometry: Any, form: str) -> None:
    """And colours under alpha 0 come out as they were stored."""
    image, opaque, mask = with_alpha()[form]
    transform = RegionTransform(32, geometry=geometry)
    assert torch.equal(transform(image), transform(opaque, mask))
    assert torch.equal(transform(image, Box(9, 9, 30, 20)), transform(opaque, Box(9, 9, 30, 20)))
    if isinstance(image, torch.Tensor):
        batch = torch.stack([image, image.flip(-1)])
        both = torch.stack([transform(image), transform(image.flip(-1))])
        assert torch.equal(transform(batch), both)
        expected = torch.stack([transform(image), transform(opaque.flip(-1), mask)])
        assert torch.equal(transform(batch, [None, mask]), expected)


@pytest.mark.parametrize("geometry", ALL)
def test_opaque_is_the_whole_image_and_clear_is_refused(geometry: Any) -> None:
    transform = RegionTransform(16, geometry=geometry)
    image = Image.new("RGB", (30, 20), (9, 200, 30))
    assert torch.equal(transform(image.convert("RGBA")), transform(image))
    image.putalpha(0)
    with pytest.raises(ValueError, match="RGB alone, of an image that has alpha itself"):
        transform(image)
    assert torch.equal(
        transform(image, Box(0, 0, 9, 9)), transform(image.convert("RGB"), Box(0, 0, 9, 9))
    )


MASKS = torch.zeros(3, 20, 30, dtype=torch.bool)
MASKS[0, 3:9, 5:28] = MASKS[1, 2:4, 9:20] = MASKS[2, :, 14:16] = True
PER_IMAGE: dict[str, Any] = {
    "nothing": None,
    "bool": MASKS,
    "uint8 0/1": MASKS.byte(),
    "int64": MASKS.long() * 200,
    "bfloat16": MASKS.bfloat16()[:, None] * 0.3,
    "float64": MASKS.double() * 0.7,
    "array": MASKS.numpy(),
    "list": list(MASKS),
    "mixed": [None, Box(4, 2, 20, 19), encode_rle(MASKS[2].numpy())],
    "tuple": ([[12.0, 1.0, 20.0, 1.0, 16.0, 15.0]], MASKS[1].float(), MASKS[2].numpy()),
}


@pytest.mark.parametrize("geometry", ALL)
@pytest.mark.parametrize("regions", PER_IMAGE.values(), ids=PER_IMAGE.keys())
def test_a_batch_equals_its_images(geometry: Any, regions: Any) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 20, 30), np.uint8))
    transform = RegionTransform(24, geometry=geometry)
    rgba = transform(images, regions)
    each = [None] * 3 if regions is None else regions
    one_by_one = [transform(image, region) for image, region in zip(images, each, strict=True)]
    assert torch.equal(rgba, torch.stack(one_by_one))


@pytest.mark.parametrize("geometry", ALL)
def test_stack_equals_one_by_one(geometry: Any) -> None:
    image, mask = rectangle(np.random.default_rng(1))
    transform = RegionTransform(32, geometry=geometry)
    regions = [mask, None, Box(20, 20, 30, 39)]
    stacked = transform.stack(image, regions)
    assert torch.equal(stacked, torch.stack([transform(image, region) for region in regions]))


def test_many_refuses_a_window_for_each_region() -> None:
    with pytest.raises(ValueError, match=r"use stack\(image, regions\)"):
        RegionTransform(16, geometry="crop_box").many(Image.new("RGB", (9, 9)), [None])


def test_crop_box_shows_the_region_and_its_surroundings() -> None:
    """A region of 20 px at twice its size in 40 px: nothing is resized."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    transform = RegionTransform(40, PLAIN, "crop_box", scale=2)
    rgba = transform(pixels, Box(60, 34, 80, 46))
    shown = torch.from_numpy(pixels).permute(2, 0, 1)[:, 20:60, 50:90]
    torch.testing.assert_close(rgba[:3], shown / 255)
    assert rgba[3, 14:26, 10:30].min() == 1
    assert rgba[3].sum() == 12 * 20
    corner = transform(pixels, Box(0, 90, 20, 100))  # the window moves into the picture
    torch.testing.assert_close(
        corner[:3], torch.from_numpy(pixels).permute(2, 0, 1)[:, 60:, :40] / 255
    )


@pytest.mark.parametrize("form", ["uint8", "float"])
def test_crop_box_pads_what_lies_beyond_the_image(form: str) -> None:
    image = torch.full((3, 20, 80), 255, dtype=torch.uint8)
    image = image / 255 if form == "float" else image
    rgba = RegionTransform(32, geometry="crop_box", scale=1)(image, Box(20, 3, 60, 18))
    picture = Normalisation().inverse(rgba)
    assert (rgba[:3, :8].abs().max(), rgba[:3, 24:].abs().max()) < (0.01, 0.01)
    torch.testing.assert_close(picture[:3, 8:24], torch.ones(3, 16, 32))
    assert picture[3, :8].max() == picture[3, 24:].max() == 0
    whole = RegionTransform(32, geometry="crop_box", scale=2)(image)
    torch.testing.assert_close(whole, RegionTransform(32, geometry="pad")(image))


def test_a_pixel_of_a_large_photo_is_still_seen() -> None:
    image = Image.new("L", (2000, 1500))
    hard, soft = np.zeros((1500, 2000), np.uint8), np.zeros((1500, 2000))
    hard[700, 1000], soft[701, 990] = 255, 0.6
    usual = np.zeros((1500, 2000), bool)
    usual[300:800, 600:1100] = True
    for geometry in GEOMETRIES:
        transform = RegionTransform(64, PLAIN, geometry)  # type: ignore[arg-type]
        alphas = transform.many(image, [hard, usual, soft])[1]
        assert alphas[0].max() == 1
        assert float(alphas[2].max()) == pytest.approx(0.6)
        assert (alphas[0] > 0).sum() <= 9
        assert torch.equal(alphas[1], transform.many(image, [usual])[1][0])
    alphas = RegionAugment(64, PLAIN, scale=(0.8, 1.0)).many(image, [hard, soft])[1]
    assert alphas.amax((1, 2, 3)).tolist() == pytest.approx([1, 0.6])


def test_a_region_cut_away_is_said_once_and_not_refused() -> None:
    image, edge = Image.new("RGB", (90, 30)), Box(0, 0, 20, 30)
    transform = RegionTransform(30, PLAIN)
    with pytest.warns(UserWarning, match="center_crop cut a region away.*'pad' or 'squash'"):
        alphas = transform.many(image, [None, edge])[1]
    assert alphas.amax((1, 2, 3)).tolist() == [1, 0]
    assert transform(image, edge)[3].max() == 0  # a second warning would be an error here
    with pytest.warns(UserWarning, match="cut a region away"):
        RegionTransform(30)(torch.zeros(2, 3, 30, 90), [None, edge])
    for geometry in ("pad", "squash", "crop_box"):
        assert RegionTransform(30, PLAIN, geometry)(image, edge)[3].max() == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_callers_image_is_not_changed(dtype: torch.dtype) -> None:
    """Not even where nothing is resized, and tensors could be passed through."""
    image = torch.ones(4, 16, 16, dtype=dtype)
    for geometry in ALL:
        RegionTransform(16, geometry=geometry, scale=1)(image)  # type: ignore[arg-type]
        RegionTransform(16, geometry=geometry, scale=1)(image[None])  # type: ignore[arg-type]
    RegionAugment(16, scale=(1, 1), jitter=0.5).many(image, [None])
    assert torch.equal(image, torch.ones(4, 16, 16, dtype=dtype))


def test_augment_takes_tensors() -> None:
    image, mask = rectangle(np.random.default_rng(3))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    augment = RegionAugment(SIZE, PLAIN, scale=(0.5, 1), flip=0.5, jitter=0.4)
    results = []
    for picture in (image, pixels, pixels / 255):
        torch.manual_seed(0)
        results.append(augment.many(picture, [mask]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][0], results[2][0], rtol=0, atol=0.03)
    assert torch.equal(results[0][1], results[2][1])


@pytest.mark.parametrize("geometry", ["squash", "pad", "center_crop"])
def test_training_images_become_square_as_evaluation_does(geometry: Any) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8))
    masks = [Box(5, 5, 20, 25), Box(20, 3, 45, 20)]
    augment = RegionAugment(16, scale=(1.0, 1.0), geometry=geometry)
    evaluate = RegionTransform(16, geometry=geometry)
    for ours, theirs in zip(augment.many(image, masks), evaluate.many(image, masks), strict=True):
        assert torch.equal(ours, theirs)
