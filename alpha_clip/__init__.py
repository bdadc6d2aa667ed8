"""Alpha-CLIP: any CLIP with a fourth channel that says where to look.

`import alpha_clip` is light: a name is imported from its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alpha_clip.checkpoint import save_checkpoint
    from alpha_clip.factory import create_model, load_checkpoint
    from alpha_clip.late_alpha import AlphaEntry
    from alpha_clip.model import AlphaClip
    from alpha_clip.published import available_models, load, tokenize
    from alpha_clip.regions import Box, RegionSample, region_to_alpha
    from alpha_clip.surgery import AlphaConv2d, add_alpha_channel, fold_alpha
    from alpha_clip.transforms import RegionAugment, RegionTransform

__all__ = [
    "AlphaClip",
    "AlphaConv2d",
    "AlphaEntry",
    "Box",
    "RegionAugment",
    "RegionSample",
    "RegionTransform",
    "add_alpha_channel",
    "available_models",
    "create_model",
    "fold_alpha",
    "load",
    "load_checkpoint",
    "region_to_alpha",
    "save_checkpoint",
    "tokenize",
]

__version__ = "0.1.0"

_HOME = {
    "AlphaClip": "model",
    "AlphaConv2d": "surgery",
    "AlphaEntry": "late_alpha",
    "Box": "regions",
    "RegionAugment": "transforms",
    "RegionSample": "regions",
    "RegionTransform": "transforms",
    "add_alpha_channel": "surgery",
    "available_models": "published",
    "create_model": "factory",
    "fold_alpha": "surgery",
    "load": "published",
    "load_checkpoint": "factory",
    "region_to_alpha": "regions",
    "save_checkpoint": "checkpoint",
    "tokenize": "published",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'alpha_clip' has no attribute {name!r}")
    value = getattr(import_module(f"alpha_clip.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
