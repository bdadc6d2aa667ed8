"""Comparing things in one run: interleaved rounds, medians, ratios of neighbours."""

from __future__ import annotations

import csv
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Row:
    """One variant of one case.

    Attributes:
        case: What is done.
        variant: How it is done.
        milliseconds: Median time.
        ratio: Median over the rounds of this variant's time divided by the first one's.
        low: First quartile of the ratios.
        high: Third quartile of the ratios.
        rounds: How often it was measured.
    """

    case: str
    variant: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    rounds: int


def compare(
    case: str,
    variants: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    warmup: int = 2,
) -> list[Row]:
    """Time variants against each other.

    In each round every variant runs once, in an order drawn anew, so that what slows the machine
    for a while slows all of them; a ratio is taken within its round.

    Args:
        case: What is done, for the table.
        variants: Name -> function; ratios are to the first. One that returns a float says by it
            how many seconds it took.
        rounds: How often to measure.
        device: Where they run; a GPU is waited for.
        warmup: Rounds before those that count.
    """
    names, order = list(variants), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for done in tqdm(range(-warmup, rounds), desc=case, unit="round", leave=False):
        order.shuffle(names)
        for name in names:
            _wait(device)
            start = time.perf_counter()
            own = variants[name]()
            _wait(device)
            passed = own if isinstance(own, float) else time.perf_counter() - start
            if done >= 0:
                seconds[name].append(passed)
    base = seconds[next(iter(variants))]
    rows = []
    for name in variants:
        ratios = [a / b for a, b in zip(seconds[name], base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        median = 1000 * statistics.median(seconds[name])
        rows.append(Row(case, name, median, middle, low, high, rounds))
    return rows


def report(rows: Sequence[Row], file: Path) -> None:
    """Print a table and write it as CSV."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    width = max(len(f"{row.case}, {row.variant}") for row in rows)
    sys.stdout.write(f"{'':{width}}  {'ms':>9}  {'ratio':>6}  quartiles\n")
    for row in rows:
        sys.stdout.write(
            f"{f'{row.case}, {row.variant}':{width}}  {row.milliseconds:9.1f}  {row.ratio:6.3f}  "
            f"{row.low:.3f}–{row.high:.3f}\n"
        )
    sys.stdout.write(f"{file}\n")


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
