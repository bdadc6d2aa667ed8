"""Ways to point a CLIP at a region: the alpha channel, and what people do without one.

Each takes an image and a region and returns what the transform is given: another image, and the
region that alpha marks (`None`: the whole of it). The last three point any plain CLIP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from alpha_clip.regions import Box, Region
from alpha_clip.transforms import OPENAI_MEAN

Mask: TypeAlias = NDArray[np.bool_]
Focus: TypeAlias = Callable[[Image.Image, Mask, Box], tuple[Image.Image, Region]]


def whole_image(image: Image.Image, mask: Mask, box: Box) -> tuple[Image.Image, Region]:
    """Do not point at all."""
    return image, None


def alpha_mask(image: Image.Image, mask: Mask, box: Box) -> tuple[Image.Image, Region]:
    """Mark the mask in the alpha channel."""
    return image, mask


def alpha_box(image: Image.Image, mask: Mask, box: Box) -> tuple[Image.Image, Region]:
    """Mark the box in the alpha channel."""
    return image, box


def crop(image: Image.Image, mask: Mask, box: Box) -> tuple[Image.Image, Region]:
    """Cut the box out and lose the rest."""
    return image.crop(box.pixels(image.height, image.width)), None


def masked_crop(image: Image.Image, mask: Mask, box: Box) -> tuple[Image.Image, Region]:
    """Cut the box out and paint what is outside the mask in CLIP's mean colour."""
    pixels = np.array(image.convert("RGB"))
    pixels[~mask] = [round(255 * c) for c in OPENAI_MEAN]
    return crop(Image.fromarray(pixels), mask, box)


def red_circle(image: Image.Image, mask: Mask, box: Box) -> tuple[Image.Image, Region]:
    """Draw a red ellipse around the box (Shtedritski et al., arXiv 2304.06712)."""
    drawn = image.convert("RGB")
    width = max(1, round(0.01 * max(image.size)))
    x1, y1, x2, y2 = box.pixels(image.height, image.width)
    around = (x1 - width, y1 - width, x2 - 1 + width, y2 - 1 + width)
    ImageDraw.Draw(drawn).ellipse(around, outline=(255, 0, 0), width=width)
    return drawn, None


FOCUS: dict[str, Focus] = {
    "no alpha": whole_image,
    "alpha": alpha_mask,
    "box alpha": alpha_box,
    "crop": crop,
    "masked crop": masked_crop,
    "red circle": red_circle,
}
