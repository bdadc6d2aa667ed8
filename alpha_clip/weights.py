"""Weight files as people have them: recognised by their content, never unpickled.

Published Alpha-CLIP visual towers, OpenAI's archives and state dicts, open_clip's files and our own
are all read into open_clip's names; what differs between the layouts is in `layouts.py`.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from alpha_clip.layouts import OWN_ALPHA, PUBLISHED_ALPHA, from_published, merge_lora
from alpha_clip.surgery import RGBA_CHANNELS

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and DDP; torch.compile
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# Whatever torch's readers trip over in a file that is damaged.
_DAMAGED = (
    *(SafetensorError, zipfile.BadZipFile, struct.error, RuntimeError, EOFError, OSError),
    *(LookupError, AssertionError, ValueError, TypeError, AttributeError, ArithmeticError),
    MemoryError,
)


@dataclass(frozen=True)
class Weights:
    """The weights of a file, in open_clip's names.

    Attributes:
        state: Name -> tensor; a visual tower alone has names that begin with `visual.`.
        visual_only: Whether the text tower is missing, as in a published Alpha-CLIP checkpoint.
        has_alpha: Whether there is a kernel for alpha.
        quick_gelu: Whether the content shows that the weights need QuickGELU: OpenAI's archives
            and whatever was trained from them by the published code.
        origin: Where they come from, for messages.
    """

    state: dict[str, Tensor]
    visual_only: bool
    has_alpha: bool
    quick_gelu: bool
    origin: str


def read_weights_file(file: str | os.PathLike[str], trusted: bool = False) -> Weights:
    """Read a weight file and say what it is.

    Args:
        file: A `.pt`, `.pth`, `.bin` or `.safetensors` file; the content decides, not the name.
        trusted: Whether the origin was verified; leaves out the warning about TorchScript.

    Returns:
        The weights in the precision they are stored in, LoRA weights merged.

    Raises:
        ValueError: If the file is missing, damaged, holds anything but tensors, or is no CLIP.
    """
    path = Path(file)
    state, archive = _read(path, trusted)
    state = _unwrap(state, path)
    extras = [state.pop(key) for key in _OPENAI_EXTRAS if key in state]
    state = merge_lora(state, str(path))
    if PUBLISHED_ALPHA in state:
        state = {f"visual.{key}": value for key, value in state.items()}
    if not any(key.startswith(("visual.", "image_encoder.")) for key in state):
        raise ValueError(
            f"{path} holds {len(state)} tensors ({_brief(state)}), but neither a published "
            f"Alpha-CLIP tower ({PUBLISHED_ALPHA}) nor a CLIP (visual.*)"
        )
    published = f"visual.{PUBLISHED_ALPHA}" in state
    if published:
        state = from_published(state)
    return Weights(
        state=state,
        visual_only=all(key.startswith("visual.") for key in state),
        has_alpha=any(_is_alpha(key, value) for key, value in state.items()),
        quick_gelu=published or archive or bool(extras),
        origin=str(path),
    )


def _is_alpha(key: str, value: Tensor) -> bool:
    """Tell a kernel for alpha, on its own or folded into the first convolution."""
    folded = key == "visual.conv1.weight" and value.shape[1:2] == (RGBA_CHANNELS,)
    return folded or (key.startswith("visual.") and key.endswith(OWN_ALPHA))


def _read(path: Path, trusted: bool) -> tuple[dict[str, Any], bool]:
    """Return what a file holds, and whether it is a TorchScript archive."""
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; expected weights (.pt, .pth, .safetensors, ...), or a "
            "folder written by save_checkpoint"
        )
    with path.open("rb") as stream:
        head = stream.read(64)
    try:
        if head[8:9] == b"{":  # safetensors: the length of a JSON header, then the header
            return dict(load_file(path)), False
        if head[:2] == b"PK" and _is_torchscript(path):
            return _read_torchscript(path, trusted), True
        return torch.load(path, map_location="cpu", weights_only=True), False
    except pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} holds more than tensors{f' ({reason[1]})' if reason else ''} or is no "
            f"checkpoint (it begins with {head[:16]!r}); refused, because unpickling it could run "
            "code. Ask for a state dict or safetensors, or compare its size with the original"
        ) from error
    except _DAMAGED as error:
        raise ValueError(
            f"{path} is damaged or cut short ({type(error).__name__} {str(error)[:200]}); compare "
            "its size with the original and fetch it again"
        ) from error


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path, trusted: bool) -> dict[str, Any]:
    """Read OpenAI's own format; torch has no weights-only reader for it."""
    if not trusted:
        warnings.warn(
            f"{path} is a TorchScript archive: torch can't read its weights without loading the "
            "program in it, so use it only if you trust where it came from",
            stacklevel=4,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.load. is deprecated")
        return dict(torch.jit.load(path, map_location="cpu").state_dict())


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Take off what training scripts put around a state dict."""
    while isinstance(content, dict):
        inner = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict")
    other = [k for k, v in content.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if other:
        raise ValueError(
            f"{path} is no state dict: {_brief([str(k) for k in other])} hold no tensors; save "
            "model.state_dict() on its own"
        )
    state = dict(content)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _brief(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
