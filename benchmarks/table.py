"""A table of ratios: on the terminal, as CSV, and as a picture."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.timing import Measured, Row

_COLOURS = ("#6b7280", "#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")
_Fact = Callable[[Row], str]
_FACTS: dict[str, _Fact] = {
    "ms": lambda row: f"{row.milliseconds:,.1f}",
    "ratio": lambda row: f"{row.ratio:.3f}",
    "quartiles": lambda row: f"{row.low:.3f}–{row.high:.3f}",
    "fastest": lambda row: _number(row.fastest, "{:.3f}"),
    "a second": lambda row: _number(
        row.per_second, "{:,.0f}" if (row.per_second or 0) >= 1000 else "{:.4g}"
    ),
    "of floor": lambda row: _number(row.of_floor, "{:.0%}"),
    "MiB": lambda row: _number(row.peak_mib, "{:,.0f}"),
}


def report(rows: Sequence[Row], file: Path, floor: str = "") -> None:
    """Print a table, and save it.

    Args:
        rows: What was measured.
        file: CSV file; the picture gets the same name with `.png`.
        floor: What "of floor" is a share of, for the captions.
    """
    facts = _used(rows)
    width = max(len(f"{row.case}, {row.variant}") for row in rows)
    cells = [[fact(row) for fact in facts.values()] for row in rows]
    wide = [max(len(h), *(len(c[i]) for c in cells)) for i, h in enumerate(facts)]
    head = "  ".join(f"{name:>{w}}" for name, w in zip(facts, wide, strict=True))
    sys.stdout.write(f"{'':{width}}  {head}\n")
    for row, texts in zip(rows, cells, strict=True):
        line = "  ".join(f"{text:>{w}}" for text, w in zip(texts, wide, strict=True))
        sys.stdout.write(f"{f'{row.case}, {row.variant}':{width}}  {line}\n")
    save(rows, file, floor)
    sys.stdout.write(f"{_caption(floor)}\n{file}, {file.with_suffix('.png')}\n")


def save(rows: Sequence[Row], file: Path, floor: str = "") -> None:
    """Write a table as CSV, and draw it beside that; in long runs after each case.

    Args:
        rows: What was measured.
        file: CSV file; the picture gets the same name with `.png`.
        floor: What "of floor" is a share of.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    where = machine()
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*(f.name for f in fields(Row)), "machine"])
        writer.writeheader()
        writer.writerows({**asdict(row), "machine": where} for row in rows)
    draw(rows, file.with_suffix(".png"), _caption(floor))


def spread(found: Sequence[Measured], variant: str, base: str) -> str:
    """Return a line with the least and the largest ratio of two variants over several cases."""
    ratios = {
        one.case: one.ratio(variant, base)[0]
        for one in found
        if variant in one.seconds and base in one.seconds
    }
    if not ratios:
        return ""
    least, largest = (choose(ratios, key=ratios.__getitem__) for choose in (min, max))
    return (
        f"time of {variant} / {base}: {ratios[least]:.3f} ({least}) to {ratios[largest]:.3f} "
        f"({largest})\n"
    )


def draw(rows: Sequence[Row], file: Path, caption: str) -> None:
    """Draw ratios as dots with their quartiles, a panel with the figures beside them.

    Args:
        rows: What was measured; the rows of a case follow each other.
        file: PNG file.
        caption: Line below the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    facts, places = _used(rows), _places(rows)
    bottom = places[-1] + 1
    layout = ConstrainedLayoutEngine(rect=(0, 0.02, 1, 0.98))  # the caption is below
    figure = Figure(figsize=(13, 1.1 + 0.26 * bottom), layout=layout)
    axes, table = figure.subplots(1, 2, width_ratios=[3, 1.1 + 0.9 * len(facts)], sharey=True)
    variants = list(dict.fromkeys(row.variant for row in rows))
    for row, y in zip(rows, places, strict=True):
        colour = _COLOURS[variants.index(row.variant) % len(_COLOURS)]
        axes.plot([row.low, row.high], [y, y], color=colour, linewidth=3, alpha=0.4)
        axes.plot(row.ratio, y, "o", color=colour, markersize=5)
        table.text(0, y, row.variant, va="center", fontsize=8, color=colour)
    axes.axvline(1, color="black", linewidth=0.8)
    if max(row.ratio for row in rows) > 4 * min(row.ratio for row in rows):
        axes.set_xscale("log")
    axes.set(xlabel="time / time of the first of each case", ylim=(bottom, -1.4))
    starts = [i for i, row in enumerate(rows) if i == 0 or rows[i - 1].case != row.case]
    axes.set_yticks([places[i] for i in starts], [rows[i].case for i in starts], fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    table.axis("off")
    table.set_xlim(0, 2.2 + len(facts))
    for column, (name, fact) in enumerate(facts.items()):
        x = 3.1 + column
        table.text(x, -1, name, ha="right", va="center", fontsize=8, weight="bold")
        for row, y in zip(rows, places, strict=True):
            table.text(x, y, fact(row), ha="right", va="center", fontsize=8)
    figure.text(0.005, 0.003, caption, fontsize=7, color="#6b7280", va="bottom")
    figure.savefig(file, dpi=120)


def _caption(floor: str) -> str:
    return machine() + (f"; floor: {floor}" if floor else "")


def _used(rows: Sequence[Row]) -> dict[str, _Fact]:
    return {n: fact for n, fact in _FACTS.items() if any(fact(row) for row in rows)}


def _places(rows: Sequence[Row]) -> list[float]:
    """Return where each row is drawn: a little space before each case."""
    places: list[float] = []
    for i, row in enumerate(rows):
        gap = 0.0 if i == 0 else 1.0 if rows[i - 1].case == row.case else 1.6
        places.append((places[-1] if places else 0.0) + gap)
    return places


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
