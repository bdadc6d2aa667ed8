"""What a training checkpoint of ours says beside Lightning's own: of what model, by which recipe.

So it can be refused before work starts, and read without training: `create_model(checkpoint=...)`
takes a `.ckpt` as it takes a folder. Nothing in it needs unpickling.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpha_clip.checkpoint import CheckpointConfig, describe, parse_config, write_checkpoint
from alpha_clip.lora import LoraConfig, merge_lora
from alpha_clip.model import AlphaClip

_RECIPE, _MODEL = "alpha_clip_recipe", "alpha_clip_model"
_PREFIX = "model.clip."  # where the CLIP is in an AlphaClipModule


def add_model(checkpoint: dict[str, Any], model: AlphaClip, recipe: dict[str, Any]) -> None:
    """Put into a checkpoint what model it holds, and by which recipe it is trained."""
    checkpoint[_MODEL] = describe(model)
    checkpoint[_RECIPE] = recipe


def write_model(checkpoint: dict[str, Any], directory: str | os.PathLike[str]) -> Path:
    """Write the model of a checkpoint as a folder, as `save_checkpoint` does.

    Its weights are the averaged ones, where the run averages them, with LoRA merged.
    """
    return write_checkpoint(checkpoint[_MODEL], _weights(checkpoint), directory)


def read_training_checkpoint(
    file: str | os.PathLike[str],
) -> tuple[CheckpointConfig, dict[str, Tensor]]:
    """Read the model of a `.ckpt` that training wrote.

    Returns:
        What it says about its weights, and the weights, with LoRA merged.

    Raises:
        ValueError: If the file is no checkpoint of ours, or damaged.
    """
    checkpoint = load_training_checkpoint(file)
    if missing := {_MODEL, _RECIPE, "state_dict"} - checkpoint.keys():
        raise ValueError(f"{file} was not written by AlphaClipModule: it lacks {sorted(missing)}")
    return parse_config(checkpoint[_MODEL], str(file)), _weights(checkpoint)


def load_training_checkpoint(
    file: str | os.PathLike[str], map_location: Any = "cpu"
) -> dict[str, Any]:
    """Load a `.ckpt` without unpickling anything but tensors and plain values.

    Raises:
        ValueError: If the file is damaged, or holds anything else.
    """
    try:
        content = torch.load(file, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch's reader may raise anything on damage
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} can't be read as a training checkpoint: {first}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no training checkpoint: it holds a {type(content).__name__}")
    return content


def check_recipe(checkpoint: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Refuse a checkpoint that another recipe made.

    Raises:
        ValueError: Naming what differs.
    """
    if _RECIPE not in checkpoint:
        raise ValueError("the checkpoint to go on from was not written by AlphaClipModule")
    theirs, ours = (dict(_flat(part)) for part in (checkpoint[_RECIPE], recipe))
    different = [
        f"{key}: {theirs.get(key, 'nothing')} there, {ours.get(key, 'nothing')} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if different:
        raise ValueError(
            f"the checkpoint to go on from was made by another recipe ({'; '.join(different)}); go "
            "on with its own settings, or begin another run, with an output of its own, from its "
            "weights (model.encoder.checkpoint)"
        )


def _weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    state = {
        key.removeprefix(_PREFIX): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(_PREFIX)
    }
    lora = checkpoint[_RECIPE]["trainable"]["lora"]
    return state if lora is None else merge_lora(state, LoraConfig(**lora))


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
