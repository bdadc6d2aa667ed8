"""What a region costs: floating-point operations of the image tower, by each way of pointing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from alpha_clip import AlphaClip, AlphaEntry, create_model
from alpha_clip.evaluation.focus_baselines import FOCUS
from alpha_clip.many_regions import encode_many


def cost_of_entry(base: str, at: AlphaEntry, regions: int) -> float:
    """Return the operations for one of many regions of an image, with alpha somewhere.

    Args:
        base: The CLIP, as `create_model(checkpoint=...)` takes it.
        at: Where alpha enters.
        regions: Regions an image; they share what comes before alpha.
    """
    model = create_model(checkpoint=base, alpha_block=at)[0]
    rgba = _views(model, regions)
    rgb, alphas = rgba[:1, :3], rgba[None, :, 3:]
    return _count(lambda: encode_many(model.visual, rgb, alphas, regions)) / regions


def cost_of_way(base: str, way: str, regions: int) -> float:
    """Return the operations for one of many regions of an image, with a CLIP as it is.

    Args:
        base: The CLIP, as `create_model(checkpoint=...)` takes it.
        way: How it is pointed; a key of `FOCUS`.
        regions: Regions an image. What looks the same for all of them is passed once.
    """
    model = create_model(checkpoint=base)[0]
    rgba = _views(model, 1 if way == "no alpha" else regions)
    return _count(lambda: FOCUS[way].encode(model, rgba)) / regions


def _views(model: AlphaClip, count: int) -> torch.Tensor:
    """Return one image with many regions."""
    generator = torch.Generator().manual_seed(0)
    rgba = torch.randn(1, 4, model.image_size, model.image_size, generator=generator)
    rgba = rgba.repeat(count, 1, 1, 1)
    marks = torch.rand(count, 1, *rgba.shape[2:], generator=generator) > 0.5
    rgba[:, 3:] = torch.where(marks, 1.0, -1.0) * model.normalisation.whole_image
    return rgba


def _count(work: Callable[[], object]) -> float:
    # With gradients on: torch's fused attention for inference is not counted.
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())
