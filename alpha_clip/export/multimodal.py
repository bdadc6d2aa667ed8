"""Multimodal models that look where they are told: LLaVA and LLaVA-NeXT with an alpha tower.

`swap_vision_tower` puts an export of `alpha_clip.export.huggingface` in place of the CLIP or SigLIP
that a model has; `RegionProcessor` gives it pictures with regions. The rest of the model stays as
it is: with alpha's kernel at zero, so do its answers. What is saved then loads with stock classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from alpha_clip.regions import Region, region_to_alpha

_TOWERS = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
_SAME = ("hidden_size", "image_size", "patch_size", "num_hidden_layers")


def swap_vision_tower(model: Any, directory: str | Path) -> Any:
    """Put an exported tower in place of a multimodal model's own.

    Args:
        model: transformers' `LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration` or
            another whose `vision_tower` is CLIP's or SigLIP's. It is changed: tower and config.
        directory: What `alpha-clip export --format huggingface` wrote, of the same CLIP or SigLIP.

    Returns:
        The model; its tower is where the old one was, in the same precision.

    Raises:
        ValueError: If the model has no such tower, or the export's does not fit in its place.
    """
    import transformers

    holder = _holder_of(model)
    old: Any = holder.vision_tower
    kind = old.config.model_type
    record = _record(directory)
    if kind not in _TOWERS or record.get("model_type") != kind:
        raise ValueError(
            f"the model's tower is a {kind}, the export in {directory} a "
            f"{record.get('model_type')}; expected both to be one of {', '.join(_TOWERS)}"
        )
    wrong = {
        name: (getattr(old.config, name), record.get(name))
        for name in _SAME
        if getattr(old.config, name) != record.get(name)
    }
    if wrong:
        told = "; ".join(f"{name} {is_} is not {has}" for name, (is_, has) in wrong.items())
        raise ValueError(
            f"the export in {directory} does not fit in the model's place ({told}); export the "
            "CLIP that the model was trained with"
        )
    parameter = next(old.parameters())
    tower = getattr(transformers, _TOWERS[kind]).from_pretrained(
        directory, dtype=parameter.dtype, attn_implementation=old.config._attn_implementation
    )
    holder.vision_tower = tower.to(parameter.device).train(old.training)
    for config in {id(m.config): m.config for m in (model, holder)}.values():
        config.vision_config = tower.config
    return model


def _holder_of(model: Any) -> Any:
    """Return the module that has the vision tower; which one depends on transformers' version."""
    for candidate in (model, getattr(model, "model", None)):
        # A property that only passes on, as `model.vision_tower` was for a while, is no place.
        if isinstance(candidate, nn.Module) and "vision_tower" in candidate._modules:
            return candidate
    raise ValueError(
        f"{type(model).__name__} has no vision_tower; expected LLaVA's kind of model (others take "
        "an exported tower by hand)"
    )


def _record(directory: str | Path) -> dict[str, Any]:
    try:
        record = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        channels = record["num_channels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory} is no export: expected what `alpha-clip export --format huggingface` "
            f"writes; {error}"
        ) from error
    if channels != 4:
        raise ValueError(f"the tower in {directory} has {channels} channels, expected 4")
    found: dict[str, Any] = record
    return found


class RegionProcessor:
    """A multimodal model's processor, for pictures with regions.

    Alpha goes through the very geometry of the picture: resized, cropped, padded and, in
    LLaVA-NeXT, cut into tiles with it. What is padded belongs to no region.

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
        images: Image.Image | Sequence[Image.Image],
        regions: Any = None,
        text: str | Sequence[str] | None = None,
        **more: Any,
    ) -> Any:
        """Make a model's inputs.

        Args:
            images: One picture, or several.
            regions: The region of the one picture, or a list with one for each: whatever
                `region_to_alpha` takes; `None` is the whole picture.
            text: As of the model's processor, with its image tokens.
            more: As of the model's processor, such as `return_tensors`, which is `pt` here.

        Returns:
            What the model's processor returns, `pixel_values` with alpha as the fourth channel.

        Raises:
            ValueError: If there is not one region for each picture, or one does not fit.
        """
        pictures: list[Image.Image] = [images] if isinstance(images, Image.Image) else [*images]
        given = [regions]
        if not isinstance(images, Image.Image):
            given = [None] * len(pictures) if regions is None else [*regions]
        if len(given) != len(pictures):
            raise ValueError(
                f"expected a region for each of {len(pictures)} images, got {len(given)}"
            )
        rgb = [picture.convert("RGB") for picture in pictures]
        inputs = self.processor(images=rgb, text=text, **{**more, "return_tensors": "pt"})
        inputs["pixel_values"] = self._with_alpha(inputs["pixel_values"], rgb, given)
        return inputs

    def _with_alpha(
        self, pixel_values: Tensor, pictures: list[Image.Image], regions: Sequence[Region]
    ) -> Float[Tensor, "... 4 height width"]:
        marks = [
            np.repeat(region_to_alpha(region, p.height, p.width)[..., None], 3, 2)
            for p, region in zip(pictures, regions, strict=True)
        ]
        shown = self.processor.image_processor(
            [Image.fromarray(mark) for mark in marks],
            do_normalize=False,
            resample=Image.Resampling.BILINEAR,  # bicubic would overshoot
            return_tensors="pt",
        )["pixel_values"]
        alpha = shown[..., :1, :, :].to(pixel_values)
        for i, region in enumerate(regions):
            if region is None:
                alpha[i] = 1  # everything, also what is padded
        normalised = (alpha - self._mean) / self._std
        return torch.cat([pixel_values, normalised], -3)
