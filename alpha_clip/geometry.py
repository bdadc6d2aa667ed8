"""Geometry: colour and alpha moved as one.

Colour (3 channels) is resized bicubically as CLIP's is (some towers want it bilinear), alpha (one
channel) with antialiased bilinear, which can't overshoot. PIL's RGBA is never resized: it
premultiplies, and what lies under alpha 0 turns black.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from alpha_clip.mask_stack import MaskStack

Geometry = Literal["center_crop", "pad", "squash", "crop_box"]
SharedGeometry = Literal["center_crop", "pad", "squash"]
"""The geometries that move all regions of an image in one way."""
Interpolation = Literal["bicubic", "bilinear"]
RGB = tuple[float, float, float]
Part: TypeAlias = Shaped[Tensor, "*batch channels height width"]


class Window(NamedTuple):
    """A square of the image, in pixels; it may reach beyond the image's edges."""

    top: int
    left: int
    side: int


def resize(
    part: Part, target: list[int], colour: Interpolation = "bicubic"
) -> Shaped[Tensor, "*batch channels new_height new_width"]:
    """Resize colour (3 channels) or alpha (1 channel, bilinearly) to `[height, width]`."""
    if part.shape[-3] == 1:
        return _resize_alpha(part, target)
    resized = _interpolate(part, target, InterpolationMode(colour))
    # torchvision cuts off bicubic's overshoot for uint8 only.
    return resized.clamp(0, 1) if resized.is_floating_point() else resized


def _resize_alpha(alphas: Tensor, target: list[int]) -> Tensor:
    """Resize alphas; one that all but vanishes is scaled until its peak is what it was.

    A pixel of a 2000 px photo would round to nothing, or to less than a tower can see.
    """
    large = alphas.reshape(-1, *alphas.shape[-3:])
    if large.device.type == "cpu":
        # torch resizes up to four channels of one image at once, but images one after the other.
        fours = [
            _interpolate(some.transpose(0, 1), target, InterpolationMode.BILINEAR)
            for some in large.split(4)
        ]
        small = torch.cat(fours, 1).transpose(0, 1)
    else:
        small = _interpolate(large, target, InterpolationMode.BILINEAR)
    peaks_now = small.flatten(1).amax(1).int()
    if int(peaks_now.min()) < 128:  # else none was halved, and the large ones need no look
        peaks = large.flatten(1).amax(1)
        lost = 2 * peaks_now < peaks  # never if the size is kept: then `small` is the caller's
        if bool(lost.any()):
            fine = _interpolate(large[lost].float(), target, InterpolationMode.BILINEAR)
            scale = peaks[lost] / fine.flatten(1).amax(1)
            small[lost] = (fine * scale.view(-1, 1, 1, 1)).round().byte()
    return small.reshape(*alphas.shape[:-2], *target)


def _interpolate(part: Tensor, target: list[int], mode: InterpolationMode) -> Tensor:
    # To a width of 1, torch 2.15 repeats the first row of floats on CPU: lay them down.
    lie = target[1] == 1 and target[0] > 1 and part.is_floating_point()
    if lie:
        part, target = part.mT, target[::-1]
    if part.ndim == 3 and part.stride(0) == 1:
        # Cut out of an image whose channels lie together: torch wants its rows together, too.
        part = part.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    resized: Tensor = F.resize(part, target, mode, antialias=True)
    return resized.mT if lie else resized


