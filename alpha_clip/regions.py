"""Regions: everything that can say "look here", and the one schema they are stored in.

`region_to_alpha` turns what a user holds (mask, box, polygon, RLE) into an alpha map. The stored
form, `RegionSample` with its codecs, the checked RLE and stored pictures have files of their own
and are exported here: this is the module that data pipelines import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from alpha_clip.jpegs import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_PX,
    SampleError,
    StoredImage,
    decode_jpeg,
    jpeg_size,
    read_image,
    read_picture,
    upright_size,
)
from alpha_clip.rle import decode_rle, encode_rle, rle_area
from alpha_clip.samples import PhraseKind, RegionAnnotation, RegionSample, pack_sample, parse_sample
from alpha_clip.sidecar import SidecarEntry, join_sidecar, pack_entry, parse_entry

if TYPE_CHECKING:  # data pipelines start faster without it
    import torch

__all__ = [
    "IMAGE_EXTENSIONS",
    "MAX_IMAGE_PX",
    "Box",
    "PhraseKind",
    "Region",
    "RegionAnnotation",
    "RegionSample",
    "SampleError",
    "SidecarEntry",
    "StoredImage",
    "decode_jpeg",
    "decode_rle",
    "encode_rle",
    "join_sidecar",
    "jpeg_size",
    "masks_to_alphas",
    "pack_entry",
    "pack_sample",
    "parse_entry",
    "parse_sample",
    "read_image",
    "read_picture",
    "region_to_alpha",
    "rle_area",
    "tensor_to_alpha",
    "upright_size",
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

PIL_ALPHA = ("LA", "PA", "RGBA")  # modes with a channel of their own for alpha
_PIL_MASKS = ("1", "L", "I", "I;16", "I;16B", "I;16L", "F")
_LIST = (
    "a list is read as COCO polygons, [[x1, y1, x2, y2, x3, y3, ...], ...] in pixels (for several "
    "regions of one image use RegionTransform.many or stack)"
)
_EMPTY = (
    "the region selects no pixel; pass None for the whole image (and RGB alone, of an image that "
    "has alpha itself)"
)


def region_to_alpha(region: Region, height: int, width: int) -> NDArray[np.uint8]:
    """Turn a region into an alpha map of an image.

    Args:
        region: Any of
            a mask `[H, W]`, also as `[1, H, W]` or `[H, W, 1]`, an array or a tensor: bool; whole
            numbers of any width, 0/1 or 0..255 (0/1 if none is above 1); floating, 0..1;
            a PIL image of mode `1`, `L`, `I`, `I;16` or `F` with values as above, or `LA`, `PA`
            or `RGBA` (the alpha channel of these);
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
    if hasattr(region, "is_floating_point"):  # a tensor; torch is not imported to ask
        mask = cast("torch.Tensor", region)
        return np.asarray(tensor_to_alpha(mask, height, width).cpu())
    if isinstance(region, Image.Image):
        region = _pil_mask(region)
    elif isinstance(region, Mapping):
        region = decode_rle(region)
    elif isinstance(region, Sequence) and not isinstance(region, str | bytes):
        region = _polygon_mask(region, height, width)
    if not isinstance(region, np.ndarray):
        raise TypeError(
            "a region must be a mask (array, tensor or PIL image), a COCO RLE dict, COCO polygons, "
            f"an alpha_clip.Box or None, got {type(region).__name__}"
        )
    return _mask_to_alpha(_squeeze(region, height, width))


