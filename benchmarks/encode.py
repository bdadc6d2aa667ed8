"""Encoding images: a tower without alpha, with it, folded, compiled, and the published one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from alpha_clip.pooled import pooled_features
from benchmarks.encoders import (
    ALPHA,
    COMPILED,
    DTYPES,
    ENCODE,
    FOLDED,
    PLAIN,
    PUBLISHED,
    Encoders,
    create_encoders,
)
from benchmarks.machine import at_matmul_rate, forward_flops
from benchmarks.published import published_code
from benchmarks.table import report, save, spread
from benchmarks.timing import Measured, Row, measure

TOWERS = (
    *("ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu"),
    *("RN50-quickgelu", "convnext_base", "ViT-SO400M-14-SigLIP"),
)
VERDICTS = (
    *((ALPHA, PLAIN), (FOLDED, PLAIN), (ENCODE, PLAIN)),
    *((PUBLISHED, ENCODE), (COMPILED, ENCODE)),
)
_FLOOR = "the rate of a large matrix product"
_GAIN = 1.05  # of a doubled batch, below which the device is taken to be full
_MOST = 1024  # images a batch


def encode(
    towers: list[str] | None = None,
    batches: list[int] | None = None,
    precisions: list[str] | None = None,
    published: Path | None = None,
    compile: bool | None = None,
    rounds: int = 30,
    budget_s: float = 40,
    device: str = "cpu",
    output: Path = Path("runs/benchmarks/encode.csv"),
) -> list[Row]:
    """Encode images; the time of open_clip's own tower, without alpha, is 1.

    "Of floor" is the share of the rate that a large matrix product reaches in the same round;
    convolutions that need fewer operations than were counted get above it. "By the first layer"
    works the ratio out from the only layer that differs, whose noise is a hundred times smaller.

    Args:
        towers: open_clip architectures; six by default.
        batches: Batch sizes; by default 1, 2, 4 and so on, as long as more images a second come.
        precisions: Of fp32, fp16 and bf16; on a GPU the last two, else fp32.
        published: A clone of https://github.com/SunzeY/AlphaCLIP, to compare with. It has OpenAI's
            towers only; beside bf16 it runs in fp16, because it has no bf16.
        compile: Whether to compile, too; on GPUs by default.
        rounds: How often to measure, at most.
        budget_s: Seconds for each batch size of each tower, after which five rounds are enough.
        device: Where to run.
        output: CSV file for the table.
    """
    gpu = device.startswith("cuda")
    code = None if published is None else published_code(published)
    compiled = gpu if compile is None else compile
    every: list[Measured] = []
    rows: list[Row] = []
    for name in towers or TOWERS:
        for precision in precisions or (["bf16", "fp16"] if gpu else ["fp32"]):
            with torch.inference_mode():
                encoders = create_encoders(name, precision, device, code)
                for found, first in _by_batch(encoders, batches, compiled, rounds, budget_s):
                    every.append(found)
                    rows += [*found.rows(), *_by_the_first_layer(found, first)]
                    save(rows, output, _FLOOR)
    report(rows, output, _FLOOR)
    for over, base in VERDICTS:
        sys.stdout.write(spread(every, over, base))
    return rows


def _by_batch(
    encoders: Encoders, batches: list[int] | None, compiled: bool, rounds: int, budget_s: float
) -> Iterator[tuple[Measured, Measured]]:
    """Measure towers, and first layers alone, by batch size until the device is full."""
    device, before = encoders.device, 0.0
    flops = forward_flops(pooled_features, encoders.model.visual, encoders.images(1))
    for batch in batches or [2**i for i in range(_MOST.bit_length())]:
        rgba = encoders.images(batch)
        case = f"{encoders.name}, {encoders.precision}, batch {batch}"
        ways = encoders.ways(rgba, compiled)
        floor = at_matmul_rate(batch * flops, device, DTYPES[encoders.precision])
        try:
            found = measure(case, ways, rounds, device, budget_s=budget_s, items=batch, floor=floor)
        except torch.cuda.OutOfMemoryError:
            sys.stdout.write(f"{case}: more than the memory holds\n")
            return
        layers = encoders.first_layers(rgba)
        yield found, measure(case, layers, 5 * rounds, device, budget_s=budget_s / 10)
        speed = batch / found.median(ENCODE)
        if batches is None and (speed < _GAIN * before or found.median(ENCODE) > budget_s / 5):
            return
        before = speed


def _by_the_first_layer(whole: Measured, first: Measured) -> list[Row]:
    """Work ratios out from the only layer that differs."""
    tower, base = 1000 * whole.median(PLAIN), 1000 * first.median(PLAIN)
    return [
        replace(
            row,
            variant=f"{row.variant} (by the first layer)",
            milliseconds=tower + row.milliseconds - base,
            ratio=1 + (row.ratio - 1) * base / tower,
            low=1 + (row.low - 1) * base / tower,
            high=1 + (row.high - 1) * base / tower,
            fastest=None,
            peak_mib=None,
        )
        for row in first.rows()[1:]
    ]
