"""Image and alpha, moved together: one decode, one set of geometry parameters, two interpolations.

Where the pixels go is `alpha_clip.geometry`'s part; here are normalisation and the two transforms,
one for use and one for training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from alpha_clip.geometry import (
    Geometry,
    Interpolation,
    SharedGeometry,
    cut_window,
    make_square,
    window_around,
)
from alpha_clip.mask_stack import MaskStack
from alpha_clip.pictures import Picture, split_batch, split_channels
from alpha_clip.regions import Region

ALPHA_MEAN = 0.5  # what published weights expect: (alpha - 0.5) / 0.26
ALPHA_STD = 0.26
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of RGB and alpha, all in 0..1."""

    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    alpha_mean: float = ALPHA_MEAN
    alpha_std: float = ALPHA_STD

    def rgb(self, pixels: Shaped[Tensor, "*batch 3 height width"]) -> Float[Tensor, ...]:
        """Normalise colour, uint8 0..255 or floating 0..1."""
        ours = not pixels.is_floating_point()  # then it may be changed in place
        # Where the three values of each pixel lie together, the arithmetic takes twice as long.
        unit = pixels.contiguous().float().div_(255) if ours else pixels
        rgb: Tensor = F.normalize(unit, list(self.mean), list(self.std), inplace=ours)
        return rgb

    def alpha(self, alpha: UInt8[Tensor, "*batch 1 height width"]) -> Float[Tensor, ...]:
        """Normalise alpha, 0..255; the whole image becomes `(1 - 0.5) / 0.26`."""
        return alpha.float().div_(255).sub_(self.alpha_mean).div_(self.alpha_std)

    @property
    def whole_image(self) -> float:
        """The normalised alpha of a pixel to look at."""
        return (1.0 - self.alpha_mean) / self.alpha_std

    def inverse(self, rgba: Float[Tensor, "*batch 4 height width"]) -> Float[Tensor, ...]:
        """Undo the normalisation, for pictures; returns values in 0..1."""
        mean = rgba.new_tensor([*self.mean, self.alpha_mean]).view(-1, 1, 1)
        std = rgba.new_tensor([*self.std, self.alpha_std]).view(-1, 1, 1)
        return (rgba * std + mean).clamp(0, 1)


