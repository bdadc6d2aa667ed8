"""Comparing things in one run: interleaved rounds, medians, ratios of neighbours."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

_LEAST_ROUNDS = 5


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
        fastest: Its fastest round divided by the first one's fastest, if known: what is left when
            nothing else disturbs.
        per_second: Items a second at the median, if they were counted.
        of_floor: Share of what the machine reaches at its best, between 0 and 1, if known.
        peak_mib: Memory on top of what was there before, in MiB, if measured.
    """

    case: str
    variant: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    rounds: int
    fastest: float | None = None
    per_second: float | None = None
    of_floor: float | None = None
    peak_mib: float | None = None


@dataclass(frozen=True)
class Measured:
    """What was timed.

    Attributes:
        case: What was done.
        seconds: Variant -> seconds of each round; the rounds correspond.
        items: Items a round; 0 if not counted.
        floor_s: Seconds that the machine would need at its best, by round; empty if not known.
        peak_mib: Variant -> memory, where measured.
    """

    case: str
    seconds: dict[str, list[float]]
    items: int = 0
    floor_s: list[float] = field(default_factory=list)
    peak_mib: dict[str, float] = field(default_factory=dict)

    def median(self, variant: str) -> float:
        """Return the median seconds of a variant."""
        return statistics.median(self.seconds[variant])

    def ratio(self, variant: str, base: str) -> tuple[float, float, float]:
        """Return median, first and third quartile of the ratios, each taken within its round."""
        both = zip(self.seconds[variant], self.seconds[base], strict=True)
        low, middle, high = statistics.quantiles([a / b for a, b in both], n=4, method="inclusive")
        return middle, low, high

    def fastest(self, variant: str, base: str) -> float:
        """Return the ratio of the fastest rounds."""
        return min(self.seconds[variant]) / min(self.seconds[base])

    def of_floor(self, variant: str) -> float | None:
        """Return the median share of its best that the machine reached, if that is known."""
        if not self.floor_s:
            return None
        both = zip(self.floor_s, self.seconds[variant], strict=True)
        return statistics.median(best / took for best, took in both)

    def rows(self) -> list[Row]:
        """Return a row for each variant; ratios are to the first."""
        base = next(iter(self.seconds))
        rows = []
        for name, times in self.seconds.items():
            middle, low, high = self.ratio(name, base)
            median = self.median(name)
            row = Row(
                *(self.case, name, 1000 * median, middle, low, high, len(times)),
                fastest=self.fastest(name, base),
                per_second=self.items / median if self.items else None,
                of_floor=self.of_floor(name),
                peak_mib=self.peak_mib.get(name),
            )
            rows.append(row)
        return rows


def measure(
    case: str,
    variants: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    warmup: int = 2,
    budget_s: float = math.inf,
    items: int = 0,
    floor: Callable[[], float] | None = None,
) -> Measured:
    """Time variants against each other.

    In each round every variant runs once, in an order drawn anew, so that what slows the machine
    for a while slows all of them.

    Args:
        case: What is done, for the table.
        variants: Name -> function. One that returns a float says by it how many seconds it took.
        rounds: How often to measure.
        device: Where they run; a GPU is waited for, and the memory of each variant measured.
        warmup: Rounds before those that count.
        budget_s: When to stop before all the rounds are done; five are done anyway.
        items: Items that each round works on.
        floor: Says how many seconds a round would take at the machine's best; asked in each round,
            because shared machines have better and worse hours.
    """
    names, order = list(variants), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = {}
    best: list[float] = []
    began = time.perf_counter()
    for done in tqdm(range(-warmup, rounds), desc=case, unit="round", leave=False):
        order.shuffle(names)
        for name in names:
            passed, peak = _once(variants[name], device)
            if done >= 0:
                seconds[name].append(passed)
            if peak is not None:
                peaks[name] = peak
        if done >= 0 and floor is not None:
            best.append(floor())
        if done == -1:
            began = time.perf_counter()
        if done + 1 >= _LEAST_ROUNDS and time.perf_counter() - began > budget_s:
            break
    return Measured(case, seconds, items, best, peaks)


def compare(
    case: str,
    variants: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    warmup: int = 2,
) -> list[Row]:
    """Time variants against each other as `measure` does; return their rows."""
    return measure(case, variants, rounds, device, warmup).rows()


def _once(work: Callable[[], object], device: str) -> tuple[float, float | None]:
    """Return the seconds of one call and, on a GPU, its memory in MiB."""
    on_gpu = device.startswith("cuda")
    before = 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    own = work()
    if on_gpu:
        torch.cuda.synchronize(device)
    passed = own if isinstance(own, float) else time.perf_counter() - start
    if not on_gpu:
        return passed, None
    return passed, (torch.cuda.max_memory_allocated(device) - before) / 2**20
