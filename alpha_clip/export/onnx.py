"""Export to ONNX: both towers as graphs, checked in onnxruntime.

Weights beyond 1.5 GB lie beside their graph in `image.onnx.data` or `text.onnx.data`, because a
file of ONNX can't hold 2 GB; keep the files together. With late alpha the image tower is two
graphs: a trunk, once an image, and a head, once a region.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpha_clip.export.base import ExportReport, check_difference, fresh_directory
from alpha_clip.export.model_card import Card
from alpha_clip.export.towers import (
    PREPROCESS_FILE,
    Graph,
    compare_graphs,
    graph_names,
    graphs,
    write_preprocessing,
)
from alpha_clip.late_alpha import LateAlpha
from alpha_clip.model import AlphaClip

OPSET = 18
_SUFFIX = ".onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_NO_NOTES = Card()
_IMAGE = f"""
# rgba: float32 [batch, 4, size, size], normalised as {PREPROCESS_FILE} says
image = session("image.onnx")
(features,) = image.run(None, {{"rgba": rgba}})
"""
_LATE = f"""
# rgb: float32 [images, 3, size, size]; alpha: float32 [regions, 1, size, size], both normalised as
# {PREPROCESS_FILE} says; image: int64 [regions], the number of each region's image
trunk, head = session("trunk.onnx"), session("head.onnx")
(tokens,) = trunk.run(None, {{"rgb": rgb}})
(features,) = head.run(None, {{"image_tokens": tokens, "alpha": alpha, "image": image}})
"""
_USAGE = """
import onnxruntime

def session(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
{image}
# tokens: int64 [batch, context_length]
text = session("text.onnx")
(text_features,) = text.run(None, {{"tokens": tokens}})
"""


def export(
    model: AlphaClip,
    directory: str | Path,
    overwrite: bool = False,
    tolerance: float = 1e-4,
    card: Card = _NO_NOTES,
) -> ExportReport:
    """Write both towers as ONNX graphs in fp32, run them in onnxruntime, compare.

    Args:
        model: What to export; any tower that `torch.export` can trace.
        directory: Folder to write; it appears whole or not at all.
        overwrite: Whether to replace a folder that is there.
        tolerance: Largest difference between features, relative to the largest feature.
        card: What the model card says beyond what the model tells.

    Returns:
        Where it lies and how much it differs.

    Raises:
        ValueError: If packages are missing, ONNX can't express a tower, or the features differ.
    """
    _check_packages()
    with fresh_directory(Path(directory), overwrite) as folder:
        for name, graph in graphs(model).items():
            _write(graph, folder / f"{name}{_SUFFIX}", model)
        write_preprocessing(model, folder)
        difference = compare(model, folder)
        check_difference(difference, tolerance)
        image = _LATE if isinstance(model.visual, LateAlpha) else _IMAGE
        card.write(folder, model, _USAGE.format(image=image), difference)
    return ExportReport(str(directory), difference)


def compare(model: AlphaClip, directory: str | Path) -> float:
    """Run an export in onnxruntime and return its largest difference to `model`.

    The difference is relative to the largest feature, in fp32, over images with random regions and
    random texts, in batches of 1 and of 4.

    Raises:
        ValueError: If packages are missing.
    """
    _check_packages()
    files = {name: Path(directory) / f"{name}{_SUFFIX}" for name in graph_names(model)}
    return compare_graphs(model, {name: _runner(file) for name, file in files.items()})


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"ONNX needs {', '.join(missing)}, which is not installed: "
            "pip install 'alpha-clip[onnx]'"
        )


def _write(graph: Graph, file: Path, model: AlphaClip) -> None:
    """Write a tower as a graph for batches of any size."""
    try:
        with warnings.catch_warnings():
            # Alphas and their images' numbers have one length, and the graph says so once.
            warnings.filterwarnings("ignore", "# The axis name")
            program: Any = torch.onnx.export(
                graph.tower,
                tuple(graph.inputs.values()),
                dynamo=True,
                dynamic_shapes=graph.dynamic_shapes,
                input_names=list(graph.inputs),
                output_names=[graph.output],
                opset_version=OPSET,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise ValueError(
            f"ONNX can't express {file.stem} of {model.name} ({type(model.visual).__name__}): "
            f"{str(error).splitlines()[0]}; torch_export might"
        ) from error
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, which name files of this machine
    program.save(file)


def _runner(file: Path) -> Callable[..., Tensor]:
    runtime = import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        (result,) = session.run(None, given)
        return torch.from_numpy(result)

    return run
