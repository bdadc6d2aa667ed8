"""Export to ONNX: both towers as graphs, checked in onnxruntime.

Weights beyond 1.5 GB lie beside their graph in `image.onnx.data` or `text.onnx.data`, because a
file of ONNX can't hold 2 GB; keep the files together.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alpha_clip.export.base import ExportReport, check_difference, fresh_directory
from alpha_clip.export.model_card import Card
from alpha_clip.export.torch_export import (
    PREPROCESS_FILE,
    compare_runs,
    plain_towers,
    probes,
    write_preprocessing,
)
from alpha_clip.model import AlphaClip

IMAGE_FILE = "image.onnx"
TEXT_FILE = "text.onnx"
OPSET = 18
_INPUTS = {IMAGE_FILE: "rgba", TEXT_FILE: "tokens"}
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_NO_NOTES = Card()
_USAGE = f"""
import onnxruntime

# rgba: float32 [batch, 4, size, size], normalised as {PREPROCESS_FILE} says
image = onnxruntime.InferenceSession("{IMAGE_FILE}", providers=["CPUExecutionProvider"])
(features,) = image.run(None, {{"rgba": rgba}})
# tokens: int64 [batch, context_length]
text = onnxruntime.InferenceSession("{TEXT_FILE}", providers=["CPUExecutionProvider"])
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
        towers = zip(_INPUTS, plain_towers(model).values(), probes(model), strict=True)
        for name, tower, inputs in towers:
            _write(tower.cpu().float(), inputs, folder / name, model)
        write_preprocessing(model, folder)
        difference = compare(model, folder)
        check_difference(difference, tolerance)
        card.write(folder, model, _USAGE, difference)
    return ExportReport(str(directory), difference)


def compare(model: AlphaClip, directory: str | Path) -> float:
    """Run an export in onnxruntime and return its largest difference to `model`.

    The difference is relative to the largest feature, in fp32, over images with random regions and
    random texts, in batches of 1 and of 4.

    Raises:
        ValueError: If packages are missing.
    """
    _check_packages()
    image, text = (_runner(Path(directory) / name) for name in (IMAGE_FILE, TEXT_FILE))
    return compare_runs(model, image, text)


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"ONNX needs {', '.join(missing)}, which is not installed: "
            "pip install 'alpha-clip[onnx]'"
        )


def _write(tower: nn.Module, inputs: Tensor, file: Path, model: AlphaClip) -> None:
    """Write a tower as a graph for batches of any size."""
    try:
        program: Any = torch.onnx.export(
            tower,
            (inputs,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[_INPUTS[file.name]],
            output_names=["features"],
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


def _runner(file: Path) -> Callable[[Tensor], Tensor]:
    runtime = import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(inputs: Tensor) -> Tensor:
        (features,) = session.run(None, {_INPUTS[file.name]: inputs.numpy()})
        return torch.from_numpy(features)

    return run
