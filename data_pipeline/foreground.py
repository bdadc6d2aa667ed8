"""Cut-outs: an object of a picture by itself, as CLIP scores it and a captioner describes it.

The paper cropped, centred and enlarged the foreground, and put it on white to be captioned
(Alpha-CLIP, arXiv 2312.03818, section 3.1). How large, it does not say; the defaults are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Background: TypeAlias = Literal["white", "clip_mean", "image"] | tuple[int, int, int]
"""What surrounds a cut-out: a colour, RGB 0..255 if not by name; `image` keeps what is there."""

_COLOURS = {
    "white": (255, 255, 255),
    "clip_mean": (123, 117, 104),  # CLIP's mean (0.4815, 0.4578, 0.4082): zeros to most CLIPs
}


@dataclass(frozen=True)
class Foreground:
    """A cut-out.

    Attributes:
        rgb: Square picture `[S, S, 3]`, uint8, of the object on its background.
        mask: Bool `[S, S]`, the same size: True on the object; never empty.
    """

    rgb: NDArray[np.uint8]
    mask: NDArray[np.bool_]


def cut_out(
    rgb: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    background: Background = "white",
    size_px: int = 224,
    fill: float = 0.8,
    max_enlarge: float = 8.0,
) -> Foreground:
    """Crop an object, centre it in a square and bring it to size.

    Beyond the picture's border is the background's colour, and CLIP's mean where `background` is
    `image`.

    Args:
        rgb: Picture `[H, W, 3]`.
        mask: The object, `[H, W]`; at least one pixel.
        background: What replaces everything outside the mask.
        size_px: Side of the cut-out.
        fill: Share of the square's side that the longer side of the object takes, at most; the
            rest is its margin.
        max_enlarge: An object is never enlarged more than this; a tiny one stays small.

    Raises:
        ValueError: If the mask is empty or of another size than the picture, or a setting is out
            of its range.
    """
    cv2.setNumThreads(1)  # processes share the cores; threads in each would only fight
    colour = _check(rgb, mask, background, size_px, fill, max_enlarge)
    x, y, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    if not width:
        raise ValueError("the mask is empty: there is nothing to cut out; drop such masks before")
    longer = max(width, height)
    # Of the square, in pixels of the picture.
    side = max(math.ceil(longer / fill), math.ceil(size_px / max_enlarge))
    left, top = x + (width - side) // 2, y + (height - side) // 2
    pixels, inside = _window(rgb, left, top, side, colour), _window(mask, left, top, side, 0)
    if background != "image":
        # Before resizing, so that no pixel of the surroundings is mixed into the object's edge.
        canvas = np.empty_like(pixels)
        canvas[:] = colour
        pixels = cv2.copyTo(pixels, inside, canvas)
    # Cubic is sharper, but draws a dark ring inside the edge of a small object on white.
    kind = cv2.INTER_AREA if side > size_px else cv2.INTER_LINEAR
    resized = cv2.resize(pixels, (size_px, size_px), interpolation=kind)
    share = cv2.resize(inside * np.uint8(255), (size_px, size_px), interpolation=kind)
    # A line can be thinner than half a pixel of the cut-out.
    return Foreground(resized, share >= min(128, int(share.max())))


def _window(
    pixels: NDArray[np.uint8] | NDArray[np.bool_],
    left: int,
    top: int,
    side: int,
    border: int | tuple[int, int, int],
) -> NDArray[np.uint8]:
    """Return a square of a picture or mask, filled up with `border` where it leaves it."""
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    part = np.ascontiguousarray(pixels[y1:y2, x1:x2]).view(np.uint8)
    edges = (y1 - top, top + side - y2, x1 - left, left + side - x2)
    filled: NDArray[np.uint8] = cv2.copyMakeBorder(part, *edges, cv2.BORDER_CONSTANT, value=border)
    return filled


def _check(
    rgb: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    background: Background,
    size_px: int,
    fill: float,
    max_enlarge: float,
) -> tuple[int, int, int]:
    """Refuse what can't be cut out; return the colour around the picture."""
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"expected a picture [H, W, 3] of uint8, got {rgb.shape} of {rgb.dtype}")
    if mask.shape != rgb.shape[:2] or mask.dtype != np.bool_:
        raise ValueError(
            f"expected a mask {list(rgb.shape[:2])} of bool, as large as its picture, got "
            f"{list(mask.shape)} of {mask.dtype}"
        )
    if size_px < 1 or not 0 < fill <= 1 or not 0 < max_enlarge < math.inf:
        raise ValueError(
            "size_px must be at least 1, fill in (0, 1] and max_enlarge positive and finite, got "
            f"{size_px}, {fill} and {max_enlarge}"
        )
    if isinstance(background, str):
        if background != "image" and background not in _COLOURS:
            raise ValueError(
                f"background must be white, clip_mean, image or three numbers, got {background!r}"
            )
        return _COLOURS.get(background, _COLOURS["clip_mean"])
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise ValueError(f"background must be RGB of 0..255, got {background}")
    return background
