"""Export to the paper's own package: two state dicts that its `alpha_clip.load` takes.

`alpha_clip.load("base.pt", alpha_vision_ckpt_pth="alpha_visual.pth")`: OpenAI's layout for both
towers without alpha, and the published layout for the image tower with it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from alpha_clip.export.base import (
    ExportReport,
    fresh_directory,
    largest_difference,
    probe,
    refuse_late_alpha,
)
from alpha_clip.export.model_card import Card
from alpha_clip.factory import create_from_weights
from alpha_clip.layouts import OWN_ALPHA, to_published
from alpha_clip.model import AlphaClip
from alpha_clip.weights import read_weights_file

BASE_FILE = "base.pt"
ALPHA_FILE = "alpha_visual.pth"
_NO_NOTES = Card()
_USAGE = f"""
import alpha_clip  # the paper's package, or this one

model, preprocess = alpha_clip.load("{BASE_FILE}", alpha_vision_ckpt_pth="{ALPHA_FILE}")
"""


def export(
    model: AlphaClip,
    directory: str | Path,
    overwrite: bool = False,
    tolerance: float = 1e-5,
    card: Card = _NO_NOTES,
) -> ExportReport:
    """Write a model in the published layout, read it back as the published code would, compare.

    The published code works the architecture out from the shapes: 64 channels a head, QuickGELU.
    A model that is not so comes back as another, which the comparison finds.

    Args:
        model: What to export; OpenAI's ViT or ModifiedResNet with OpenAI's text tower.
        directory: Folder to write; it appears whole or not at all.
        overwrite: Whether to replace a folder that is there.
        tolerance: Largest difference between features, relative to the largest feature.
        card: What the model card says beyond what the model tells.

    Returns:
        Where it lies and how much it differs.

    Raises:
        ValueError: If the published code has no such model, or the features differ.
    """
    refuse_late_alpha(model, "the published package")
    alpha = {k: v.float() for k, v in to_published(model.visual).items()}
    base = {k: _stored(v) for k, v in model.clip.state_dict().items() if not k.endswith(OWN_ALPHA)}
    with fresh_directory(Path(directory), overwrite) as folder:
        torch.save(base, folder / BASE_FILE)
        torch.save(alpha, folder / ALPHA_FILE)
        difference = compare(model, folder)
        if not difference <= tolerance:
            raise ValueError(
                f"the published code would compute other features ({difference:.1e} of the "
                "largest): it knows OpenAI's towers only, with QuickGELU and 64 channels a head"
            )
        card.write(folder, model, _USAGE, difference)
    return ExportReport(str(directory), difference)


@torch.no_grad()
def compare(model: AlphaClip, directory: str | Path) -> float:
    """Read an export as the published code does; return its largest difference to `model`.

    The difference is relative to the largest feature, in fp32, over images with random regions and
    random texts.
    """
    folder = Path(directory)
    base, alpha = (read_weights_file(folder / name) for name in (BASE_FILE, ALPHA_FILE))
    twin = create_from_weights(None, base, alpha).eval()
    rgba, generator = probe(model), torch.Generator().manual_seed(0)
    vocabulary, context = model.config["text_cfg"]["vocab_size"], twin.context_length
    tokens = torch.randint(1, vocabulary, (4, context), generator=generator)
    return max(
        largest_difference(model.encode_image(rgba), twin.encode_image(rgba)),
        largest_difference(model.encode_text(tokens), twin.encode_text(tokens)),
    )


def _stored(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous().clone()
    return value.float() if value.is_floating_point() else value