def make_square(
    part: Part | MaskStack,
    size: int,
    geometry: Geometry,
    fill: RGB,
    colour: Interpolation = "bicubic",
) -> Shaped[Tensor, "*batch channels size size"]:
    """Make colour or alpha square, by a geometry that needs no region.

    Args:
        part: Colour or alpha.
        size: Side of the result, in pixels.
        geometry: `center_crop`, `pad` or `squash`.
        fill: Colour (0..1) of what `pad` adds.
        colour: How to interpolate colour.
    """
    if isinstance(part, MaskStack):
        how = (size, geometry, fill, colour)
        fours = [make_square(torch.from_numpy(four)[:, None], *how) for four in part.fours()]
        return torch.cat(fours)[: part.shape[0]]
    if geometry == "squash":
        return resize(part, [size, size], colour)
    if geometry == "pad":
        return pad_to_square(part, size, fill, colour)
    height, width = part.shape[-2:]
    short = min(height, width)
    # CLIP's own rounding: the shorter side exactly, the longer one cut to whole pixels.
    target = [size * height // short, size * width // short]
    middle: Tensor = F.center_crop(resize(part, target, colour), [size, size])
    return middle


def pad_to_square(
    part: Part, size: int, fill: RGB, colour: Interpolation = "bicubic"
) -> Shaped[Tensor, "*batch channels size size"]:
    """Fit colour or alpha into a square: resize, pad evenly.

    Colour is padded with `fill` (0..1), alpha with 0: there is nothing to look at.
    """
    height, width = part.shape[-2:]
    scale = size / max(height, width)
    target = [max(1, round(height * scale)), max(1, round(width * scale))]
    top, left = (size - target[0]) // 2, (size - target[1]) // 2
    return _place(resize(part, target, colour), size, top, left, fill)


def window_around(alpha: UInt8[Tensor, "1 height width"], scale: float) -> Window:
    """Return the square around what is marked, inside the image wherever it fits.

    Args:
        alpha: Alpha with at least one pixel above 0.
        scale: Side of the square, relative to the longer side of the region's bounding box; it is
            never longer than the longer side of the image, which shows all of it.
    """
    height, width = alpha.shape[-2:]
    rows = alpha[0].amax(1).nonzero()
    columns = alpha[0].amax(0).nonzero()
    y1, y2 = int(rows[0]), int(rows[-1]) + 1
    x1, x2 = int(columns[0]), int(columns[-1]) + 1
    side = min(max(1, round(scale * max(y2 - y1, x2 - x1))), max(height, width))
    return Window(_inside(y1 + y2, side, height), _inside(x1 + x2, side, width), side)


def _inside(double_centre: int, side: int, limit: int) -> int:
    """Return where the window starts: in `0..limit`, or, if it is longer, around all of that."""
    start = (double_centre - side) // 2
    return min(max(start, min(0, limit - side)), max(0, limit - side))


def cut_window(
    part: Part, window: Window, size: int, fill: RGB, colour: Interpolation = "bicubic"
) -> Shaped[Tensor, "*batch channels size size"]:
    """Cut a window out of colour or alpha, resize it, and pad what lies beyond the image.

    Args:
        part: Colour or alpha.
        window: What to show; it overlaps the image.
        size: Side of the result, in pixels.
        fill: Colour (0..1) of what lies beyond the image; alpha is 0 there.
        colour: How to interpolate colour.
    """
    height, width = part.shape[-2:]
    y1, y2 = max(window.top, 0), min(window.top + window.side, height)
    x1, x2 = max(window.left, 0), min(window.left + window.side, width)
    scale = size / window.side
    target = [max(1, round((y2 - y1) * scale)), max(1, round((x2 - x1) * scale))]
    # Padded after resizing: at full size, the square of a narrow panorama may not fit in memory.
    top = min(round((y1 - window.top) * scale), size - target[0])
    left = min(round((x1 - window.left) * scale), size - target[1])
    return _place(resize(part[..., y1:y2, x1:x2], target, colour), size, top, left, fill)


def _place(part: Tensor, size: int, top: int, left: int, fill: RGB) -> Tensor:
    height, width = part.shape[-2:]
    values = [0.0]
    if part.shape[-3] == 3:
        values = list(fill) if part.is_floating_point() else [float(round(255 * c)) for c in fill]
    edges = [left, top, size - width - left, size - height - top]
    padded: Tensor = F.pad(part, edges, fill=values)
    return padded
