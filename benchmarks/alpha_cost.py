"""What the fourth channel costs: a tower without alpha, with it, and with it folded."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from alpha_clip import create_model, fold_alpha
from benchmarks.timing import Row, compare, report

WITHOUT = "without alpha"


def alpha_cost(
    architectures: list[str] | None = None,
    batches: list[int] | None = None,
    rounds: int = 15,
    device: str = "cpu",
    output: Path = Path("runs/benchmarks/alpha_cost.csv"),
) -> list[Row]:
    """Encode images with and without alpha; the time without is 1.

    Args:
        architectures: open_clip architectures; ViT-B-16 and RN50, on a GPU ViT-L-14 as well.
        batches: Batch sizes.
        rounds: How often to measure.
        device: Where to run; bf16 on a GPU, else fp32.
        output: CSV file for the table.
    """
    import open_clip

    gpu = device.startswith("cuda")
    rows: list[Row] = []
    for name in architectures or ["ViT-B-16", "RN50", *(["ViT-L-14"] if gpu else [])]:
        precision = "bf16" if gpu else "fp32"
        plain = open_clip.create_model(name, precision=precision, device=device).visual.eval()
        alpha = create_model(name, precision=precision, device=device)[0]
        folded = fold_alpha(deepcopy(alpha.visual))
        for batch in batches or ([1, 64, 256] if gpu else [1, 8]):
            size = alpha.image_size
            rgba = torch.randn(batch, 4, size, size, device=device, dtype=alpha.dtype)
            rgb = rgba[:, :3].contiguous()
            towers = {WITHOUT: plain, "alpha": alpha.visual, "alpha, folded": folded}
            case = f"{name}, batch {batch}"
            with torch.inference_mode():
                whole = compare(case, _calls(towers, rgb, rgba), rounds, device)
                stems = {k: next(m for m in t.modules() if _is_stem(m)) for k, t in towers.items()}
                first = compare(case, _calls(stems, rgb, rgba), 10 * rounds, device)
            rows += whole + _by_the_first_layer(whole, first)
    report(rows, output)
    return rows


def _calls(
    layers: dict[str, nn.Module], rgb: torch.Tensor, rgba: torch.Tensor
) -> dict[str, Callable[[], object]]:
    return {k: partial(layer, rgb if k == WITHOUT else rgba) for k, layer in layers.items()}


def _is_stem(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.in_channels in (3, 4)


def _by_the_first_layer(whole: list[Row], first: list[Row]) -> list[Row]:
    """Work the ratio out from the only layer that differs: its noise is a hundred times smaller."""
    tower, base = whole[0].milliseconds, first[0].milliseconds
    return [
        replace(
            row,
            variant=f"{row.variant} (first layer)",
            ratio=1 + (row.milliseconds - base) / tower,
            low=1 + (row.low - 1) * base / tower,
            high=1 + (row.high - 1) * base / tower,
        )
        for row in first[1:]
    ]
