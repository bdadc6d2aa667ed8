"""Running a benchmark: part by part, on one device or several, going on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from pathlib import Path
from typing import TypeAlias

import torch
from torch import multiprocessing as mp
from tqdm import tqdm

from alpha_clip.evaluation.base import Benchmark
from alpha_clip.evaluation.columns import Columns, join
from alpha_clip.evaluation.journal import Journal, ListedDrops, fingerprint
from alpha_clip.model import AlphaClip

MakeModel: TypeAlias = Callable[[str], AlphaClip]
"""Takes a device; returns the model on it. For several devices it has to be picklable."""


def run_benchmark(
    benchmark: Benchmark,
    make_model: MakeModel,
    folder: Path,
    devices: list[str],
    max_dropped: float = 0.01,
) -> tuple[Columns, list[tuple[str, str]]]:
    """Score the parts that are not done yet, and return all of them.

    Args:
        benchmark: What to measure.
        make_model: Makes the model.
        folder: Where to keep what is done; other settings or other weights have a folder of their
            own in it.
        devices: Where to run; each has a process of its own and every so many-th part.
        max_dropped: Share of pictures that may be unusable.

    Returns:
        The columns of all parts, and what was dropped: reason and detail.

    Raises:
        ValueError: If more was dropped, as soon as that is certain.
        RuntimeError: If one of the processes fails.
    """
    model = make_model(devices[0])
    journal = Journal(folder / fingerprint(benchmark, benchmark.models(model)))
    todo = [part for part in benchmark.parts() if not journal.has(part)]
    benchmark.folder = journal.folder
    sent = copy(benchmark)  # without what is prepared for this device
    if todo:
        benchmark.prepare(model)  # before the others begin: they find what it keeps
    context = mp.get_context("spawn")
    others = [
        context.Process(
            target=_process,
            args=(sent, make_model, device, journal.folder, todo[i :: len(devices)]),
            kwargs={"max_dropped": max_dropped},
        )
        for i, device in enumerate(devices)
        if i and todo[i :: len(devices)]
    ]
    for process in others:
        process.start()
    try:
        _work(benchmark, model, journal, todo[:: len(devices)], max_dropped, show=True)
        for process in others:
            process.join()
    finally:
        for process in others:
            process.terminate()
    if any(process.exitcode for process in others):
        raise RuntimeError(
            "a process on another device failed, see above; what is done stays: run again"
        )
    dropped: list[tuple[str, str]] = []
    columns = join(_done(journal, benchmark.parts(), dropped), journal.folder)
    check_drops(dropped, benchmark.parts().values(), max_dropped)
    return columns, dropped


def _done(
    journal: Journal, parts: Iterable[str], dropped: list[tuple[str, str]]
) -> Iterator[Columns]:
    """Read what is done, part by part; add to `dropped`."""
    for part in parts:
        columns, drops = journal.read(part)
        dropped += drops
        yield columns


def _process(
    benchmark: Benchmark,
    make_model: MakeModel,
    device: str,
    folder: Path,
    parts: list[str],
    max_dropped: float,
) -> None:
    with torch.inference_mode():
        model = make_model(device)
        benchmark.prepare(model)
        _work(benchmark, model, Journal(folder), parts, max_dropped, show=False)


def _work(
    benchmark: Benchmark,
    model: AlphaClip,
    journal: Journal,
    parts: list[str],
    max_dropped: float,
    show: bool,
) -> None:
    """Score some parts; the benchmark is prepared."""
    sizes = benchmark.parts()
    dropped: list[tuple[str, str]] = []
    total = sum(sizes[part] for part in parts)
    with tqdm(total=total, desc="evaluate", unit="picture", disable=not show) as bar:
        for part in parts:
            drops = ListedDrops()
            columns = benchmark.score(model, part, drops, bar.update)
            dropped += drops.list
            check_drops(dropped, sizes.values(), max_dropped)
            journal.write(part, columns, drops.list)


def check_drops(dropped: list[tuple[str, str]], sizes: Iterable[int], limit: float) -> None:
    """Refuse to go on once more was dropped than is allowed.

    Args:
        dropped: Reason and detail of each.
        sizes: Pictures in each part.
        limit: Share of pictures that may be unusable.

    Raises:
        ValueError: If it was more; it names a few.
    """
    total = sum(sizes)
    if len(dropped) > limit * total:
        few = "; ".join(f"{reason}: {detail}" for reason, detail in dropped[:5])
        raise ValueError(
            f"{len(dropped)} pictures or regions, of {total} pictures, can't be used, more than "
            f"max_dropped = {limit:g} allows: {few}{' …' if len(dropped) > 5 else ''}"
        )
