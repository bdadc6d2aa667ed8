"""Regions: everything that can say "look here", and the one schema they are stored in.

`region_to_alpha` turns what a user holds (mask, box, polygon, RLE) into an alpha map. The stored
form, `RegionSample` with its codec, and the checked RLE have files of their own and are exported
here: this is the module that data pipelines import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from alpha_clip.rle import decode_rle, encode_rle, rle_area
from alpha_clip.samples import (
    MAX_IMAGE_PX,
    PhraseKind,
    RegionAnnotation,
    RegionSample,
    SampleError,
    jpeg_size,
    pack_sample,
    parse_sample,
)

if TYPE_CHECKING:  # data pipelines start faster without it
    import torch

__all__ = [
    "MAX_IMAGE_PX",
    "Box",
    "PhraseKind",
    "Region",
    "RegionAnnotation",
    "RegionSample",
    "SampleError",
    "decode_rle",
    "encode_rle",
    "jpeg_size",
    "pack_sample",
    "parse_sample",
    "region_to_alpha",
    "rle_area",
]


@dataclass(frozen=True)
class Box:
    """A box in pixels: `x1, y1` top left, `x2, y2` bottom right (exclusive), `0, 0` a corner.

    Raises:
        ValueError: If a coordinate is not finite or the box has no area.
    """

    x1: float
    y1: float
    x2: float
    y2: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) for v in (self.x1, self.y1, self.x2, self.y2)):
            raise ValueError(f"box coordinates must be finite pixels, got {self}")
        if self.x2 <= self.x1 or self.y2 <= self.y1:
            raise ValueError(
                f"a box needs x1 < x2 and y1 < y2, got {self}; "
                "from [x, y, width, height] use Box(x, y, x + width, y + height)"
            )

    def pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return `x1, y1, x2, y2` of the pixels whose centres are inside, at least one.

        Raises:
            ValueError: If the box lies outside an image of `height` x `width`.
        """
        if self.x1 >= width or self.y1 >= height or self.x2 <= 0 or self.y2 <= 0:
            raise ValueError(f"{self} lies outside the image of {width} x {height} px (W x H)")
        x1 = min(max(math.ceil(self.x1 - 0.5), 0), width - 1)
        y1 = min(max(math.ceil(self.y1 - 0.5), 0), height - 1)
        x2 = max(min(math.ceil(self.x2 - 0.5), width), x1 + 1)
        y2 = max(min(math.ceil(self.y2 - 0.5), height), y1 + 1)
        return x1, y1, x2, y2


Region: TypeAlias = (
    "NDArray[Any] | torch.Tensor | Image.Image | Mapping[str, Any] | Sequence[float]"
    " | Sequence[Sequence[float]] | Box | None"
)
"""A mask `[H, W]`, PIL mask, COCO RLE, COCO polygons, `Box`, or `None` for the whole image."""


def region_to_alpha(region: Region, height: int, width: int) -> NDArray[np.uint8]:
    """Turn a region into an alpha map of an image.

    Args:
        region: Any of
            a mask `[H, W]`: bool; whole numbers, 0/1 or 0..255; floating, 0..1;
            a PIL image of mode `1`, `L`, `LA` or `RGBA` (the alpha channel of the last two);
            a COCO RLE `{"size", "counts"}`, compressed or not;
            COCO polygons `[[x1, y1, x2, y2, x3, y3, ...], ...]` in pixels;
            a `Box`; or `None`, which means the whole image.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.

    Returns:
        Alpha `[H, W]`, 255 = look here.

    Raises:
        TypeError: If `region` is none of these.
        ValueError: If it does not fit the image, is malformed, or selects no pixel.
    """
    if region is None:
        return np.full((height, width), 255, np.uint8)
    if isinstance(region, Box):
        alpha = np.zeros((height, width), np.uint8)
        x1, y1, x2, y2 = region.pixels(height, width)
        alpha[y1:y2, x1:x2] = 255
        return alpha
    if isinstance(region, Image.Image):
        region = _pil_mask(region)
    elif hasattr(region, "is_floating_point"):
        region = _tensor_mask(region)
    elif isinstance(region, Mapping):
        region = decode_rle(region)
    elif isinstance(region, Sequence) and not isinstance(region, str | bytes):
        region = _polygon_mask(region, height, width)
    if not isinstance(region, np.ndarray):
        raise TypeError(
            "a region must be a mask (array, tensor or PIL image), a COCO RLE dict, COCO polygons, "
            f"an alpha_clip.Box or None, got {type(region).__name__}"
        )
    return _mask_to_alpha(region, height, width)


def _mask_to_alpha(mask: NDArray[Any], height: int, width: int) -> NDArray[np.uint8]:
    if mask.shape != (height, width):
        raise ValueError(
            f"the mask must be as large as the image, [H, W] = {[height, width]}, got "
            f"{list(mask.shape)}; resize it with nearest neighbour, or squeeze extra axes"
        )
    alpha: NDArray[np.uint8]
    if mask.dtype == np.bool_:
        alpha = mask.astype(np.uint8) * np.uint8(255)
    elif np.issubdtype(mask.dtype, np.integer):
        low, high = int(mask.min()), int(mask.max())
        if low < 0 or high > 255:
            raise ValueError(f"a mask of whole numbers must be 0/1 or 0..255, got {low}..{high}")
        alpha = mask.astype(np.uint8) * np.uint8(255 if high <= 1 else 1)
    elif np.issubdtype(mask.dtype, np.floating):
        least, most = float(mask.min()), float(mask.max())
        if not (least >= 0 and most <= 1):  # false for NaN, too
            raise ValueError(
                f"a floating mask must lie in 0..1, got {least}..{most}; the model's normalisation "
                "is applied by the transform, not before"
            )
        alpha = np.round(mask * 255).astype(np.uint8)
    else:
        raise TypeError(f"a mask must be bool, whole numbers or floating, got {mask.dtype}")
    if not alpha.any():
        raise ValueError("the region selects no pixel; pass None for the whole image")
    return alpha


def _tensor_mask(tensor: Any) -> NDArray[Any]:
    """Read a torch tensor without importing torch."""
    tensor = tensor.detach().cpu()
    return np.asarray(tensor.float() if tensor.is_floating_point() else tensor)  # bfloat16, too


def _pil_mask(image: Image.Image) -> NDArray[Any]:
    if image.mode in ("LA", "RGBA"):
        return np.asarray(image.getchannel("A"))
    if image.mode in ("1", "L"):
        return np.asarray(image)
    raise ValueError(f"a PIL mask must have mode 1, L, LA or RGBA, got {image.mode}")


def _polygon_mask(polygons: Sequence[Any], height: int, width: int) -> NDArray[np.bool_]:
    """Rasterise COCO polygons (their union), after checking what pycocotools takes on trust."""
    parts = [polygons] if polygons and np.ndim(polygons[0]) == 0 else polygons
    checked = []
    for part in parts:
        points = np.asarray(part, np.float64).reshape(-1)
        if points.size < 6 or points.size % 2:
            raise ValueError(
                "a polygon needs at least 3 points as [x1, y1, x2, y2, x3, y3, ...], got "
                f"{points.size} numbers; for a box use alpha_clip.Box"
            )
        limit = 4.0 * max(height, width)
        if not np.isfinite(points).all() or np.abs(points).max() > limit:
            raise ValueError(f"polygon points must be finite pixels near the image, got {part}")
        checked.append(points.tolist())
    if not checked:
        raise ValueError("expected at least one polygon, got an empty list")
    rles = coco_mask.frPyObjects(checked, height, width)
    return decode_rle(coco_mask.merge(rles))
