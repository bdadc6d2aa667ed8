"""Diffusion pipelines with a region as the prompt: "make variations of this part of my picture".

`swap_image_encoder` puts an export of `alpha_clip.export.huggingface` in place of the CLIP with
which a pipeline of diffusers looks at pictures; `region_prompt` makes the tensor to give it as
`image` or `ip_adapter_image`. With alpha's kernel at zero, what is drawn stays what it was.
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

from alpha_clip.export.base import warn_if_another_clip
from alpha_clip.geometry import Geometry
from alpha_clip.pictures import Picture
from alpha_clip.regions import Region
from alpha_clip.transforms import Normalisation, RegionTransform

_KIND = "CLIPVisionModelWithProjection"
_SAME = (
    "projection_dim",
    "hidden_size",
    "image_size",
    "patch_size",
    "num_hidden_layers",
    "hidden_act",  # in which OpenAI's CLIPs differ from others of the same shape
)
# Their encoder gets a picture of zeros with three channels, or what a processor of RGB makes of
# every tensor.
_RGB_ONLY = {
    "KandinskyPriorPipeline",
    "KandinskyV22PriorPipeline",
    "KandinskyV22PriorEmb2EmbPipeline",
    "StableCascadePriorPipeline",
    "StableVideoDiffusionPipeline",
}


def swap_image_encoder(pipeline: Any, directory: str | Path) -> Any:
    """Put an exported tower in place of a pipeline's image encoder.

    Give the pipeline what `region_prompt` makes; plain pictures don't go in any more. Its feature
    extractor stays as it is: a safety checker looks through it at what was drawn, which is RGB.

    An IP-Adapter may be loaded before or, if the pipeline has an encoder, after. To load no encoder
    but the export, call `load_ip_adapter(..., image_encoder_folder=None)` first (of Flux,
    `image_encoder_pretrained_model_name_or_path=None`): the empty place is filled. An adapter tells
    no more than how wide its encoder is, so see to it that it is the same CLIP.

    Guidance leads away from a negative without a region: zeros in place of features or, for
    adapters of the "plus" kind, hidden states of a picture of zeros. There, alpha too is 0 after
    normalisation, neither in nor out. That is sound, as the kernel of alpha makes nothing of it:
    the negative is what the tower gives without that kernel, and the same for every region. Flux
    makes a black picture in RGB, which does not go in; give it as `negative_ip_adapter_image`
    `region_prompt(Image.new("RGB", (8, 8)), None, directory)`, even without guidance.

    Args:
        pipeline: A pipeline of diffusers whose `image_encoder` is transformers'
            `CLIPVisionModelWithProjection`, or one with an IP-Adapter and none. It is changed.
        directory: What `alpha-clip export --format huggingface` wrote, of the same CLIP.

    Returns:
        The pipeline; its encoder is where the old one was, in the same precision, and
        `save_pretrained` saves it.

    Raises:
        ValueError: If the pipeline takes no regions or is offloaded, or the export does not fit.
    """
    from transformers import CLIPVisionModelWithProjection

    wanted = _wanted(pipeline)
    record = _record(directory)
    wrong = [
        f"{name} {value} is not {record.get(name)}"
        for name, value in wanted
        if value != record.get(name)
    ]
    if wrong:
        raise ValueError(
            f"the export in {directory} does not fit in the pipeline's place ({'; '.join(wrong)}); "
            "export the CLIP that the pipeline or its IP-Adapter was trained with"
        )
    if any(hasattr(part, "_hf_hook") for part in pipeline.components.values()):
        raise ValueError(
            "the pipeline is offloaded, and a new encoder would stay where it is; call "
            "pipeline.remove_all_hooks(), swap, and offload then"
        )
    old = pipeline.image_encoder
    like = pipeline if old is None else old
    encoder = CLIPVisionModelWithProjection.from_pretrained(directory, dtype=like.dtype)
    if old is not None:
        warn_if_another_clip(old, encoder)
    pipeline.register_modules(image_encoder=encoder.to(like.device))
    return pipeline


def _wanted(pipeline: Any) -> list[tuple[str, Any]]:
    """Return what an encoder's config must say to fit a pipeline."""
    kinds = [kind.__name__ for kind in type(pipeline).__mro__]
    if _RGB_ONLY.intersection(kinds):
        raise ValueError(
            f"{kinds[0]} gives its image encoder RGB of its own making, so it takes no region; "
            "leave the encoder, and compute image_embeds with the export where a pipeline takes "
            "them"
        )
    old = getattr(pipeline, "image_encoder", None)
    if old is None:
        widths = _adapters(pipeline)
        if not widths:
            raise ValueError(
                f"{kinds[0]} has no image_encoder; expected a pipeline that looks at pictures, or "
                "one with an IP-Adapter (load_ip_adapter(..., image_encoder_folder=None) first)"
            )
        return widths
    if type(old).__name__ != _KIND:
        raise ValueError(
            f"the image_encoder of {kinds[0]} is a {type(old).__name__}, expected a {_KIND}"
        )
    return [(name, getattr(old.config, name)) for name in _SAME]