class RegionTransform:
    """Turn an image and a region into the normalised RGBA tensor that an alpha tower takes.

    Images may be PIL images of any mode, arrays `[H, W, 3]`, tensors `[3, H, W]` or batches of such
    tensors, uint8 0..255 or floating 0..1. Where no region is given, an image's own alpha is its
    region: a fourth channel, PIL modes RGBA, LA and PA, transparency of P. Colour under alpha 0 is
    kept.

    Args:
        size: Side of the result, in pixels.
        normalisation: Mean and standard deviation of the tower it feeds.
        geometry: `center_crop` resizes the shorter side and cuts the middle out (CLIP's own);
            `pad` pads to a square with the mean colour and alpha 0, then resizes (nothing is cut);
            `squash` resizes both sides to `size`, giving up the aspect ratio;
            `crop_box` cuts out a square around the region, shifted into the image where it fits and
            padded as by `pad` where it does not.
        scale: Side of that square, relative to the longer side of the region's bounding box, at
            least 1; the other geometries do not use it.
        interpolation: Of colour: `bicubic` (CLIP's own) or `bilinear`, as some towers expect it.

    Raises:
        ValueError: If the geometry or the interpolation is unknown, or the scale below 1 or not
            finite.
    """

    def __init__(
        self,
        size: int,
        normalisation: Normalisation | None = None,
        geometry: Geometry = "center_crop",
        scale: float = 1.5,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        if geometry not in get_args(Geometry):
            raise ValueError(f"geometry must be one of {get_args(Geometry)}, got {geometry!r}")
        if not (math.isfinite(scale) and scale >= 1):
            raise ValueError(f"scale must be finite and at least 1 (the region's box), got {scale}")
        if interpolation not in get_args(Interpolation):
            raise ValueError(
                f"interpolation must be one of {get_args(Interpolation)}, got {interpolation!r}"
            )
        self.size = size
        self.normalisation = normalisation or Normalisation()
        self.geometry = geometry
        self.scale = scale
        self.interpolation = interpolation
        self._warned = False

    def replace(self, **changes: Any) -> RegionTransform:
        """Return a transform with some arguments changed: `transform.replace(geometry="pad")`."""
        names = ("size", "normalisation", "geometry", "scale", "interpolation")
        return RegionTransform(**{**{name: getattr(self, name) for name in names}, **changes})

    def __call__(
        self, image: Picture, region: Region | Sequence[Region] = None
    ) -> Float[Tensor, "*batch 4 size size"]:
        """Return RGB and the region's alpha, aligned and normalised, on the image's device.

        Args:
            image: An image, or a batch of images `[B, 3 or 4, H, W]`.
            region: What to look at, in the coordinates of `image`; see `region_to_alpha`. `None` is
                the image's own alpha, else the whole image. For a batch, masks `[B, H, W]` or
                `[B, 1, H, W]` (one range of values for all) or a sequence of B regions of any kind.

        Returns:
            `[4, S, S]`, or `[B, 4, S, S]` for a batch. A region too small to survive resizing keeps
            its peak; one that `center_crop` cuts away leaves alpha 0, with one warning.

        Raises:
            TypeError, ValueError: If the image is malformed, or the region does not fit it.
        """
        if isinstance(image, Tensor) and image.ndim == 4:
            return self._views(*split_batch(image, region))
        return self.stack(image, [cast(Region, region)])[0]

    def many(
        self, image: Picture, regions: Sequence[Region]
    ) -> tuple[Float[Tensor, "3 size size"], Float[Tensor, "regions 1 size size"]]:
        """Return the image once and the alpha of each of its regions, for `encode_regions`.

        Raises:
            TypeError, ValueError: As calling the transform does; `ValueError` for `crop_box`.
        """
        if self.geometry == "crop_box":
            raise ValueError(
                "many shares one picture among all regions, but crop_box cuts a window for each; "
                "use stack(image, regions), which gives [regions, 4, size, size]"
            )
        rgb, alphas = (self._fit(part) for part in _split(image, regions))
        return self.normalisation.rgb(rgb), self.normalisation.alpha(alphas)

    def stack(
        self, image: Picture, regions: Sequence[Region]
    ) -> Float[Tensor, "regions 4 size size"]:
        """Return an RGBA tensor for each region of an image, by any geometry.

        Raises:
            TypeError, ValueError: As calling the transform does.
        """
        return self._views(*split_channels(image, regions))

    def _views(self, rgb: Tensor, alphas: Tensor) -> Tensor:
        """Pair one image, or as many as there are alphas, with the alphas."""
        views = len(alphas)
        if self.geometry == "crop_box":
            cuts = [
                self._cut(c, a) for c, a in zip(rgb.expand(views, -1, -1, -1), alphas, strict=True)
            ]
            rgb, alphas = (torch.stack(parts) for parts in zip(*cuts, strict=True))
        else:
            rgb, alphas = self._fit(rgb), self._fit(alphas)
        rgb = self.normalisation.rgb(rgb).expand(views, -1, -1, -1)
        return torch.cat([rgb, self.normalisation.alpha(alphas)], dim=1)

    def _cut(self, rgb: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        window = window_around(alpha, self.scale)
        how = (window, self.size, self.normalisation.mean, self.interpolation)
        return cut_window(rgb, *how), cut_window(alpha, *how)

    def _fit(self, part: Tensor | MaskStack) -> Tensor:
        square = make_square(
            part, self.size, self.geometry, self.normalisation.mean, self.interpolation
        )
        cuts = self.geometry == "center_crop" and part.shape[-1] != part.shape[-2]
        if cuts and part.shape[-3] == 1 and not self._warned:
            if not bool(square.flatten(1).any(1).all()):
                self._warned = True
                warnings.warn(
                    "center_crop cut a region away entirely: its alpha is 0 everywhere; use the "
                    "geometry 'pad' or 'squash' (this is said once for each transform)",
                    stacklevel=4,
                )
        return square

    def __repr__(self) -> str:
        scale = f"scale={self.scale}, " if self.geometry == "crop_box" else ""
        return (
            f"RegionTransform(size={self.size}, geometry={self.geometry!r}, {scale}"
            f"interpolation={self.interpolation!r}, normalisation={self.normalisation})"
        )


class RegionAugment:
    """Training geometry and colour: one random crop and flip for the image and all its alphas.

    Args:
        size: Side of the result, in pixels.
        normalisation: Mean and standard deviation of the tower that is trained.
        scale: Range of the crop's area as a share of the image's; `(1, 1)` never crops.
        ratio: Range of the crop's aspect ratio, relative to a square.
        flip: Probability of a horizontal flip. Leave it at 0 where phrases say left or right.
        jitter: Strength of brightness, contrast and saturation jitter of the RGB channels.
        min_kept: A crop must keep this share of every region's alpha, else the whole image is used.
        interpolation: Of colour, as the tower expects it.
        geometry: What makes the crop, or the whole image, square.
    """

    def __init__(
        self,
        size: int,
        normalisation: Normalisation | None = None,
        scale: tuple[float, float] = (0.6, 1.0),
        ratio: tuple[float, float] = (0.8, 1.25),
        flip: float = 0.0,
        jitter: float = 0.0,
        min_kept: float = 0.7,
        interpolation: Interpolation = "bicubic",
        geometry: SharedGeometry = "squash",
    ) -> None:
        self.size = size
        self.normalisation = normalisation or Normalisation()
        self.geometry = geometry
        self.crop = None if scale == (1.0, 1.0) else v2.RandomResizedCrop(size, scale, ratio)
        self.flip = flip
        self.jitter = v2.ColorJitter(jitter, jitter, jitter) if jitter else None
        self.min_kept = min_kept
        self.interpolation = interpolation

    def many(
        self, image: Picture, regions: Sequence[Region]
    ) -> tuple[Float[Tensor, "3 size size"], Float[Tensor, "regions 1 size size"]]:
        """As `RegionTransform.many`, with random geometry shared by the image and its regions."""
        rgb, alphas = _split(image, regions)
        if self.crop is not None:
            rgb, alphas = self._crop(rgb, alphas, self.crop)
        how = (self.size, self.geometry, self.normalisation.mean, self.interpolation)
        square, marked = (make_square(part, *how) for part in (rgb, alphas))
        if float(torch.rand(())) < self.flip:
            square, marked = square.flip(-1), marked.flip(-1)
        if self.jitter is not None:
            square = self.jitter(square)
        return self.normalisation.rgb(square), self.normalisation.alpha(marked)

    def _crop(
        self, rgb: Tensor, alphas: Tensor | MaskStack, crop: v2.RandomResizedCrop
    ) -> tuple[Tensor, Tensor | MaskStack]:
        """Cut one window out of both, unless it would cut too much of a region away."""
        window = crop.make_params([rgb])
        cut: Tensor | MaskStack
        cut = alphas.crop(**window) if isinstance(alphas, MaskStack) else F.crop(alphas, **window)
        kept, whole = (_areas(part) for part in (cut, alphas))
        if (kept < self.min_kept * (1 - 1e-6) * whole).any():
            return rgb, alphas
        return F.crop(rgb, **window), cut


def _split(image: Picture, regions: Sequence[Region]) -> tuple[Tensor, Tensor | MaskStack]:
    """As `split_channels`, but stored masks of an RGB picture are left as runs."""
    stored = [r for r in regions if r is None or isinstance(r, Mapping)]
    if isinstance(image, Image.Image) and image.mode == "RGB" and 0 < len(stored) == len(regions):
        masks = MaskStack.of(stored, image.height, image.width)
        if masks is not None:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1), masks
    return split_channels(image, regions)  # which says what is wrong with a mask, if that is why


def _areas(alphas: Tensor | MaskStack) -> Tensor:
    if isinstance(alphas, MaskStack):
        return torch.from_numpy(alphas.areas())
    return alphas.float().sum((1, 2, 3))  # quicker than of uint8
