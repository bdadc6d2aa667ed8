"""Ways to point a CLIP at a region: the alpha channel, and what people do without one.

Most show the model another image, or mark the region in alpha; the last one changes where the tower
looks. All but the alphas point a plain CLIP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from alpha_clip.attention_masking import attending_to, check_tower
from alpha_clip.dense import dense_features, pool_boxes, pool_masks
from alpha_clip.late_alpha import LateAlpha
from alpha_clip.many_regions import encode_views, same_images
from alpha_clip.model import AlphaClip
from alpha_clip.regions import Box, Region
from alpha_clip.transforms import OPENAI_MEAN

log = logging.getLogger(__name__)

Mask: TypeAlias = NDArray[np.bool_]
Show: TypeAlias = Callable[..., tuple[Image.Image, Region]]
Background: TypeAlias = Callable[[Image.Image], Image.Image]
Encode: TypeAlias = Callable[[AlphaClip, Tensor], Tensor]

# ReCLIP, FGVP ("blur reverse mask") and Alpha-CLIP's REC all blur COCO's 640 px pictures with a
# standard deviation of 100 px (`blur_std_dev` in their executor.py).
_BLUR = 100 / 640
_RED = (255, 0, 0)


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
    return crop(_before(mean_colour(image), image, mask), mask, box)


def red_circle(image: Image.Image, mask: Mask, box: Box) -> tuple[Image.Image, Region]:
    """Draw a red ellipse around the box (Shtedritski et al., arXiv 2304.06712)."""
    drawn, where, width = _around(image, box)
    ImageDraw.Draw(drawn).ellipse(where, outline=_RED, width=width)
    return drawn, None


def red_box(image: Image.Image, mask: Mask, box: Box) -> tuple[Image.Image, Region]:
    """Draw a red rectangle around the box (ViP-LLaVA, arXiv 2312.00784)."""
    drawn, where, width = _around(image, box)
    ImageDraw.Draw(drawn).rectangle(where, outline=_RED, width=width)
    return drawn, None


def blurred(image: Image.Image) -> Image.Image:
    """Return an image blurred by 0.16 of its longer side (standard deviation)."""
    return image.convert("RGB").filter(ImageFilter.GaussianBlur(_BLUR * max(image.size)))


def colourless(image: Image.Image) -> Image.Image:
    """Return an image in shades of gray, RGB."""
    return image.convert("RGB").convert("L").convert("RGB")


def mean_colour(image: Image.Image) -> Image.Image:
    """Return an image of CLIP's mean colour."""
    red, green, blue = (round(255 * c) for c in OPENAI_MEAN)
    return Image.new("RGB", image.size, (red, green, blue))


def blur(
    image: Image.Image, mask: Mask, box: Box, background: Image.Image | None = None
) -> tuple[Image.Image, Region]:
    """Blur what is outside the mask; see `blurred`."""
    return _before(background or blurred(image), image, mask), None


def gray(
    image: Image.Image, mask: Mask, box: Box, background: Image.Image | None = None
) -> tuple[Image.Image, Region]:
    """Take the colour out of what is outside the mask (FGVP, arXiv 2306.04356)."""
    return _before(background or colourless(image), image, mask), None


def red_contour(image: Image.Image, mask: Mask, box: Box) -> tuple[Image.Image, Region]:
    """Draw a red line along the outside of the mask (ViP-LLaVA, arXiv 2312.00784)."""
    drawn = image.convert("RGB")
    shape = Image.fromarray(mask).convert("L")
    wider = np.asarray(shape.filter(ImageFilter.MaxFilter(2 * _line(image) + 1))) > 0
    drawn.paste(_RED, mask=Image.fromarray(wider & ~mask))
    return drawn, None


def masked_background(
    image: Image.Image, mask: Mask, box: Box, background: Image.Image | None = None
) -> tuple[Image.Image, Region]:
    """Mark the mask in alpha, and paint what is outside in CLIP's mean colour."""
    return _before(background or mean_colour(image), image, mask), mask


def alpha_blur(
    image: Image.Image, mask: Mask, box: Box, background: Image.Image | None = None
) -> tuple[Image.Image, Region]:
    """Mark the mask in alpha, and blur what is outside; see `blurred`."""
    return blur(image, mask, box, background)[0], mask


def alpha_gray(
    image: Image.Image, mask: Mask, box: Box, background: Image.Image | None = None
) -> tuple[Image.Image, Region]:
    """Mark the mask in alpha, and take the colour out of what is outside."""
    return gray(image, mask, box, background)[0], mask


def _before(background: Image.Image, image: Image.Image, mask: Mask) -> Image.Image:
    """Put what is inside a mask before a background."""
    drawn = background.copy()
    drawn.paste(image.convert("RGB"), mask=Image.fromarray(mask))
    return drawn


def _around(image: Image.Image, box: Box) -> tuple[Image.Image, tuple[int, int, int, int], int]:
    """Return an image to draw on, the first and last pixels of a frame, and its line's width."""
    width = _line(image)
    x1, y1, x2, y2 = box.pixels(image.height, image.width)
    return image.convert("RGB"), (x1 - width, y1 - width, x2 - 1 + width, y2 - 1 + width), width


