"""What the fourth channel costs: a tower without alpha, with it, and with it folded."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch

from alpha_clip import create_model, fold_alpha
from benchmarks.timing import Row, compare, report


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
            with torch.inference_mode():
                rows += compare(
                    f"{name}, batch {batch}",
                    {
                        "without alpha": lambda rgb=rgb, tower=plain: tower(rgb),
                        "alpha": lambda rgba=rgba, tower=alpha.visual: tower(rgba),
                        "alpha, folded": lambda rgba=rgba, tower=folded: tower(rgba),
                    },
                    rounds,
                    device,
                )
    report(rows, output)
    return rows
