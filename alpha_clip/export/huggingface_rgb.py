"""Export to stock transformers for consumers that give RGB alone: the whole image is the region.

What to put where no region can come in: a tower of three channels that computes what alpha gives
with "everything" marked, exactly.
"""

from __future__ import annotations

from pathlib import Path

import torch

from alpha_clip.export.base import (
    ExportReport,
    check_difference,
    fresh_directory,
    largest_difference,
    probe,
)
from alpha_clip.export.huggingface import save_tower, stock_features, stock_tower, write_processor
from alpha_clip.export.model_card import Card
from alpha_clip.model import AlphaClip

_NO_NOTES = Card()
_USAGE = """
from transformers import CLIPImageProcessor, {model}

tower = {model}.from_pretrained(".")  # RGB; the region is the whole image
processor = CLIPImageProcessor.from_pretrained(".")
features = tower(**processor(image, return_tensors="pt")).{features}
"""


@torch.no_grad()
def export(
    model: AlphaClip,
    directory: str | Path,
    overwrite: bool = False,
    tolerance: float = 1e-5,
    card: Card = _NO_NOTES,
) -> ExportReport:
    """Write a model's image tower, three channels, for transformers; compare the two.

    Args:
        model: What to export; a ViT of open_clip's own, or SigLIP's.
        directory: Folder to write; it appears whole or not at all.
        overwrite: Whether to replace a folder that is there.
        tolerance: Largest difference between features, relative to the largest feature.
        card: What the model card says beyond what the model tells.

    Returns:
        Where it lies and how much it differs from the model with the whole image as region.

    Raises:
        ValueError: If transformers has no stock class for the tower, or the features differ.
    """
    tower = stock_tower(model).seeing_everything(model.normalisation.whole_image)
    with fresh_directory(Path(directory), overwrite) as folder:
        save_tower(tower, folder)
        write_processor(model, folder, channels=3)
        rgb = probe(model)[:, :3]
        difference = largest_difference(model.encode_image(rgb), stock_features(folder, rgb))
        check_difference(difference, tolerance)
        usage = _USAGE.format(model=tower.model_class, features=tower.features)
        card.write(folder, model, usage, difference)
    return ExportReport(str(directory), difference)
