"""Export to open_clip's own folder: `open_clip_config.json` and `open_clip_model.safetensors`.

Alpha is folded into four-channel stems, so no class of ours is needed. No config of open_clip can
ask for four channels, though: `create_model("local-dir:FOLDER")` alone refuses the weights, and the
model card shows the lines that widen the stem first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from alpha_clip.checkpoint import describe
from alpha_clip.export.base import (
    ExportReport,
    check_difference,
    fresh_directory,
    refuse_late_alpha,
)
from alpha_clip.export.model_card import Card
from alpha_clip.export.towers import ImageTower, TextTower, compare_runs
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import RGBA_CHANNELS, AlphaConv2d, fold_alpha

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_NO_NOTES = Card()
_USAGE = f"""
import open_clip
from torch import nn

model = open_clip.create_model("local-dir:.", load_weights=False, pretrained_text=False)
for name in {{stems}}:  # reads the picture: three channels become four
    stem = model.visual.get_submodule(name)
    stem.in_channels = 4
    stem.weight = nn.Parameter(stem.weight.new_empty(stem.out_channels, 4, *stem.kernel_size))
open_clip.load_checkpoint(model, "{WEIGHTS_FILE}")
features = model.eval().encode_image(rgba)  # float32 [batch, 4, size, size], normalised
"""


def export(
    model: AlphaClip,
    directory: str | Path,
    overwrite: bool = False,
    tolerance: float = 1e-5,
    card: Card = _NO_NOTES,
) -> ExportReport:
    """Write a model for open_clip in fp32, load it with stock open_clip, compare.

    Args:
        model: What to export; both towers.
        directory: Folder to write; it appears whole or not at all.
        overwrite: Whether to replace a folder that is there.
        tolerance: Largest difference between features, relative to the largest feature.
        card: What the model card says beyond what the model tells.

    Returns:
        Where it lies and how much it differs.

    Raises:
        ValueError: If stock open_clip can't build the tower, or the features differ.
    """
    clip, stems = copy_of(model)
    fold_alpha(clip.visual)
    with fresh_directory(Path(directory), overwrite) as folder:
        write_model(clip, describe(model), folder)
        difference = compare(model, folder)
        check_difference(difference, tolerance)
        card.write(folder, model, _USAGE.format(stems=stems), difference)
    return ExportReport(str(directory), difference)


def copy_of(model: AlphaClip) -> tuple[Any, list[str]]:
    """Return a copy of the open_clip model in fp32, on the CPU, and the names of its alpha stems.

    Raises:
        ValueError: If it has none any more, or alpha enters later.
    """
    refuse_late_alpha(model, "open_clip")
    clip: Any = deepcopy(model.clip).cpu().float()
    stems = [name for name, m in clip.visual.named_modules() if isinstance(m, AlphaConv2d)]
    if not stems:
        raise ValueError(f"the alpha channel of {model.name} is folded already; export it unfolded")
    return clip, stems


def write_model(clip: nn.Module, record: dict[str, Any], folder: Path) -> None:
    """Write open_clip's two files.

    Args:
        clip: The model, as open_clip is to have it.
        record: The config; without `alpha_clip` in it the model has three channels.
        folder: Where to.
    """
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    state = {k: v.contiguous().clone() for k, v in clip.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def compare(model: AlphaClip, directory: str | Path) -> float:
    """Load an export with stock open_clip and return its largest difference to `model`.

    The difference is relative to the largest feature, in fp32, over images with random regions
    (with the whole image as region for an export of three channels) and random texts.

    Raises:
        ValueError: If stock open_clip can't load it.
    """
    folder = Path(directory)
    whole_image = "alpha_clip" not in json.loads((folder / CONFIG_FILE).read_text())
    stems = [name for name, m in model.visual.named_modules() if isinstance(m, AlphaConv2d)]
    try:
        twin = _load(folder, [] if whole_image else stems)
    except (AttributeError, RuntimeError) as error:
        why = " ".join(str(error).split())[:150]
        raise ValueError(
            f"stock open_clip can't load {model.name} at {model.image_size} px ({why}); use "
            "save_checkpoint and alpha_clip.create_model"
        ) from error
    image, text = ImageTower(twin.visual), TextTower(twin)

    def run(rgba: Tensor) -> Tensor:
        features: Tensor = image(rgba[:, :3] if whole_image else rgba)
        return features

    return compare_runs(model, run, text, whole_image)


def _load(folder: Path, stems: list[str]) -> Any:
    """Load an export as its model card says."""
    import open_clip

    if not stems:
        return open_clip.create_model(f"local-dir:{folder}").eval()
    with _quiet():
        twin = open_clip.create_model(
            f"local-dir:{folder}", load_weights=False, pretrained_text=False
        )
    for name in stems:
        stem = twin.visual.get_submodule(name)
        stem.in_channels = RGBA_CHANNELS
        shape = (stem.out_channels, RGBA_CHANNELS, *stem.kernel_size)
        stem.weight = nn.Parameter(stem.weight.new_empty(shape))
    open_clip.load_checkpoint(twin, str(folder / WEIGHTS_FILE))
    return twin.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's word of random weights: they are loaded a moment later."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
