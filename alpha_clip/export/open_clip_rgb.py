"""Export to open_clip for consumers that give RGB alone: the whole image is the region.

A plain CLIP of three channels that computes what alpha gives with "everything" marked, where that
can be done exactly; `open_clip.create_model("local-dir:FOLDER")` loads it as it is.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from alpha_clip.checkpoint import describe
from alpha_clip.export.base import ExportReport, check_difference, fresh_directory
from alpha_clip.export.model_card import Card
from alpha_clip.export.open_clip import compare, copy_of, write_model
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import RGBA_CHANNELS, AlphaConv2d

_NO_NOTES = Card()
_USAGE = """
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
# RGB alone; the region is the whole image
features = model.eval().encode_image(preprocess(image)[None])
"""


def export(
    model: AlphaClip,
    directory: str | Path,
    overwrite: bool = False,
    tolerance: float = 1e-5,
    card: Card = _NO_NOTES,
) -> ExportReport:
    """Write a model of three channels for open_clip in fp32, load it with stock open_clip, compare.

    Args:
        model: What to export; both towers.
        directory: Folder to write; it appears whole or not at all.
        overwrite: Whether to replace a folder that is there.
        tolerance: Largest difference between features, relative to the largest feature.
        card: What the model card says beyond what the model tells.

    Returns:
        Where it lies and how much it differs from the model with the whole image as region.

    Raises:
        ValueError: If stock open_clip can't build the tower, if a fixed alpha can't be folded
            exactly, or if the features differ.
    """
    clip, _ = copy_of(model)
    fix_alpha(clip.visual, model.normalisation.whole_image)
    record = describe(model)
    del record["alpha_clip"]
    with fresh_directory(Path(directory), overwrite) as folder:
        write_model(clip, record, folder)
        difference = compare(model, folder)
        check_difference(difference, tolerance)
        card.write(folder, model, _USAGE, difference)
    return ExportReport(str(directory), difference)


def fix_alpha(visual: nn.Module, alpha: float) -> nn.Module:
    """Turn an alpha tower into one of three channels that has one alpha everywhere, in place.

    Without padding a constant alpha adds a constant to each channel of the stem's output. It goes
    into the bias; in a ViT of open_clip's own, which has none, into the positions of the patches.

    Args:
        visual: A tower treated by `add_alpha_channel`.
        alpha: Normalised alpha of every pixel.

    Returns:
        The same tower.

    Raises:
        ValueError: If a constant alpha is no constant there.
    """
    from open_clip.transformer import VisionTransformer

    stems = {n: m for n, m in visual.named_modules() if isinstance(m, AlphaConv2d)}
    for name, stem in stems.items():
        positions = isinstance(visual, VisionTransformer) and name == "conv1"
        if stem.padding not in ("valid", (0, 0)) or (stem.bias is None and not positions):
            why = "has no bias" if stem.padding in ("valid", (0, 0)) else "pads with zeros"
            raise ValueError(
                f"{type(visual).__name__}.{name} {why}: one alpha everywhere can't be folded "
                "exactly; export it with four channels, --format open_clip"
            )
    for name, stem in stems.items():
        constant = alpha * stem.weight_alpha.detach().sum((1, 2, 3))
        plain = nn.Conv2d.__new__(nn.Conv2d)
        plain.__dict__.update(stem.__dict__)
        plain._parameters = {k: v for k, v in stem._parameters.items() if k != "weight_alpha"}
        plain.in_channels = RGBA_CHANNELS - 1
        if stem.bias is not None:
            plain._parameters["bias"] = nn.Parameter(stem.bias.detach() + constant)
        else:
            visual.get_parameter("positional_embedding").data[1:] += constant
        visual.set_submodule(name, plain)
    return visual
