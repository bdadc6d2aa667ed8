"""BLIP-2 and InstructBLIP with an alpha tower: an export, and the graft into a model in memory.

Their vision tower is EVA-CLIP's first giant (`EVA01-g-14` of open_clip) without its last block and
with a norm of BLIP-2's own behind it (LAVIS, `eva_vit.create_eva_vit_g` and `ln_vision`). Their
classes build a kernel of three channels whatever the config says, so that no folder loads with four
by `from_pretrained`; a model gets its alpha tower once it is loaded.
"""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alpha_clip.export.base import (
    ExportReport,
    check_difference,
    fresh_directory,
    largest_difference,
    probe,
    warn_if_another_clip,
)
from alpha_clip.export.huggingface import write_processor
from alpha_clip.export.layouts.eva import eva_tower
from alpha_clip.export.model_card import Card
from alpha_clip.model import AlphaClip

TOWERS = ("blip_2_vision_model", "instructblip_vision_model")
_NO_NOTES = Card()
_WEIGHTS = "model.safetensors"
_STEM = "embeddings.patch_embedding.weight"
_SAME = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size", "image_size")
_USAGE = """
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from alpha_clip.export.multimodal import swap_vision_tower
from alpha_clip.export.region_processor import RegionProcessor

name = "Salesforce/blip2-opt-2.7b"  # or an InstructBLIP; both have EVA-CLIP's giant
blip2 = swap_vision_tower(Blip2ForConditionalGeneration.from_pretrained(name), ".")
ask = RegionProcessor(AutoProcessor.from_pretrained(name), ".")
answer = blip2.generate(**ask(image, mask, text="Question: what is this? Answer:"))
"""


@torch.no_grad()
def export(
    model: AlphaClip,
    directory: str | Path,
    overwrite: bool = False,
    tolerance: float = 1e-5,
    card: Card = _NO_NOTES,
) -> ExportReport:
    """Write a model's image tower for BLIP-2, and compare the tokens of the two.

    Args:
        model: What to export: an alpha tower of the kind of `EVA01-g-14`.
        directory: Folder to write; it appears whole or not at all.
        overwrite: Whether to replace a folder that is there.
        tolerance: Largest difference between tokens, relative to the largest.
        card: What the model card says beyond what the model tells.

    Returns:
        Where it lies and how much it differs, in the tokens that BLIP-2 reads.

    Raises:
        ValueError: If BLIP-2 has no such tower, or the tokens differ.
    """
    tower = eva_tower(model)
    with fresh_directory(Path(directory), overwrite) as folder:
        record = {"model_type": TOWERS[0], "architectures": [tower.model_class], **tower.config}
        (folder / "config.json").write_text(json.dumps(record, indent=1) + "\n")
        save_file(tower.state, folder / _WEIGHTS, metadata={"format": "pt"})
        write_processor(model, folder, channels=4)
        rgba, visual = probe(model), model.visual
        ours: Tensor = visual.get_submodule("trunk").forward_features(rgba)  # type: ignore[operator]
        difference = largest_difference(ours, _alone(folder)(pixel_values=rgba).last_hidden_state)
        check_difference(difference, tolerance)
        card.write(folder, model, _USAGE, difference)
    return ExportReport(str(directory), difference)


def _alone(directory: Path) -> Any:
    """Return stock transformers' tower with an export's weights and its own norm."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    record = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    tower: Any = Blip2VisionModel(Blip2VisionConfig(**record)).eval()
    state = load_file(directory / _WEIGHTS)
    _widen(tower)
    tower.load_state_dict(state)
    return tower


def _widen(tower: Any) -> None:
    """Give the patch embedding, in place, a fourth channel of zeros."""
    old = tower.embeddings.patch_embedding
    new = nn.Conv2d(4, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None)
    new = new.to(old.weight.device, old.weight.dtype).requires_grad_(old.weight.requires_grad)
    tower.embeddings.patch_embedding = new


def has_tower(model: Any) -> bool:
    """Say whether a model's vision tower is BLIP-2's."""
    config = getattr(getattr(model, "vision_model", None), "config", None)
    return getattr(config, "model_type", None) in TOWERS


def graft(model: Any, directory: str | Path) -> None:
    """Give a BLIP-2 or InstructBLIP the stem and blocks of an exported tower, in place.

    As many blocks as the model has are taken, from the first: BLIP-2 leaves EVA's last one out. The
    norm behind them stays, for it was trained with the model.

    Args:
        model: transformers' `Blip2ForConditionalGeneration` or another whose `vision_model` is of
            one of the kinds in `TOWERS`.
        directory: What `export` wrote.

    Raises:
        ValueError: If the folder holds no such tower, or another size; nothing is changed then.
    """
    tower = model.vision_model
    record, state = _read(Path(directory))
    taken = {k: v for k, v in state.items() if _is_taken(k, len(tower.encoder.layers))}
    wrong = _wrong_sizes(tower, record) or _wrong_weights(tower, taken)
    if wrong:
        raise ValueError(
            f"the export in {directory} does not fit in the model's place ({'; '.join(wrong)}); "
            "export the EVA01-g-14 that BLIP-2 was trained with, at the model's image size"
        )
    old = copy(tower.embeddings.patch_embedding)
    _widen(tower)
    tower.load_state_dict(taken, strict=False)  # all but the norm; checked above
    tower.config.num_channels = 4
    warn_if_another_clip(old, tower.embeddings.patch_embedding)


def _wrong_sizes(tower: Any, record: dict[str, Any]) -> list[str]:
    wrong = [
        f"{name} {getattr(tower.config, name)} is not {record.get(name)}"
        for name in _SAME
        if getattr(tower.config, name) != record.get(name)
    ]
    depth, has = len(tower.encoder.layers), record.get("num_hidden_layers", 0)
    return wrong + ([f"{depth} blocks are more than its {has}"] if depth > has else [])


def _wrong_weights(tower: Any, taken: dict[str, Tensor]) -> list[str]:
    """Name the first weights that are not in both, or have other shapes but for the channel."""
    own = {k: v.shape for k, v in tower.state_dict().items() if not k.startswith("post_layernorm.")}
    own[_STEM] = torch.Size([own[_STEM][0], 4, *own[_STEM][2:]])
    given = {k: v.shape for k, v in taken.items()}
    return [
        f"{key} is {tuple(own.get(key, ()))}, not {tuple(given.get(key, ()))}"
        for key in sorted(own.keys() | given.keys())
        if own.get(key) != given.get(key)
    ][:3]


def _is_taken(key: str, depth: int) -> bool:
    parts = key.split(".")
    if parts[0] == "encoder":
        return int(parts[2]) < depth
    return parts[0] == "embeddings"


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        record = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        kind, channels = record["model_type"], record["num_channels"]
        state = load_file(directory / _WEIGHTS)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{directory} is no export for BLIP-2: expected what `alpha-clip export --format blip2`"
            f" writes; {error}"
        ) from error
    if kind not in TOWERS or channels != 4:
        raise ValueError(
            f"{directory} holds a {kind} of {channels} channels, expected a {TOWERS[0]} of 4: "
            "`alpha-clip export --format blip2`"
        )
    return record, state
