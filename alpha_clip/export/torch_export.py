"""Export to `torch.export`: both towers as graphs that run without this package or open_clip.

With late alpha the image tower is two graphs: a trunk, once an image, and a head, once a region.

`torch.export.load` may unpickle parts of an archive: load those that you wrote or trust.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from alpha_clip.export.base import ExportReport, check_difference, fresh_directory
from alpha_clip.export.model_card import Card
from alpha_clip.export.towers import (
    PREPROCESS_FILE,
    Graph,
    compare_graphs,
    graph_names,
    graphs,
    plain_tower,
    write_preprocessing,
)
from alpha_clip.late_alpha import LateAlpha
from alpha_clip.model import AlphaClip

_NO_NOTES = Card()
_SUFFIX = ".pt2"
_IMAGE = f"""
# rgba: float32 [batch, 4, size, size], normalised as {PREPROCESS_FILE} says
image = torch.export.load("image.pt2").module()
features = image(rgba)
"""
_LATE = f"""
# rgb: float32 [images, 3, size, size]; alpha: float32 [regions, 1, size, size], both normalised as
# {PREPROCESS_FILE} says; image: int64 [regions], the number of each region's image
trunk = torch.export.load("trunk.pt2").module()
head = torch.export.load("head.pt2").module()
features = head(trunk(rgb), alpha, image)
"""
_TEXT = """
# tokens: int64 [batch, context_length]
text = torch.export.load("text.pt2").module()
text_features = text(tokens)
"""


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
        for name, graph in graphs(model).items():
            file = f"{name}{_SUFFIX}"
            torch.export.save(_trace(graph, file, model), folder / file)
        write_preprocessing(model, folder)
        difference = compare(model, folder)
        check_difference(difference, tolerance)
        image = _LATE if isinstance(model.visual, LateAlpha) else _IMAGE
        card.write(folder, model, "import torch\n" + image + _TEXT, difference)
    return ExportReport(str(directory), difference)


def compare(model: AlphaClip, directory: str | Path) -> float:
    """Load an export with `torch.export` and return its largest difference to `model`.

    The difference is relative to the largest feature, in fp32, over images with random regions and
    random texts, in batches of 1 and of 4.
    """
    runs = {
        name: torch.export.load(Path(directory) / f"{name}{_SUFFIX}").module()
        for name in graph_names(model)
    }
    return compare_graphs(model, runs)


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
    tower = plain_tower(model).to(device)
    compiled, dtype = torch.compile(tower, backend=backend, dynamic=True), model.dtype

    @torch.no_grad()
    def encode(rgba: Float[Tensor, "batch 4 size size"]) -> Float[Tensor, "batch dim"]:
        features: Tensor = compiled(rgba.to(device, dtype))
        return features

    return encode


def _trace(graph: Graph, file: str, model: AlphaClip) -> torch.export.ExportedProgram:
    """Trace a tower for batches of any size."""
    inputs, dynamic = tuple(graph.inputs.values()), graph.dynamic_shapes
    try:
        program = torch.export.export(graph.tower, inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise ValueError(
            f"torch.export can't trace {file} of {model.name} "
            f"({type(model.visual).__name__}): {str(error).splitlines()[0]}"
        ) from error
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it names files of this machine
    return program
