"""Export to `torch.export`: both towers as graphs that run without this package or open_clip.

`torch.export.load` may unpickle parts of an archive: load those that you wrote or trust.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from alpha_clip.export.base import (
    ExportReport,
    check_difference,
    fresh_directory,
    largest_difference,
    probe,
)
from alpha_clip.export.model_card import Card
from alpha_clip.model import AlphaClip
from alpha_clip.pooled import pooled_features
from alpha_clip.surgery import AlphaConv2d, fold_alpha

IMAGE_FILE = "image.pt2"
TEXT_FILE = "text.pt2"
PREPROCESS_FILE = "preprocess.json"
_NO_NOTES = Card()
_USAGE = f"""
import torch

# rgba: float32 [batch, 4, size, size], normalised as {PREPROCESS_FILE} says
image = torch.export.load("{IMAGE_FILE}").module()
features = image(rgba)
# tokens: int64 [batch, context_length]
text = torch.export.load("{TEXT_FILE}").module()
text_features = text(tokens)
"""


class ImageTower(nn.Module):
    """An image tower alone: RGBA in, features out.

    Args:
        visual: An image tower; its alpha may be folded or not.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, rgba: Tensor) -> Tensor:
        """Embed images `[batch, 4, size, size]`."""
        return pooled_features(self.visual, rgba)


class TextTower(nn.Module):
    """A text tower alone: token ids in, features out.

    Args:
        clip: The open_clip model that it belongs to.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed texts, ids `[batch, context]`."""
        features: Tensor = self.clip.encode_text(tokens)  # type: ignore[operator]
        return features


def export(
    model: AlphaClip,
    directory: str | Path,
    overwrite: bool = False,
    tolerance: float = 1e-5,
    card: Card = _NO_NOTES,
) -> ExportReport:
    """Write both towers as `torch.export` archives in fp32, and compare them with the model.

    Args:
        model: What to export; any tower that `torch.export` can trace.
        directory: Folder to write; it appears whole or not at all.
        overwrite: Whether to replace a folder that is there.
        tolerance: Largest difference between features, relative to the largest feature.
        card: What the model card says beyond what the model tells.

    Returns:
        Where it lies and how much it differs.

    Raises:
        ValueError: If a tower can't be traced, or the features differ.
    """
    with fresh_directory(Path(directory), overwrite) as folder:
        for (name, tower), inputs in zip(plain_towers(model).items(), probes(model), strict=True):
            torch.export.save(_trace(tower.cpu().float(), inputs, name, model), folder / name)
        write_preprocessing(model, folder)
        difference = compare(model, folder)
        check_difference(difference, tolerance)
        card.write(folder, model, _USAGE, difference)
    return ExportReport(str(directory), difference)


def compare(model: AlphaClip, directory: str | Path) -> float:
    """Load an export with `torch.export` and return its largest difference to `model`.

    The difference is relative to the largest feature, in fp32, over images with random regions and
    random texts, in batches of 1 and of 4.
    """
    folder = Path(directory)
    image, text = (torch.export.load(folder / name).module() for name in (IMAGE_FILE, TEXT_FILE))
    return compare_runs(model, image, text)


def serving(
    model: AlphaClip, device: str | torch.device = "cpu", backend: str = "inductor"
) -> Callable[[Tensor], Tensor]:
    """Return the image tower for serving: folded, in eval mode, compiled at its first call.

    Args:
        model: What to serve; it stays as it is. Its type of weights is kept.
        device: Where to run.
        backend: Of `torch.compile`.

    Returns:
        A function from normalised RGBA `[batch, 4, size, size]`, on any device, to features.
    """
    tower = plain_towers(model)[IMAGE_FILE].to(device)
    compiled, dtype = torch.compile(tower, backend=backend, dynamic=True), model.dtype

    @torch.no_grad()
    def encode(rgba: Float[Tensor, "batch 4 size size"]) -> Float[Tensor, "batch dim"]:
        features: Tensor = compiled(rgba.to(device, dtype))
        return features

    return encode


def plain_towers(model: AlphaClip) -> dict[str, nn.Module]:
    """Copy both towers, in eval mode and with alpha folded, by the name of their file here."""
    clip: Any = deepcopy(model.clip).eval()
    if any(isinstance(m, AlphaConv2d) for m in clip.visual.modules()):
        fold_alpha(clip.visual)
    clip.requires_grad_(False)
    image = ImageTower(clip.visual)
    for part in ("visual", "text_decoder"):  # or the text tower's file would hold them, too
        if hasattr(clip, part):
            delattr(clip, part)
    return {IMAGE_FILE: image.eval(), TEXT_FILE: TextTower(clip).eval()}


def probes(model: AlphaClip) -> tuple[Tensor, Int[Tensor, "4 context"]]:
    """Return random images with random regions, and random texts of several lengths."""
    config, generator = model.config["text_cfg"], torch.Generator().manual_seed(0)
    vocabulary, context = config.get("vocab_size", 49408), config.get("context_length", 77)
    tokens = torch.randint(1, vocabulary - 1, (4, context), generator=generator)
    for row, length in enumerate((context, context - 1, context // 2, 2)):
        tokens[row, length - 1] = vocabulary - 1  # most tokenizers' end of text
        tokens[row, length:] = 0
    return probe(model), tokens


@torch.no_grad()
def compare_runs(
    model: AlphaClip,
    image: Callable[[Tensor], Tensor],
    text: Callable[[Tensor], Tensor],
    whole_image: bool = False,
) -> float:
    """Return the largest difference of two towers' features to the model's, in fp32.

    Args:
        model: What was exported.
        image: The image tower that came of it.
        text: The text tower that came of it.
        whole_image: Whether to point at the whole image instead of at random regions.
    """
    twin = deepcopy(model).cpu().float().eval()
    rgba, tokens = probes(model)
    if whole_image:
        rgba[:, 3:] = model.normalisation.whole_image
    pairs = [(twin.encode_image(rgba), image, rgba)]
    pairs.append((twin.encode_text(tokens), text, tokens))
    return max(
        largest_difference(ours[:batch], theirs(inputs[:batch]))
        for ours, theirs, inputs in pairs
        for batch in (1, 4)
    )


def write_preprocessing(model: AlphaClip, folder: Path) -> None:
    """Write `preprocess.json`: what both towers expect, for code that has no RegionTransform."""
    n, t = model.normalisation, model.transform
    record = {
        "size": t.size,
        "mean": list(n.mean),
        "std": list(n.std),
        "alpha_mean": n.alpha_mean,
        "alpha_std": n.alpha_std,
        "geometry": t.geometry,
        "interpolation": t.interpolation,
        "context_length": model.config["text_cfg"].get("context_length", 77),
    }
    (folder / PREPROCESS_FILE).write_text(json.dumps(record, indent=1) + "\n")


def _trace(
    tower: nn.Module, inputs: Tensor, name: str, model: AlphaClip
) -> torch.export.ExportedProgram:
    """Trace a tower for batches of any size."""
    dynamic = ({0: torch.export.Dim("batch")},)
    try:
        program = torch.export.export(tower, (inputs,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise ValueError(
            f"torch.export can't trace {name} of {model.name} "
            f"({type(model.visual).__name__}): {str(error).splitlines()[0]}"
        ) from error
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it names files of this machine
    return program
