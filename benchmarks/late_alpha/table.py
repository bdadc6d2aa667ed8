"""Accuracy against cost: a table, and the frontier as a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from alpha_clip import AlphaEntry
from benchmarks.focus.methods import Method
from benchmarks.focus.table import COLUMNS, Figures, figures, markdown, read, write_csv
from benchmarks.late_alpha.cost import cost_of_entry, cost_of_way
from benchmarks.late_alpha.methods import AS_IT_IS, UNTRAINED_IN_ALPHA, Entry

_COST = "cost of a region"
_KINDS = {
    "line": ("alpha, repeated, with summary", "#2563eb", "o-"),
    "first": ("alpha at the first layer (the paper)", "#dc2626", "*"),
    "part": ("alpha without all of it", "#059669", "s"),
    "peer": ("CLIP without alpha, tuned or as it is", "#6b7280", "D"),
}

# Where names stand beside their points, in turn: those that lie close to each other keep apart.
_OFFSETS = {
    "line": [(4, 6)],
    "first": [(9, -10)],
    "part": [(9, -3), (9, -11), (9, 0)],
    "peer": [(8, 4), (8, -3), (8, -9)],
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: What it is called.
        kind: How it is drawn.
        cost: Operations for a region, divided by those of the paper's way.
        scores: Mean and standard deviation of each column.
    """

    name: str
    kind: str
    cost: float
    scores: Figures


def report(
    output: Path, places: Sequence[Entry], seeds: Sequence[int], base: str, regions: int
) -> None:
    """Write `late_alpha.csv`, `.md` and `.png`, and print the table.

    Args:
        output: Folder of the study.
        places: Where alpha enters.
        seeds: Which runs to take together.
        base: The CLIP that all started from.
        regions: Regions an image, for the cost of one.
    """
    paper = cost_of_entry(base, AlphaEntry.of(0), regions)
    rows = []
    for place in places:
        found = figures(place.method, _runs(output, place.method, seeds))
        cost = cost_of_entry(base, place.at, regions) / paper
        rows.append(Row(place.name, _kind(place.at), cost, found))
    tuned = _runs(output, UNTRAINED_IN_ALPHA, seeds)
    ways = [UNTRAINED_IN_ALPHA.way, *UNTRAINED_IN_ALPHA.others]
    peers = [(Method(f"tuned without alpha, {way}", way), tuned) for way in ways]
    peers += [(method, [read(output / "runs" / "base")]) for method in AS_IT_IS]
    for method, scores in peers:
        if found := figures(method, scores):
            if "region top-1" in found:  # not every tower can be masked
                cost = cost_of_way(base, method.way, regions) / paper
                rows.append(Row(method.name, "peer", cost, found))
    columns = [_COST, *COLUMNS]
    table = {row.name: {_COST: (row.cost, 0.0), **row.scores} for row in rows}
    write_csv(table, output / "late_alpha.csv", columns)
    text = markdown(table, columns)
    (output / "late_alpha.md").write_text(text)
    _draw(rows, output / "late_alpha.png", regions, len(seeds))
    sys.stdout.write(f"{text}{output / 'late_alpha.png'}\n")


def _runs(output: Path, method: Method, seeds: Sequence[int]) -> list[dict[str, float]]:
    return [read(output / "runs" / method.slug / str(seed)) for seed in seeds]


def _kind(at: AlphaEntry) -> str:
    if at.is_first_layer:
        return "first"
    return "line" if at.repeat and at.summary else "part"


def _draw(rows: Sequence[Row], file: Path, regions: int, seeds: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, 3)
    columns = ("region top-1", "held-out pairs", "image to text")
    for axes, column in zip(panels, columns, strict=True):
        for kind, (label, colour, style) in _KINDS.items():
            of_kind = [row for row in rows if row.kind == kind and column in row.scores]
            axes.errorbar(
                [row.cost for row in of_kind],
                [row.scores[column][0] for row in of_kind],
                yerr=[row.scores[column][1] for row in of_kind],
                fmt=style,
                color=colour,
                label=label,
                markersize=12 if kind == "first" else 5,
                linewidth=1.2,
            )
            if column != "image to text":
                _name(axes, of_kind, column, colour)
        axes.axvline(1 / 3, color="black", linewidth=0.6, linestyle=":")
        axes.set(xlabel="cost of a region / at the first layer", title=column, xlim=(0, 1.6))
        axes.set_ylim(bottom=-0.05 if column != "image to text" else 0)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(
        f"Where alpha enters: {regions} regions an image, mean and standard deviation of {seeds} "
        "seeds; numbers are blocks, the dotted line is a third of the cost",
        fontsize=10,
    )
    figure.savefig(file, dpi=110)


def _name(axes: Any, rows: Sequence[Row], column: str, colour: str) -> None:
    """Write beside points what they are; a CLIP as it is has no name."""
    named = [row for row in rows if not row.name.startswith("CLIP")]
    for row, offset in zip(named, cycle(_OFFSETS[rows[0].kind] if rows else []), strict=False):
        axes.annotate(
            row.name.removeprefix("block ").removeprefix("tuned without alpha, "),
            (row.cost, row.scores[column][0]),
            xytext=offset,
            textcoords="offset points",
            fontsize=7,
            color=colour,
        )
