"""Multimodal models that look where they are told: LLaVA and its kin with an alpha tower.

`swap_vision_tower` puts an export of `alpha_clip.export.huggingface` in place of the CLIP or SigLIP
that a model has (of `alpha_clip.export.blip2` in place of BLIP-2's tower);
`alpha_clip.export.region_processor` gives it pictures with regions. The rest of
the model stays as it is: with alpha's kernel at zero, so do its answers. What is saved then loads
with stock classes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from alpha_clip.export import blip2
from alpha_clip.export.base import warn_if_another_clip

_TOWERS = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
_SAME = ("hidden_size", "image_size", "patch_size")
# What an exported tower computes with. All else in its config is the model's: how many of the
# layers it has, whether it has a head, and what the model keeps there for itself.
_COMPUTED = (
    "num_channels",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
)
_NAMES = ("vision_tower", "vision_model", "vision_encoder", "visual")  # of towers, to refuse others


def swap_vision_tower(model: Any, directory: str | Path) -> Any:
    """Put an exported tower in place of a multimodal model's own.

    As many layers as the model has are taken, from the first: LLaVA-OneVision leaves SigLIP's last
    one out. A pooling head comes along only if the model has one.

    Args:
        model: transformers' `LlavaForConditionalGeneration`, `PaliGemmaForConditionalGeneration` or
            another that has one `CLIPVisionModel` or `SiglipVisionModel`; or a BLIP-2 or
            InstructBLIP, see `alpha_clip.export.blip2.graft`. It is changed: tower and config.
        directory: What `alpha-clip export --format huggingface` wrote, of the same CLIP or SigLIP;
            for BLIP-2 `--format blip2`.

    Returns:
        The model; its tower is where the old one was, in the same precision.

    Raises:
        ValueError: If the model has no such tower, or the export's does not fit in its place.
    """
    import transformers

    if blip2.has_tower(model):
        blip2.graft(model, directory)
        return model
    holder, name = _place_of(model)
    old: Any = getattr(holder, name)
    kind = old.config.model_type
    record = _record(directory)
    if record.get("model_type") != kind:
        raise ValueError(
            f"the model's tower is a {kind}, the export in {directory} a "
            f"{record.get('model_type')}; expected both to be one of {', '.join(_TOWERS)}"
        )
    exported = type(old.config).from_pretrained(directory)
    wrong = [n for n in _SAME if getattr(old.config, n) != getattr(exported, n)]
    if old.config.num_hidden_layers > exported.num_hidden_layers:
        wrong.append("num_hidden_layers")
    if wrong:
        told = "; ".join(
            f"{n} {getattr(old.config, n)} is not {getattr(exported, n)}" for n in wrong
        )
        raise ValueError(
            f"the export in {directory} does not fit in the model's place ({told}); export the "
            "CLIP that the model was trained with, at its image size"
        )
    config = copy.deepcopy(old.config)
    for field in _COMPUTED:
        setattr(config, field, getattr(exported, field))
    parameter = next(old.parameters())
    with _quiet():
        tower = getattr(transformers, _TOWERS[kind]).from_pretrained(
            directory,
            config=config,
            dtype=parameter.dtype,
            attn_implementation=old.config._attn_implementation,
        )
    warn_if_another_clip(old, tower)
    setattr(holder, name, tower.to(parameter.device).train(old.training))
    for module in model.modules():  # the tower may lie in a model within the model
        whole: Any = getattr(module, "config", None)
        if getattr(getattr(whole, "vision_config", None), "model_type", None) == kind:
            whole.vision_config = tower.config
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report of weights that it leaves out: the projection, on purpose."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _place_of(model: Any) -> tuple[nn.Module, str]:
    """Return the module that has the vision tower, and the tower's name there.

    Which module and name these are depends on the model, and on transformers' version.
    """
    import transformers

    stock = tuple(getattr(transformers, name) for name in _TOWERS.values())
    found = list(_towers(model, stock))
    if len(found) == 1:
        return found[0]
    whose = type(model).__name__
    if found:
        names = ", ".join(name for _, name in found)
        raise ValueError(
            f"{whose} has {len(found)} towers ({names}), expected one: both would share a config"
        )
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in _NAMES:
            raise ValueError(
                f"{whose}'s {path} is {type(module).__name__}, expected "
                f"{' or '.join(_TOWERS.values())}: no export fits in its place; take a model whose "
                "tower is CLIP's or SigLIP's"
            )
    raise ValueError(
        f"{whose} has no vision_tower; expected LLaVA's kind of model (others take an exported "
        "tower by hand)"
    )


def _towers(module: nn.Module, stock: tuple[type, ...]) -> Iterator[tuple[nn.Module, str]]:
    for name, child in module.named_children():
        if isinstance(child, stock):
            yield module, name
        else:
            yield from _towers(child, stock)


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