def _adapters(pipeline: Any) -> list[tuple[str, int]]:
    """Return how wide the output of the encoder is that each IP-Adapter expects."""
    from diffusers.models.embeddings import ImageProjection

    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    held = getattr(denoiser, "encoder_hid_proj", None)
    widths = []
    for layer in getattr(held, "image_projection_layers", ()):
        # As pipelines tell them apart; a hidden state is for all but the plain kind.
        name = "projection_dim" if isinstance(layer, ImageProjection) else "hidden_size"
        first = next(part for part in layer.modules() if isinstance(part, nn.Linear))
        widths.append((name, first.in_features))
    return widths


def _record(directory: str | Path) -> dict[str, Any]:
    record = _read(Path(directory) / "config.json")
    kinds, channels = record.get("architectures"), record.get("num_channels")
    if kinds != [_KIND]:
        raise ValueError(
            f"the export in {directory} is a {', '.join(kinds or ['nameless model'])}, expected a "
            f"{_KIND}: a CLIP's ViT, exported with --format huggingface"
        )
    if channels != 4:
        raise ValueError(
            f"the tower in {directory} has {channels} channels, expected 4: export it with "
            "--format huggingface"
        )
    return record


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"{file.name} holds a {type(record).__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file.parent} is no export: expected what `alpha-clip export --format huggingface` "
            f"writes; {error}"
        ) from error
    return record


def region_prompt(
    images: Picture | Sequence[Picture],
    regions: Any,
    directory: str | Path,
    geometry: Geometry | None = None,
) -> Float[Tensor, "images 4 size size"]:
    """Make pictures with regions into what a pipeline with an exported encoder takes.

    Image variations draw a picture for each, stable unCLIP takes one for each text prompt, and an
    IP-Adapter all of them together as prompts of one picture (for several adapters, give a list
    with such a tensor for each).

    Args:
        images: One picture, or several: PIL images, arrays `[H, W, 3]` or tensors `[3, H, W]`,
            uint8 0..255 or floating 0..1.
        regions: The region of the one picture, or a list with one for each: whatever
            `region_to_alpha` takes; `None` is the picture's own alpha, else the whole picture.
        directory: The export that the pipeline got: it tells size and normalisation.
        geometry: How pictures become square. `None` is the export's own, mostly `center_crop`, as
            pipelines do it, which loses what lies at the ends of a long picture; see
            `RegionTransform` for the others.

    Returns:
        RGB and alpha, aligned and normalised, float32.

    Raises:
        TypeError: If a picture or a region is none.
        ValueError: If there is not one region for each picture, one does not fit, or the export
            does not tell how to prepare pictures with alpha.
    """
    pictures, given = _pairs(images, regions)
    transform = _transform(Path(directory) / "preprocessor_config.json")
    if geometry is not None:
        transform = transform.replace(geometry=geometry)
    return torch.stack([transform(p, r) for p, r in zip(pictures, given, strict=True)])


def _pairs(images: Picture | Sequence[Picture], regions: Any) -> tuple[list[Picture], list[Region]]:
    if isinstance(images, Image.Image):
        return [images], [regions]
    if isinstance(images, np.ndarray | Tensor) and images.ndim < 4:
        return [images], [regions]
    pictures: list[Picture] = [*images]
    if regions is None:
        regions = [None] * len(pictures)
    if not isinstance(regions, Sequence | np.ndarray | Tensor):
        raise TypeError(
            f"expected a list with a region for each of {len(pictures)} images, got one "
            f"{type(regions).__name__}"
        )
    if len(regions) != len(pictures) or not pictures:
        raise ValueError(
            f"expected a region for each of {len(pictures)} images, and at least one, got "
            f"{len(regions)}"
        )
    return pictures, [*regions]


def _transform(file: Path) -> RegionTransform:
    record = _read(file)
    try:
        r, g, b, alpha_mean = record["image_mean"]
        r_std, g_std, b_std, alpha_std = record["image_std"]
        size = record["crop_size"]["height"]
        squash, bicubic = not record["do_center_crop"], record["resample"] == 3
    except (LookupError, ValueError, TypeError) as error:
        raise ValueError(
            f"{file} does not say how pictures with alpha are prepared; expected an export with 4 "
            f"channels; {error}"
        ) from error
    return RegionTransform(
        size,
        Normalisation((r, g, b), (r_std, g_std, b_std), alpha_mean, alpha_std),
        "squash" if squash else "center_crop",
        interpolation="bicubic" if bicubic else "bilinear",
    )
