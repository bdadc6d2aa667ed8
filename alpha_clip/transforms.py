"""Image and alpha, moved together: one decode, one set of geometry parameters, two interpolations.

The image is resized bicubically as CLIP's is, alpha with antialiased bilinear, which can't
overshoot. PIL's RGBA is avoided throughout: it premultiplies, and what lies under alpha 0 turns
black.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from alpha_clip.regions import Region, region_to_alpha

ALPHA_MEAN = 0.5  # what published weights expect: (alpha - 0.5) / 0.26
ALPHA_STD = 0.26
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

Geometry = Literal["center_crop", "pad", "squash"]


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of RGB and alpha, all in 0..1."""

    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    alpha_mean: float = ALPHA_MEAN
    alpha_std: float = ALPHA_STD

    def rgb(self, pixels: UInt8[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
        """Normalise colour, 0..255."""
        rgb: Tensor = F.normalize(pixels.float().div_(255), list(self.mean), list(self.std))
        return rgb

    def alpha(self, alpha: UInt8[Tensor, "*batch 1 height width"]) -> Float[Tensor, ...]:
        """Normalise alpha, 0..255; the whole image becomes `(1 - 0.5) / 0.26`."""
        return alpha.float().div_(255).sub_(self.alpha_mean).div_(self.alpha_std)

    @property
    def whole_image(self) -> float:
        """The normalised alpha of a pixel to look at."""
        return (1.0 - self.alpha_mean) / self.alpha_std

    def inverse(self, rgba: Float[Tensor, "4 height width"]) -> Float[Tensor, "4 height width"]:
        """Undo the normalisation, for pictures; returns values in 0..1."""
        mean = rgba.new_tensor([*self.mean, self.alpha_mean]).view(-1, 1, 1)
        std = rgba.new_tensor([*self.std, self.alpha_std]).view(-1, 1, 1)
        return (rgba * std + mean).clamp(0, 1)


def split_channels(
    image: Image.Image, regions: list[Region]
) -> tuple[UInt8[Tensor, "3 height width"], UInt8[Tensor, "regions 1 height width"]]:
    """Return an image and the alphas of its regions as uint8 tensors.

    Args:
        image: Any PIL image; it is read as RGB.
        regions: What to look at, in the coordinates of `image`; at least one.

    Raises:
        TypeError, ValueError: As `region_to_alpha` does; `TypeError` if `image` is no PIL image.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"expected a PIL image, got {type(image).__name__}; use PIL.Image.open or "
            "PIL.Image.fromarray"
        )
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    alphas = np.stack([region_to_alpha(r, image.height, image.width) for r in regions])
    return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(alphas)[:, None]


def _resize(channels: Tensor, size: list[int]) -> Tensor:
    """Resize colour `[3, H, W]` bicubically, alphas `[regions, 1, H, W]` bilinearly."""
    mode = InterpolationMode.BICUBIC if channels.shape[-3] == 3 else InterpolationMode.BILINEAR
    resized: Tensor = F.resize(channels, size, mode, antialias=True)
    return resized


class RegionTransform:
    """Turn an image and a region into the normalised RGBA tensor that an alpha tower takes.

    Args:
        size: Side of the result, in pixels.
        normalisation: Mean and standard deviation of the tower it feeds.
        geometry: `center_crop` resizes the shorter side and cuts the middle out (CLIP's own);
            `pad` pads to a square with the mean colour and alpha 0, then resizes (nothing is cut);
            `squash` resizes both sides to `size`, giving up the aspect ratio.

    Raises:
        ValueError: If the geometry is unknown.
    """

    def __init__(
        self,
        size: int,
        normalisation: Normalisation | None = None,
        geometry: Geometry = "center_crop",
    ) -> None:
        if geometry not in get_args(Geometry):
            raise ValueError(f"geometry must be one of {get_args(Geometry)}, got {geometry!r}")
        self.size = size
        self.normalisation = normalisation or Normalisation()
        self.geometry = geometry

    def __call__(self, image: Image.Image, region: Region = None) -> Float[Tensor, "4 size size"]:
        """Return RGB and the region's alpha, aligned and normalised.

        Args:
            image: Any PIL image; it is read as RGB.
            region: What to look at, in the coordinates of `image`; `None` is the whole image.

        Raises:
            TypeError, ValueError: If the region does not fit the image; see `region_to_alpha`.
        """
        rgb, alphas = self.many(image, [region])
        return torch.cat([rgb, alphas[0]])

    def many(
        self, image: Image.Image, regions: list[Region]
    ) -> tuple[Float[Tensor, "3 size size"], Float[Tensor, "regions 1 size size"]]:
        """Return the image once and the alpha of each of its regions, for `encode_regions`.

        Raises:
            TypeError, ValueError: As calling the transform does.
        """
        rgb, alphas = (self._fit(part) for part in split_channels(image, regions))
        return self.normalisation.rgb(rgb), self.normalisation.alpha(alphas)

    def _fit(self, part: Tensor) -> Tensor:
        size = self.size
        if self.geometry == "squash":
            return _resize(part, [size, size])
        if self.geometry == "center_crop":
            height, width = part.shape[-2:]
            short = min(height, width)
            # CLIP's own rounding: the shorter side exactly, the longer one cut to whole pixels.
            target = [size * height // short, size * width // short]
            part = F.center_crop(_resize(part, target), [size, size])
            return part
        return pad_to_square(part, size, self.normalisation.mean)

    def __repr__(self) -> str:
        return (
            f"RegionTransform(size={self.size}, geometry={self.geometry!r}, "
            f"normalisation={self.normalisation})"
        )


def pad_to_square(part: Tensor, size: int, colour: tuple[float, float, float]) -> Tensor:
    """Fit colour `[3, H, W]` or alphas `[regions, 1, H, W]` into a square: resize, pad evenly.

    Colour is padded with `colour` (0..1), alpha with 0: there is nothing to look at.
    """
    height, width = part.shape[-2:]
    scale = size / max(height, width)
    target = [max(1, round(height * scale)), max(1, round(width * scale))]
    small = _resize(part, target)
    top, left = (size - target[0]) // 2, (size - target[1]) // 2
    fill = [round(255 * c) for c in colour] if part.shape[-3] == 3 else [0]
    edges = [left, top, size - target[1] - left, size - target[0] - top]
    padded: Tensor = F.pad(small, edges, fill=[float(v) for v in fill])
    return padded


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
    ) -> None:
        self.size = size
        self.normalisation = normalisation or Normalisation()
        self.crop = None if scale == (1.0, 1.0) else v2.RandomResizedCrop(size, scale, ratio)
        self.flip = flip
        self.jitter = v2.ColorJitter(jitter, jitter, jitter) if jitter else None
        self.min_kept = min_kept

    def many(
        self, image: Image.Image, regions: list[Region]
    ) -> tuple[Float[Tensor, "3 size size"], Float[Tensor, "regions 1 size size"]]:
        """As `RegionTransform.many`, with random geometry shared by the image and its regions."""
        rgb, alphas = split_channels(image, regions)
        if self.crop is not None:
            rgb, alphas = self._crop(rgb, alphas, self.crop)
        rgb, alphas = (_resize(part, [self.size, self.size]) for part in (rgb, alphas))
        if float(torch.rand(())) < self.flip:
            rgb, alphas = rgb.flip(-1), alphas.flip(-1)
        if self.jitter is not None:
            rgb = self.jitter(rgb)
        return self.normalisation.rgb(rgb), self.normalisation.alpha(alphas)

    def _crop(
        self, rgb: Tensor, alphas: Tensor, crop: v2.RandomResizedCrop
    ) -> tuple[Tensor, Tensor]:
        """Cut one window out of both, unless it would cut too much of a region away."""
        window = crop.make_params([rgb])
        cut = F.crop(alphas, **window)
        kept = cut.sum((1, 2, 3), dtype=torch.int64)
        if (kept < self.min_kept * alphas.sum((1, 2, 3), dtype=torch.int64)).any():
            return rgb, alphas
        return F.crop(rgb, **window), cut
