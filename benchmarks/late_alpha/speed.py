"""Many regions of an image by where alpha enters: regions a second, in one run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from alpha_clip import AlphaClip, create_model
from alpha_clip.surgery import alpha_parameters
from benchmarks.machine import at_matmul_rate
from benchmarks.table import report
from benchmarks.timing import Row, measure

_FLOOR = "the rate of a large matrix product, for alpha in front of block 0"
_TOLERANCE = 1e-5


def late_alpha_speed(
    architecture: str = "ViT-B-16-quickgelu",
    blocks: list[int] = [0, 3, 6, 8, 9, 10, 11],  # noqa: B006 - shown by --help, never changed
    regions: int = 32,
    rounds: int = 15,
    budget_s: float = 240,
    device: str = "cpu",
    output: Path = Path("runs/benchmarks/late_alpha_speed.csv"),
) -> list[Row]:
    """Embed many regions of one image with `encode_regions`; the first block is 1.

    Args:
        architecture: Whose tower; its weights are random.
        blocks: In front of which blocks alpha enters; 0 is the paper's place.
        regions: Regions of the image.
        rounds: How often to measure, at most.
        budget_s: Seconds after which five rounds are enough.
        device: Where to run; bf16 on a GPU, else fp32.
        output: CSV file for the table.

    Raises:
        ValueError: If sharing changes the features: on a CPU by more than 1e-5 of the largest.
    """
    precision = "bf16" if device.startswith("cuda") else "fp32"
    encoders: dict[str, Callable[[], torch.Tensor]] = {}
    size, dtype, flops = 0, torch.float32, 0.0
    for block in blocks:
        model = create_model(architecture, precision=precision, device=device, alpha_block=block)[0]
        for kernel in alpha_parameters(model.visual):
            nn.init.normal_(kernel, std=0.02)
        size, dtype = model.image_size, model.dtype
        rgb, alphas = _regions_of_one(size, regions, device)
        if device == "cpu":
            _check(model, rgb, alphas[:, :4])
        encoders[f"block {block}"] = _encoder(model, rgb, alphas)
        flops = flops or _flops(model, rgb, alphas)
    with torch.inference_mode():
        found = measure(
            *(f"{architecture}, {regions} regions", encoders, rounds, device),
            warmup=1,
            budget_s=budget_s,
            items=regions,
            floor=at_matmul_rate(flops, device, dtype),
        )
    rows = found.rows()
    report(rows, output, _FLOOR)
    for row in rows[1:]:
        sys.stdout.write(
            f"{row.variant}: {1 / row.ratio:.2f} x the regions/s of {rows[0].variant}\n"
        )
    return rows


def _regions_of_one(size: int, regions: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rgb = torch.randn(1, 3, size, size, generator=generator)
    alphas = torch.full((1, regions, 1, size, size), -1.92)
    corners = torch.randint(0, size // 2, (regions, 2), generator=generator).tolist()
    for region, (x, y) in enumerate(corners):
        alphas[0, region, 0, y : y + size // 3, x : x + size // 3] = 1.92
    return rgb.to(device), alphas.to(device)


def _encoder(
    model: AlphaClip, rgb: torch.Tensor, alphas: torch.Tensor
) -> Callable[[], torch.Tensor]:
    return lambda: model.encode_regions(rgb, alphas)


def _flops(model: AlphaClip, rgb: torch.Tensor, alphas: torch.Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    one = alphas[:, :1]
    with FlopCounterMode(display=False) as counter:  # fused attention is counted with gradients
        model.encode_regions(rgb, one)
    return float(counter.get_total_flops()) * alphas.shape[1]


@torch.no_grad()
def _check(model: AlphaClip, rgb: torch.Tensor, alphas: torch.Tensor) -> None:
    shared = model.encode_regions(rgb, alphas)[0]
    alone = torch.cat([model.encode_image(rgb, alpha[None]) for alpha in alphas[0]])
    difference = float((shared - alone).abs().max() / alone.abs().max())
    if not difference <= _TOLERANCE:
        raise ValueError(f"sharing changes the features by {difference:.1e} of the largest")