def tensor_to_alpha(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Turn a mask tensor into an alpha `[H, W]` on its own device; see `region_to_alpha`.

    Raises:
        TypeError, ValueError: As `region_to_alpha` does.
    """
    return masks_to_alphas(_squeeze(mask, height, width))


def masks_to_alphas(masks: torch.Tensor) -> torch.Tensor:
    """Turn a mask `[H, W]` or masks `[B, 1, H, W]` into alphas, on their own device.

    Args:
        masks: Bool; whole numbers of any width, 0/1 or 0..255 (0/1 if none in the tensor is above
            1); floating, 0..1.

    Returns:
        Alphas of the same shape, uint8, 255 = look here; never the memory of `masks`.

    Raises:
        TypeError: If the masks are complex.
        ValueError: If a value is out of range or a mask selects no pixel.
    """
    import torch  # loaded already by who holds a tensor

    masks = masks.detach().as_subclass(torch.Tensor)  # a tv_tensors.Mask would resize hard-edged
    if masks.is_complex():
        raise TypeError(f"a mask must be bool, whole numbers or floating, got {masks.dtype}")
    if masks.is_floating_point():
        masks = masks.float()
        _check_range("f", *(float(v) for v in masks.aminmax()))
        alphas = masks.mul(255).round().byte()
    else:
        if masks.dtype not in (torch.bool, torch.uint8):
            masks = masks.long()  # uint16 and wider know hardly any arithmetic
        kind = "b" if masks.dtype == torch.bool else "i"
        low, high = (int(v) for v in masks.aminmax())
        alphas = masks.byte() * _check_range(kind, low, high)
    empty = (alphas.flatten(-2).amax(-1) == 0).flatten().nonzero().flatten().tolist()
    if empty:
        which = f" (images {empty} of the batch)" if alphas.ndim > 2 else ""
        raise ValueError(_EMPTY + which)
    return alphas


def _mask_to_alpha(mask: NDArray[Any]) -> NDArray[np.uint8]:
    alpha: NDArray[np.uint8]
    if mask.dtype.kind not in "biuf":
        raise TypeError(f"a mask must be bool, whole numbers or floating, got {mask.dtype}")
    if mask.dtype == bool:  # every stored mask: nothing to check
        alpha = np.multiply(mask, 255, dtype=np.uint8)
    elif mask.dtype.kind == "f":
        _check_range("f", float(mask.min()), float(mask.max()))
        alpha = np.round(mask * 255).astype(np.uint8)
    else:
        scale = _check_range(mask.dtype.kind, int(mask.min()), int(mask.max()))
        alpha = mask.astype(np.uint8) * np.uint8(scale)
    if not alpha.any():
        raise ValueError(_EMPTY)
    return alpha


def _check_range(kind: str, low: float, high: float) -> int:
    """Return what a mask's values are multiplied by; `kind` is that of a NumPy dtype."""
    if kind == "f" and not (low >= 0 and high <= 1):  # true for NaN, too
        raise ValueError(
            f"a floating mask must lie in 0..1, got {low:g}..{high:g}; the model's normalisation "
            "is applied by the transform, not before (of logits, take the sigmoid)"
        )
    if kind != "f" and (low < 0 or high > 255):
        raise ValueError(
            f"a mask of whole numbers must be 0/1 or 0..255, got {low}..{high}; of a label map "
            "pass one label (labels == 3), or scale the values"
        )
    return 255 if high <= 1 else 1


def _squeeze(mask: Any, height: int, width: int) -> Any:
    """Return a mask, array or tensor, as `[H, W]`, without a leftover axis of 1."""
    exact = (height, width)
    if tuple(mask.shape) not in (exact, (1, *exact), (*exact, 1), (1, 1, *exact)):
        raise ValueError(
            f"the mask must be as large as the image, [H, W] = {[height, width]}, got "
            f"{list(mask.shape)}; resize it with nearest neighbour, or pass one mask at a time"
        )
    return mask.reshape(exact)


def _pil_mask(image: Image.Image) -> NDArray[Any]:
    if image.mode in PIL_ALPHA:
        return np.asarray(image.getchannel("A"))
    if image.mode in _PIL_MASKS:
        return np.asarray(image)
    raise ValueError(
        "a PIL mask must have mode 1, L, I, I;16 or F, or an alpha channel (LA, PA, RGBA), got "
        f"{image.mode}; make it grey with convert('L'), or compare np.asarray(mask) with one label"
    )


def _polygon_mask(polygons: Sequence[Any], height: int, width: int) -> NDArray[np.bool_]:
    """Rasterise COCO polygons (their union), after checking what pycocotools takes on trust."""
    flat = bool(polygons) and isinstance(polygons[0], float | int | np.number)
    parts = [polygons] if flat else polygons
    checked = []
    for part in parts:
        points = _points(part)
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


def _points(part: Any) -> NDArray[np.float64]:
    """Return a polygon's numbers in a row; NumPy would read a list of masks as one, too."""
    try:
        points = np.asarray(part, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{_LIST}, got {type(part).__name__} in it") from error
    if points.ndim != 1 and points.shape[1:] not in ((2,), (1, 2)):  # the latter are OpenCV's
        raise TypeError(f"{_LIST}, got {type(part).__name__} of shape {list(points.shape)} in it")
    return points.reshape(-1)
