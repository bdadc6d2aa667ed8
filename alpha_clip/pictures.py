"""Pictures: what a user holds, split into colour and alpha tensors.

Colour is `[*, 3, H, W]`, uint8 0..255 or floating 0..1; alpha is `[*, 1, H, W]`, uint8. An image's
own alpha, from a fourth channel or from a PIL mode that has one, is its region where none is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from alpha_clip.regions import (
    PIL_ALPHA,
    Region,
    masks_to_alphas,
    region_to_alpha,
    tensor_to_alpha,
)

Picture: TypeAlias = "Image.Image | NDArray[Any] | Tensor"
"""A PIL image, an array `[H, W, 3]` or a tensor `[3, H, W]`; 4 channels hold alpha, too."""


def split_channels(
    image: Picture, regions: Sequence[Region]
) -> tuple[Shaped[Tensor, "3 height width"], UInt8[Tensor, "regions 1 height width"]]:
    """Return an image (uint8 0..255, or float32 0..1 if it was floating) and its regions' alphas.

    Args:
        image: One image; see `RegionTransform`.
        regions: What to look at, in the coordinates of `image`; at least one.

    Raises:
        TypeError, ValueError: If the image is none, or as `region_to_alpha` does.
    """
    rgb, own = _read(image)
    if rgb.ndim != 3:
        raise ValueError(
            f"expected one image and its regions, got a batch of shape {list(rgb.shape)}; call the "
            "transform itself with a batch and one region for each of its images"
        )
    if len(regions) == 0:
        raise ValueError("expected at least one region, got none; [None] is the whole image")
    alphas = [_alpha(own if r is None else r, rgb, image) for r in regions]
    return rgb, torch.stack(alphas)[:, None]


def split_batch(
    images: Shaped[Tensor, "batch channels height width"], regions: Region | Sequence[Region]
) -> tuple[Shaped[Tensor, "batch 3 height width"], UInt8[Tensor, "batch 1 height width"]]:
    """Return colours and alphas of a batch of images with one region each.

    Args:
        images: A batch; see `RegionTransform`.
        regions: `None`, masks `[B, H, W]` or `[B, 1, H, W]`, or a sequence of B regions.

    Raises:
        TypeError, ValueError: As `split_channels` does, or if the two do not fit together.
    """
    rgb, own = _read(images)
    batch, _, *size = rgb.shape
    regions = own if regions is None else regions
    if regions is None:
        return rgb, torch.full((batch, 1, *size), 255, dtype=torch.uint8, device=rgb.device)
    if isinstance(regions, Tensor):
        if list(regions.shape) not in ([batch, *size], [batch, 1, *size]):
            raise ValueError(
                f"masks of a batch must be as many and as large as its images, {[batch, *size]} "
                f"or {[batch, 1, *size]}, got {list(regions.shape)}"
            )
        _check_device(regions, images)
        return rgb, masks_to_alphas(regions.reshape(batch, 1, *size))
    if isinstance(regions, str | bytes) or not isinstance(regions, Sequence | np.ndarray):
        raise TypeError(
            f"a batch takes masks {[batch, *size]}, a sequence of {batch} regions or None, got "
            f"{type(regions).__name__}; repeat one region with [region] * {batch}"
        )
    if len(regions) != batch:
        raise ValueError(
            f"a batch of {batch} images takes {batch} regions, got {len(regions)}; for many "
            "regions of one image use RegionTransform.many or stack"
        )
    owned: Any = [None] * batch if own is None else own
    pairs = zip(regions, owned, strict=True)
    return rgb, torch.stack([_alpha(o if r is None else r, rgb, images) for r, o in pairs])[:, None]


def _alpha(region: Region, rgb: Tensor, image: Picture) -> UInt8[Tensor, "height width"]:
    """Return a region's alpha where `rgb` is; a mask that is there already does not travel."""
    height, width = rgb.shape[-2:]
    if not isinstance(region, Tensor):
        return torch.from_numpy(region_to_alpha(region, height, width)).to(rgb.device)
    if isinstance(image, Tensor):
        _check_device(region, image)
    return tensor_to_alpha(region, height, width).to(rgb.device)


def _check_device(mask: Tensor, image: Tensor) -> None:
    if mask.device != image.device:
        raise ValueError(
            f"expected the mask on the image's device, {image.device}, got {mask.device}; move it "
            "with mask.to(image.device)"
        )


def _read(image: Picture) -> tuple[Shaped[Tensor, "*batch 3 height width"], Tensor | None]:
    """Return colour, uint8 or float32 0..1, and the alpha `[*, H, W]` that the image itself has."""
    if isinstance(image, Image.Image):
        # From a palette, PIL's way to RGB drops transparency with a warning; RGBA keeps the colour.
        clear = image.mode in PIL_ALPHA or (image.mode == "P" and "transparency" in image.info)
        mode = "RGBA" if clear else "RGB"
        image = np.array(image if image.mode == mode else image.convert(mode))
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] not in (3, 4):
            raise ValueError(
                f"an image array must be [H, W, 3] or [H, W, 4], got {list(image.shape)}; pass "
                "grey ones through PIL.Image.fromarray, batches as tensors [B, 3, H, W]"
            )
        image = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise TypeError(
            f"expected a PIL image, an array or a tensor, got {type(image).__name__}; open files "
            "with PIL.Image.open(path), stack lists with torch.stack"
        )
    if image.ndim not in (3, 4) or image.shape[-3] not in (3, 4) or not image.numel():
        raise ValueError(
            "an image tensor must be [3, H, W], or [4, H, W] with alpha, or a batch of such, got "
            f"{list(image.shape)}; bring channels last to the front with permute, expand grey to 3"
        )
    image = image.as_subclass(Tensor)
    if image.is_floating_point():
        image = image.float()
        low, high = (float(v) for v in image.detach().aminmax())
        if not (low >= 0 and high <= 1):  # true for NaN, too
            raise ValueError(
                f"a floating image must lie in 0..1, got {low:g}..{high:g}; already normalised? "
                "The transform does that. Divide 0..255 by 255, or make it uint8"
            )
    elif image.dtype != torch.uint8:
        raise TypeError(f"an image must be uint8 0..255 or floating 0..1, got {image.dtype}")
    return image[..., :3, :, :], image[..., 3, :, :] if image.shape[-3] == 4 else None
