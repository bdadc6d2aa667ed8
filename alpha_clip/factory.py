"""Building models: any open_clip architecture, with an alpha channel."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from alpha_clip.checkpoint import CONFIG_FILE, load_weights, read_config, read_weights
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import add_alpha_channel
from alpha_clip.transforms import Geometry, Normalisation, RegionTransform

Precision = Literal["fp32", "fp16", "bf16"]
Tokenizer: TypeAlias = Callable[[list[str]], Tensor]
_LOCAL = "local-dir:"


def create_model(
    name: str | None = None,
    pretrained: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: Precision = "fp32",
    device: str | torch.device = "cpu",
    geometry: Geometry = "center_crop",
) -> tuple[AlphaClip, RegionTransform, Tokenizer]:
    """Build an Alpha-CLIP with its transform and tokenizer.

    Args:
        name: An open_clip architecture (`open_clip.list_models()`), or `local-dir:FOLDER` with an
            `open_clip_config.json`. May be left out where `checkpoint` says it.
        pretrained: Weights of the CLIP to start from: an open_clip tag, a file, or `None`.
        checkpoint: A folder written by `save_checkpoint`.
        precision: Type of the weights.
        device: Where to put the model.
        geometry: How the transform makes an image square; see `RegionTransform`.

    Returns:
        The model in eval mode, `transform(image, region)`, and `tokenizer(texts)`.

    Raises:
        ValueError: If there is no such architecture or tag, or the weights do not fit it.
    """
    if checkpoint is not None:
        if pretrained is not None:
            raise ValueError("a checkpoint replaces pretrained weights; give one of the two")
        model = _load_own(Path(checkpoint), name, precision)
    elif name is None:
        raise ValueError("expected the name of an architecture or a checkpoint, got neither")
    else:
        model = _create_base(name, pretrained, precision)
    transform = RegionTransform(model.image_size, model.normalisation, geometry)
    return model.to(device).eval(), transform, create_tokenizer(model)


def load_checkpoint(
    directory: str | os.PathLike[str],
    precision: Precision = "fp32",
    device: str | torch.device = "cpu",
) -> AlphaClip:
    """Build the model that `save_checkpoint` wrote, in eval mode.

    Args:
        directory: The folder.
        precision: Type of the weights.
        device: Where to put the model.

    Raises:
        ValueError: If the folder is not a whole checkpoint of ours.
    """
    return create_model(checkpoint=directory, precision=precision, device=device)[0]


def create_tokenizer(model: AlphaClip) -> Tokenizer:
    """Return the tokenizer of a model's text tower: texts -> ids `[texts, context]`."""
    import open_clip

    text = model.config["text_cfg"]
    known = model.name if open_clip.get_model_config(model.name) is not None else ""
    tokenizer: Tokenizer = open_clip.get_tokenizer(
        known, context_length=text.get("context_length", 77)
    )
    return tokenizer


def _create_base(name: str, pretrained: str | None, precision: Precision) -> AlphaClip:
    """Build from open_clip: the plain CLIP, then its fourth channel."""
    import open_clip

    if pretrained is not None and name.startswith(_LOCAL):  # open_clip would ignore it
        raise ValueError(f"{name} takes no pretrained weights; name an architecture of open_clip")
    config = _config_of(name)
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    if tag.get("quick_gelu"):  # OpenAI's weights need it, whatever the architecture's name says
        config["quick_gelu"] = True
    with _quiet():
        try:
            clip = open_clip.create_model(
                name,
                pretrained,
                load_weights=pretrained is not None,
                precision=precision,
                force_quick_gelu=config.get("quick_gelu", False),
                pretrained_text=False,
            )
        except RuntimeError as error:
            raise ValueError(f"open_clip could not build {name!r}: {error}") from error
    given = clip.visual.preprocess_cfg
    normalisation = Normalisation(tuple(given["mean"]), tuple(given["std"]))
    add_alpha_channel(clip.visual)
    return AlphaClip(clip, Path(name.removeprefix(_LOCAL)).name, config, normalisation)


def _load_own(folder: Path, name: str | None, precision: Precision) -> AlphaClip:
    saved = read_config(folder)
    if name is not None and _layout(_config_of(name)) != _layout(saved.model_cfg):
        raise ValueError(f"{folder} holds a {saved.name}, not a {name}; leave the name out")
    built = _create_base(f"{_LOCAL}{folder}", None, precision)
    load_weights(built.clip, read_weights(folder), str(folder))
    return AlphaClip(built.clip, saved.name, saved.model_cfg, saved.normalisation)


def _config_of(name: str) -> dict[str, Any]:
    import open_clip

    folder = Path(name.removeprefix(_LOCAL))
    if name.startswith(_LOCAL) and not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}")
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(
            f"unknown architecture {name!r}; open_clip.list_models() names "
            f"{len(open_clip.list_models())} of them, such as ViT-B-16"
        )
    return deepcopy(dict(config))


def _layout(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out what OpenAI's weights turn on in an architecture that does not name it."""
    return {key: value for key, value in config.items() if key != "quick_gelu"}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's word that a model starts from random weights: the caller asked for it."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
