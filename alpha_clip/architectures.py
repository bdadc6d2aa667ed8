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
from alpha_clip.geometry import Geometry
from alpha_clip.late_alpha import FIRST_LAYER, AlphaEntry
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import add_alpha_channel
from alpha_clip.transforms import Normalisation, RegionTransform

Precision = Literal["fp32", "fp16", "bf16"]
LOCAL = "local-dir:"
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
_GEOMETRIES: dict[str, Geometry] = {"shortest": "center_crop", "longest": "pad", "squash": "squash"}


def build_by_name(
    name: str,
    precision: Precision,
    quick_gelu: bool = False,
    image_size: int | None = None,
    facts: dict[str, Any] | None = None,
    entry: AlphaEntry = FIRST_LAYER,
) -> AlphaClip:
    """Build from open_clip with random weights: the plain CLIP, then its fourth channel.

    Args:
        name: An open_clip architecture, or `local-dir:FOLDER` with an `open_clip_config.json`.
        precision: Type of the weights.
        quick_gelu: Whether to use OpenAI's activation, whatever the name says.
        image_size: Side of the input in pixels. A timm tower keeps its own, because its weights
            have to be loaded first; see `resize_input`.
        facts: What open_clip knows of the weights that will be loaded; see `fetch_tag`.
        entry: Where alpha enters.

    Raises:
        ValueError: If there is no such architecture, or the tower can't take an alpha.
    """
    import open_clip

    config = config_of(name)
    if quick_gelu:
        config["quick_gelu"] = True
    size = None if is_timm(config) else image_size
    if size is not None:
        config["vision_cfg"]["image_size"] = size
    facts = facts or _usual_preprocessing(name)
    with _quiet():
        try:
            clip = open_clip.create_model(
                name,
                load_weights=False,
                precision=precision,
                force_quick_gelu=config.get("quick_gelu", False),
                force_image_size=size,
                force_preprocess_cfg={k: facts[k] for k in _PREPROCESSING if facts.get(k)},
                pretrained_text=False,
            )
        except RuntimeError as error:
            raise ValueError(f"open_clip could not build {name!r}: {error}") from error
    add_alpha_channel(clip.visual, entry)
    short = Path(name.removeprefix(LOCAL)).name
    return AlphaClip(clip, short, config, _transform_of(clip.visual))


def fetch_tag(name: str, tag: str) -> tuple[Path, dict[str, Any]]:
    """Fetch the weights that open_clip lists for an architecture.

    Args:
        name: An open_clip architecture.
        tag: One of `open_clip.list_pretrained_tags_by_model(name)`.

    Returns:
        The file in the local cache, and what open_clip knows of it: normalisation, resizing,
        activation.

    Raises:
        ValueError: If there is no such tag, or it can't be fetched.
    """
    import open_clip

    config_of(name)
    facts = open_clip.get_pretrained_cfg(name, tag)
    if not facts:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"{tag!r} is neither a file nor a tag of {name}; open_clip's tags for it: {known}"
        )
    try:
        return Path(open_clip.download_pretrained(facts)), dict(facts)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the weights {tag!r} of {name} could not be fetched ({error}); fetch them by other "
            "means and pass the path of the file"
        ) from error


def build_from_config(
    name: str,
    config: dict[str, Any],
    precision: Precision,
    image_size: int | None = None,
    entry: AlphaEntry = FIRST_LAYER,
) -> AlphaClip:
    """Build from a model config that open_clip has no name for; see `build_by_name`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CONFIG_FILE
        file.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        model = build_by_name(f"{LOCAL}{folder}", precision, image_size=image_size, entry=entry)
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


def _usual_preprocessing(name: str) -> dict[str, Any]:
    """Return what all of an architecture's published weights expect, if they agree.

    SigLIP's mean is not OpenAI's, and a file of weights does not say so.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    known = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    facts = [{k: v for k in _PREPROCESSING if (v := cfg.get(k))} for cfg in known]
    return facts[0] if facts and all(f == facts[0] for f in facts) else {}


def _transform_of(visual: Any) -> RegionTransform:
    facts = visual.preprocess_cfg
    size, mode = facts["size"], facts["resize_mode"]
    if mode not in _GEOMETRIES:
        raise ValueError(f"resize_mode must be one of {', '.join(_GEOMETRIES)}, got {mode!r}")
    normalisation = Normalisation(tuple(facts["mean"]), tuple(facts["std"]))
    return RegionTransform(
        int(size[0] if isinstance(size, tuple | list) else size),
        normalisation,
        _GEOMETRIES[mode],
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
