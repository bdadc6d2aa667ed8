"""What multimodal models with an alpha tower are given: pictures with regions.

A model's own processor cuts, pads and stacks its pictures, and puts in the tokens that stand for
them, in a way of its own; alpha goes that very way. The processor is therefore asked three times:
for the pictures, for marks in their place, and for black pictures. Whatever lies between an input
and an output pixel is linear but for a background, and that is what black shows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from alpha_clip.regions import Region, region_to_alpha

# Marks come out as they went in, but for the geometry; bicubic would overshoot.
_PLAIN = {
    "do_normalize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "resample": Image.Resampling.BILINEAR,
}
_Nested = Callable[[list[Image.Image]], list[Any]]


class RegionProcessor:
    """A multimodal model's processor, for pictures with regions.

    Alpha goes through the very geometry of the picture: resized, cropped, padded and, in models
    such as LLaVA-NeXT or Gemma 3, cut into tiles with it. What is padded belongs to no region.

    Args:
        processor: transformers' processor of the model, such as `LlavaProcessor`.
        directory: The export that the model got: it tells how alpha is normalised.

    Raises:
        ValueError: If the export does not tell.
    """

    def __init__(self, processor: Any, directory: str | Path) -> None:
        self.processor = processor
        file = Path(directory) / "preprocessor_config.json"
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            self._mean, self._std = record["image_mean"][3], record["image_std"][3]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{file} does not say how alpha is normalised; expected an export with 4 channels; "
                f"{error}"
            ) from error

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]],
        regions: Any = None,
        text: str | Sequence[str] | None = None,
        **more: Any,
    ) -> Any:
        """Make a model's inputs.

        Args:
            images: One picture, or several; or a list of them for each text, for processors that
                want that.
            regions: The region of the one picture, or a list with one for each, nested as the
                pictures are: whatever `region_to_alpha` takes; `None` is the whole picture.
            text: As of the model's processor, with its image tokens.
            more: As of the model's processor, such as `return_tensors`, which is `pt` here.

        Returns:
            What the model's processor returns, `pixel_values` with alpha as the fourth channel.

        Raises:
            ValueError: If there is not one region for each picture, or one does not fit, or there
                are videos.
        """
        if more.get("videos") is not None:
            raise ValueError("expected pictures alone, got videos; give their frames as images")
        pictures, given, nested = _flat(images, regions)

        def ask(shown: list[Image.Image], more: dict[str, Any]) -> Any:
            # Before transformers 5, processors take out of dictionaries what they use.
            again = copy.deepcopy({**more, "text": text, "return_tensors": "pt"})
            return self.processor(images=nested(shown), **again)

        inputs = ask([picture.convert("RGB") for picture in pictures], more)
        plain = _plain(more)
        marks = [_mark(p, region) for p, region in zip(pictures, given, strict=True)]
        black = [Image.new("RGB", picture.size) for picture in pictures]
        shown, background = (ask(drawn, plain)["pixel_values"] for drawn in (marks, black))
        inputs["pixel_values"] = self._with_alpha(inputs["pixel_values"], shown - background)
        return inputs

    def _with_alpha(
        self, pixel_values: Float[Tensor, "*tiles 3 height width"], marks: Tensor
    ) -> Float[Tensor, "*tiles 4 height width"]:
        """Append alpha, made of what `_mark` drew."""
        alpha, whole, picture = marks.to(pixel_values).clamp(0, 1).unbind(-3)
        rgb, alpha = pixel_values.flatten(0, -4), alpha.flatten(0, -3).clone()
        whole, picture = (t.flatten(0, -3).flatten(1).amax(1) > 0 for t in (whole, picture))
        alpha = alpha[:, None]
        everything = False
        for i in range(len(alpha)):
            # A tile with nothing but padding belongs to the picture of the one before it.
            everything = bool(whole[i]) if picture[i] else everything
            if everything:
                alpha[i] = 1  # everything, also what is padded
        normalised = (alpha - self._mean) / self._std
        # Tiles that fill up a batch are known by their zeros, by ModernVBERT for one.
        normalised[~picture & (rgb.flatten(1) == 0).all(1)] = 0
        return torch.cat([rgb, normalised], 1).reshape(
            *pixel_values.shape[:-3], 4, *pixel_values.shape[-2:]
        )


def _flat(images: Any, regions: Any) -> tuple[list[Image.Image], list[Region], _Nested]:
    """Return pictures and regions in two lists, and what nests a list as the pictures were."""
    if isinstance(images, Image.Image):
        return [images], [regions], list
    samples = [*images]
    given = _one_each(samples, regions)
    if all(isinstance(sample, Image.Image) for sample in samples):
        return samples, given, list
    pictures = [picture for sample in samples for picture in sample]
    paired = zip(samples, given, strict=True)
    flat = [region for sample, several in paired for region in _one_each(sample, several)]

    def nested(shown: list[Image.Image]) -> list[list[Image.Image]]:
        rest = iter(shown)
        return [[next(rest) for _ in sample] for sample in samples]

    return pictures, flat, nested


def _one_each(images: Sequence[Any], regions: Any) -> list[Any]:
    given = [None] * len(images) if regions is None else [*regions]
    if len(given) != len(images):
        raise ValueError(f"expected a region for each of {len(images)} images, got {len(given)}")
    return given


def _plain(more: dict[str, Any]) -> dict[str, Any]:
    """Return a processor's arguments with `_PLAIN` in place of what they say of it."""
    rest = {name: value for name, value in more.items() if name not in _PLAIN}
    if "images_kwargs" in rest:  # it takes each argument here or there, not in both places
        return {**rest, "images_kwargs": {**rest["images_kwargs"], **_PLAIN}}
    return {**rest, **_PLAIN}


def _mark(picture: Image.Image, region: Region) -> Image.Image:
    """Draw a picture's region in red, in green if it is the whole picture, and all in blue."""
    alpha = region_to_alpha(region, picture.height, picture.width)
    full = np.full_like(alpha, 255)
    return Image.fromarray(np.stack([alpha, full if region is None else 0 * full, full], -1))