def _line(image: Image.Image) -> int:
    """Return the width of a line in pixels: a hundredth of the longer side."""
    return max(1, round(0.01 * max(image.size)))


def encode_alpha(
    model: AlphaClip, rgba: Float[Tensor, "regions 4 height width"]
) -> Float[Tensor, "regions dim"]:
    """Embed regions the way the model was made for; returns features of length 1.

    With late alpha, views of one image that follow each other share the blocks before it.
    """
    if not isinstance(model.visual, LateAlpha):
        return model.encode_image(rgba, normalize=True)
    return F.normalize(encode_views(model.visual, rgba.to(model.dtype)), dim=-1)


def encode_masked(
    model: AlphaClip, rgba: Float[Tensor, "regions 4 height width"]
) -> Float[Tensor, "regions dim"]:
    """Embed the whole image, its class token attending to what alpha marks (MaskCLIP).

    Raises:
        ValueError: If the tower can't be masked; see `attending_to`.
    """
    with attending_to(model.visual, model.normalisation.inverse(rgba)[:, 3:]):
        return model.encode_image(rgba[:, :3], normalize=True)


def encode_mask_pooled(
    model: AlphaClip, rgba: Float[Tensor, "regions 4 height width"]
) -> Float[Tensor, "regions dim"]:
    """Pool the dense features of the whole image over what alpha marks.

    Raises:
        ValueError: If the tower has none; see `dense_features`.
    """
    return pool_masks(*_dense(model, rgba))


def encode_roi_aligned(
    model: AlphaClip, rgba: Float[Tensor, "regions 4 height width"]
) -> Float[Tensor, "regions dim"]:
    """Pool the dense features of the whole image in the box around what alpha marks.

    Raises:
        ValueError: If the tower has none; see `dense_features`.
    """
    return pool_boxes(*_dense(model, rgba))


def _dense(model: AlphaClip, rgba: Tensor) -> tuple[Tensor, Tensor]:
    """Return the dense features and the mask of each region; an image is passed once."""
    new, image = same_images(rgba[:, :3])
    whole = rgba[new].clone()
    whole[:, 3] = model.normalisation.whole_image
    dense = dense_features(model.visual, whole)
    return dense[image], model.normalisation.inverse(rgba)[:, 3:]


@dataclass(frozen=True)
class Focus:
    """A way to point.

    Attributes:
        show: Takes an image, a mask and a box; returns what the transform is given: an image, and
            the region that alpha marks (`None`: the whole of it).
        encode: Takes the model and what the transform makes of that; returns features of length 1.
        background: Makes what `show` puts behind, its fourth argument: once for all regions of an
            image.
    """

    show: Show
    encode: Encode = encode_alpha
    background: Background | None = None

    def show_all(
        self, image: Image.Image, masks: Sequence[Mask], boxes: Sequence[Box]
    ) -> list[tuple[Image.Image, Region]]:
        """Show each region of an image."""
        more = () if self.background is None else (self.background(image),)
        pairs = zip(masks, boxes, strict=True)
        return [self.show(image, mask, box, *more) for mask, box in pairs]


# They need a tower with a class token.
ATTENTION_MASK, MASK_POOLED, ROI_ALIGNED = "attention mask", "mask pooling", "RoIAlign"
FOCUS: dict[str, Focus] = {
    "no alpha": Focus(whole_image),
    "alpha": Focus(alpha_mask),
    "box alpha": Focus(alpha_box),
    "crop": Focus(crop),
    "masked crop": Focus(masked_crop),
    "masked background": Focus(masked_background, background=mean_colour),
    "alpha blur": Focus(alpha_blur, background=blurred),
    "alpha gray": Focus(alpha_gray, background=colourless),
    "red circle": Focus(red_circle),
    "red box": Focus(red_box),
    "red contour": Focus(red_contour),
    "blur": Focus(blur, background=blurred),
    "gray": Focus(gray, background=colourless),
    ATTENTION_MASK: Focus(alpha_mask, encode_masked),
    MASK_POOLED: Focus(alpha_mask, encode_mask_pooled),
    ROI_ALIGNED: Focus(alpha_box, encode_roi_aligned),
}


def check_focus(names: Sequence[str]) -> None:
    """Refuse ways of pointing that there are not, or none at all.

    Raises:
        ValueError: If there is none, or an unknown one.
    """
    if not names or set(names) - FOCUS.keys():
        raise ValueError(f"expected focus to be some of {list(FOCUS)}, got {list(names)}")


def ways_for(model: AlphaClip) -> list[str]:
    """Return the names of all ways that a model's tower allows; says in the log if one is out."""
    try:
        check_tower(model.visual)
    except ValueError as error:
        needy = (ATTENTION_MASK, MASK_POOLED, ROI_ALIGNED)
        log.warning("%s are left out: %s", ", ".join(needy), error)
        return [name for name in FOCUS if name not in needy]
    return list(FOCUS)
