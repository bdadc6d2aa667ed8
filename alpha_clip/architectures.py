"""Architectures: building an open_clip model by its name or its config, with an alpha channel."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from alpha_clip.checkpoint import CONFIG_FILE
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import add_alpha_channel
from alpha_clip.transforms import Geometry, Normalisation, RegionTransform

Precision = Literal["fp32", "fp16", "bf16"]
LOCAL = "local-dir:"
_GEOMETRIES: dict[str, Geometry] = {"shortest": "center_crop", "longest": "pad", "squash": "squash"}


def build_by_name(
    name: str,
    tag: str | None,
    precision: Precision,
    quick_gelu: bool = False,
    image_size: int | None = None,
) -> AlphaClip:
    """Build from open_clip: the plain CLIP, then its fourth channel.

    Args:
        name: An open_clip architecture, or `local-dir:FOLDER` with an `open_clip_config.json`.
        tag: open_clip's name for pretrained weights; random ones without.
        precision: Type of the weights.
        quick_gelu: Whether to use OpenAI's activation, whatever the name says.
        image_size: Side of the input in pixels. A timm tower without a tag keeps its own, because
            its weights have to be loaded first; see `resize_input`.

    Raises:
        ValueError: If there is no such architecture or tag, or the tower can't take an alpha.
    """
    import open_clip

    if tag is not None and name.startswith(LOCAL):  # open_clip would ignore it
        raise ValueError(f"{name} takes no pretrained tag; name an architecture of open_clip")
    config = config_of(name)
    facts = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if quick_gelu or facts.get("quick_gelu"):
        # OpenAI's weights need it, whatever the architecture's name says.
        config["quick_gelu"] = True
    if image_size is not None and not is_timm(config):
        config["vision_cfg"]["image_size"] = image_size
    with _quiet():
        try:
            clip = open_clip.create_model(
                name,
                tag,
                load_weights=tag is not None,
                precision=precision,
                force_quick_gelu=config.get("quick_gelu", False),
                force_image_size=image_size if tag or not is_timm(config) else None,
                force_preprocess_cfg=None if tag else _usual_preprocessing(name),
                pretrained_text=False,
            )
        except RuntimeError as error:
            raise ValueError(f"open_clip could not build {name!r}: {error}") from error
    add_alpha_channel(clip.visual)
    short = Path(name.removeprefix(LOCAL)).name
    return AlphaClip(clip, short, config, _transform_of(clip.visual), tag)


def build_from_config(
    name: str, config: dict[str, Any], precision: Precision, image_size: int | None = None
) -> AlphaClip:
    """Build from a model config that open_clip has no name for; see `build_by_name`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CONFIG_FILE
        file.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        model = build_by_name(f"{LOCAL}{folder}", None, precision, image_size=image_size)
    model.name = name
    return model


def is_timm(config: dict[str, Any]) -> bool:
    """Tell whether a model config names a timm trunk."""
    return "timm_model_name" in config["vision_cfg"]


def resize_input(model: AlphaClip, image_size: int) -> None:
    """Let a timm tower take another input size; its position embeddings are interpolated."""
    model.visual.set_input_size(image_size)  # type: ignore[operator]
    model.transform = model.transform.replace(size=image_size)


def config_of(name: str) -> dict[str, Any]:
    """Return a copy of open_clip's model config.

    Raises:
        ValueError: If there is no such architecture.
    """
    import open_clip

    folder = Path(name.removeprefix(LOCAL))
    if name.startswith(LOCAL) and not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}")
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(
            f"unknown architecture {name!r}; open_clip.list_models() names "
            f"{len(open_clip.list_models())} of them, such as ViT-B-16"
        )
    return deepcopy(dict(config))


def _usual_preprocessing(name: str) -> dict[str, Any] | None:
    """Return what all of an architecture's published weights expect, if they agree.

    SigLIP's mean is not OpenAI's, and a file of weights does not say so.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    keys = ("mean", "std", "interpolation", "resize_mode")
    facts = [
        {k: v for k in keys if (v := open_clip.get_pretrained_cfg(name, tag).get(k))}
        for tag in tags
    ]
    return facts[0] if facts and all(f == facts[0] for f in facts) else None


def _transform_of(visual: Any) -> RegionTransform:
    facts = visual.preprocess_cfg
    size = facts["size"]
    normalisation = Normalisation(tuple(facts["mean"]), tuple(facts["std"]))
    return RegionTransform(
        int(size[0] if isinstance(size, tuple | list) else size),
        normalisation,
        _GEOMETRIES[facts["resize_mode"]],
        interpolation=facts["interpolation"],
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's word that a model starts from random weights: the caller asked for it."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
