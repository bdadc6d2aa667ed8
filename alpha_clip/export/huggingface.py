"""Export to stock transformers: CLIP's or SigLIP's image tower with 4 channels.

Loads with plain `from_pretrained`, without any code of ours: the two kernels of the stem become one
patch embedding over four channels, and packed attention weights are taken apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpha_clip.export.base import (
    ExportReport,
    check_difference,
    fresh_directory,
    largest_difference,
    probe,
)
from alpha_clip.export.layouts.clip import clip_tower
from alpha_clip.export.layouts.siglip import siglip_tower
from alpha_clip.export.layouts.stock import StockTower
from alpha_clip.export.model_card import Card
from alpha_clip.model import AlphaClip

_NO_NOTES = Card()
_USAGE = """
from transformers import {processor}, {model}

tower = {model}.from_pretrained(".")
processor = {processor}.from_pretrained(".")
rgba = np.dstack([np.asarray(image.convert("RGB")), 255 * mask])  # uint8 [H, W, 4]
inputs = processor(rgba, input_data_format="channels_last", return_tensors="pt")
features = tower(**inputs).{features}
"""
_PROCESSOR = "CLIPImageProcessor"


def export(
    model: AlphaClip,
    directory: str | Path,
    overwrite: bool = False,
    tolerance: float = 1e-5,
    card: Card = _NO_NOTES,
) -> ExportReport:
    """Write a model's image tower for transformers, and compare the two.

    Args:
        model: What to export; a ViT of open_clip's own, or SigLIP's.
        directory: Folder to write; it appears whole or not at all.
        overwrite: Whether to replace a folder that is there.
        tolerance: Largest difference between features, relative to the largest feature.
        card: What the model card says beyond what the model tells.

    Returns:
        Where it lies and how much it differs.

    Raises:
        ValueError: If transformers has no stock class for the tower, or the features differ.
    """
    tower = stock_tower(model)
    with fresh_directory(Path(directory), overwrite) as folder:
        save_tower(tower, folder)
        write_processor(model, folder, channels=4)
        difference = compare(model, folder)
        check_difference(difference, tolerance)
        usage = _USAGE.format(
            model=tower.model_class, processor=_PROCESSOR, features=tower.features
        )
        card.write(folder, model, usage, difference)
    return ExportReport(str(directory), difference)


def stock_tower(model: AlphaClip) -> StockTower:
    """Return a model's image tower in transformers' words.

    Raises:
        ValueError: If transformers has no stock class for it.
    """
    return siglip_tower(model) if hasattr(model.visual, "trunk") else clip_tower(model)


def save_tower(tower: StockTower, folder: Path) -> None:
    """Write a tower with transformers' own `save_pretrained`.

    Raises:
        ValueError: If its weights do not fit the class.
    """
    import transformers

    config = getattr(transformers, tower.config_class)(**tower.config)
    twin = getattr(transformers, tower.model_class)(config)
    own = set(twin.state_dict())
    state = _renamed(tower.state, own)
    own -= {"vision_model.embeddings.position_ids"}  # a buffer that some versions save
    if own != set(state):
        raise ValueError(f"weights without a place in transformers: {own ^ set(state)}")
    twin.load_state_dict({**twin.state_dict(), **state})
    twin.save_pretrained(folder, safe_serialization=True)


def _renamed(state: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """Put SigLIP's keys where versions of transformers before 5 have them."""
    prefix = "vision_model."
    if set(state) <= own or not {prefix + key for key in state} <= own:
        return state
    return {prefix + key: value for key, value in state.items()}


@torch.no_grad()
def compare(model: AlphaClip, directory: str | Path) -> float:
    """Load an export with stock transformers and return its largest difference to `model`.

    The difference is relative to the largest feature, in fp32, over random images with random
    regions.
    """
    rgba = probe(model)
    return largest_difference(model.encode_image(rgba), stock_features(directory, rgba))


@torch.no_grad()
def stock_features(directory: str | Path, pixel_values: Tensor) -> Tensor:
    """Return the features that stock transformers computes with an export."""
    import transformers

    record = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    (name,) = record["architectures"]
    twin = getattr(transformers, name).from_pretrained(directory).eval()
    found: Any = twin(pixel_values=pixel_values)
    features: Tensor = found.image_embeds if hasattr(found, "image_embeds") else found.pooler_output
    return features


def write_processor(model: AlphaClip, folder: Path, channels: int) -> None:
    """Write the processor's config: arrays in, normalised channels out.

    Args:
        model: Tells sizes, geometry and normalisation.
        folder: The export.
        channels: 4 for RGBA, 3 for RGB.
    """
    n, size = model.normalisation, model.image_size
    squash = model.transform.geometry == "squash"
    record = {
        "image_processor_type": _PROCESSOR,
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "do_center_crop": not squash,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": size, "width": size} if squash else {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": 3 if model.transform.interpolation == "bicubic" else 2,
        "rescale_factor": 1 / 255,
        "image_mean": [*n.mean, n.alpha_mean][:channels],
        "image_std": [*n.std, n.alpha_std][:channels],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(record, indent=1) + "\n")
