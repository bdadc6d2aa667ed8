"""Reading and writing our own weights: a folder with safetensors and a JSON that says the rest.

`open_clip_config.json` has open_clip's own schema (`model_cfg`, `preprocess_cfg`) and one more key,
`alpha_clip`. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alpha_clip.late_alpha import FIRST_LAYER, AlphaEntry
from alpha_clip.layouts import split_folded
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import alpha_entry
from alpha_clip.transforms import Normalisation, RegionTransform

FORMAT = 1
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "model.safetensors"
# open_clip's words for our geometries; a crop around the region ends in a square, too.
_RESIZE_MODES = {
    "center_crop": "shortest",
    "pad": "longest",
    "squash": "squash",
    "crop_box": "squash",
}


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint folder says about its weights.

    Attributes:
        name: Architecture, in open_clip's spelling.
        model_cfg: open_clip's model config.
        transform: Makes the tower's input.
        base: Where the weights came from that alpha was added to, if that is known.
        entry: Where alpha enters the tower.
    """

    name: str
    model_cfg: dict[str, Any]
    transform: RegionTransform
    base: str | None
    entry: AlphaEntry = FIRST_LAYER


def save_checkpoint(model: AlphaClip, directory: str | os.PathLike[str]) -> Path:
    """Write a model: `model.safetensors` and `open_clip_config.json`.

    Both files appear whole or not at all; the weights come last, so a folder that has them is
    complete.

    Args:
        model: What to save; both towers and the logit scale.
        directory: Folder to write to; made if missing.

    Returns:
        The folder.
    """
    return write_checkpoint(describe(model), model.clip.state_dict(), directory)


def describe(model: AlphaClip) -> dict[str, Any]:
    """Return what `open_clip_config.json` says about a model: enough to build it again."""
    n, t = model.normalisation, model.transform
    return {
        "model_cfg": model.config,
        "preprocess_cfg": {
            "size": t.size,
            "mean": list(n.mean),
            "std": list(n.std),
            "interpolation": t.interpolation,
            "resize_mode": _RESIZE_MODES[t.geometry],
        },
        "alpha_clip": {
            "format": FORMAT,
            "name": model.name,
            "base": model.base,
            "geometry": t.geometry,
            "scale": t.scale,
            "alpha_mean": n.alpha_mean,
            "alpha_std": n.alpha_std,
            "alpha_block": asdict(alpha_entry(model.visual)),
            "versions": {p: _version(p) for p in ("alpha-clip", "open_clip_torch", "torch")},
        },
    }


def write_checkpoint(
    record: dict[str, Any], state: dict[str, Tensor], directory: str | os.PathLike[str]
) -> Path:
    """Write a folder as `save_checkpoint` does.

    Args:
        record: As `describe` gives it.
        state: Weights of both towers and the logit scale.
        directory: Folder to write to; made if missing.

    Returns:
        The folder.

    Raises:
        OSError: If it can't be written, to a full disk, say; what was there before still is.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config, weights = folder / (CONFIG_FILE + ".tmp"), folder / (WEIGHTS_FILE + ".tmp")
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    try:
        config.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        save_file(plain, weights, metadata={"format": "pt"})
        with weights.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        config.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)
        raise OSError(
            f"{folder} could not be written ({error}); what was there before still is: make room"
        ) from error
    os.replace(config, folder / CONFIG_FILE)
    os.replace(weights, folder / WEIGHTS_FILE)
    return folder


def read_config(directory: str | os.PathLike[str]) -> CheckpointConfig:
    """Read what a folder written by `save_checkpoint` says about its weights.

    Raises:
        ValueError: If the folder is not such a checkpoint, or its config is damaged.
    """
    file = Path(directory) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(
            f"expected {directory} to be a folder written by save_checkpoint, but it has no "
            f"{CONFIG_FILE}"
        )
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} is not the config of an alpha_clip checkpoint: {error}"
        ) from error
    return parse_config(record, str(file))


def parse_config(record: Any, origin: str) -> CheckpointConfig:
    """Check what `describe` gave.

    Args:
        record: The content of an `open_clip_config.json`.
        origin: Where it is from, for messages.

    Raises:
        ValueError: If it is not that.
    """
    try:
        ours, size = record["alpha_clip"], record["preprocess_cfg"]
        if ours["format"] != FORMAT:
            raise ValueError(f"format {ours['format']!r}; this version reads format {FORMAT}")
        normalisation = Normalisation(
            mean=tuple(float(v) for v in size["mean"]),  # type: ignore[arg-type]
            std=tuple(float(v) for v in size["std"]),  # type: ignore[arg-type]
            alpha_mean=float(ours["alpha_mean"]),
            alpha_std=float(ours["alpha_std"]),
        )
        # These keys came later than the first folders of this format.
        interpolation = size.get("interpolation", "bicubic")
        geometry, scale = ours.get("geometry", "center_crop"), float(ours.get("scale", 1.5))
        transform = RegionTransform(
            int(size["size"]), normalisation, geometry, scale, interpolation
        )
        base = ours.get("base")
        name, model_cfg = str(ours["name"]), dict(record["model_cfg"])
        entry = AlphaEntry(**ours.get("alpha_block", asdict(FIRST_LAYER)))
        return CheckpointConfig(name, model_cfg, transform, base, entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{origin} is not the config of an alpha_clip checkpoint: {type(error).__name__} "
            f"{error}"
        ) from error


def read_weights(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights of a folder written by `save_checkpoint`.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    file = Path(directory) / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"{directory} has no {WEIGHTS_FILE}; was it saved to the end?")
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}; copy or train it again") from error


def load_weights(module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load a state dict into a module; every key and shape has to fit.

    Args:
        module: What to load into.
        state: The weights.
        origin: Where they come from, for the message.

    Raises:
        ValueError: Listing the keys that are missing, left over, or of another shape.
    """
    own, state = module.state_dict(), split_folded(module, state)
    wrong = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}"
            for k in sorted(own.keys() & state.keys())
            if own[k].shape != state[k].shape
        ],
    }
    problems = [f"{len(keys)} {what}: {_brief(keys)}" for what, keys in wrong.items() if keys]
    if problems:
        raise ValueError(
            f"the weights of {origin} do not fit {type(module).__name__} ({'; '.join(problems)}); "
            "create the model with the architecture (image_size, alpha_block) that they are of"
        )
    module.load_state_dict(state)


def _brief(keys: list[str]) -> str:
    shown = ", ".join(keys[:5])
    return shown if len(keys) <= 5 else f"{shown} and {len(keys) - 5} more"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
