"""Comparing runs of one benchmark: a table and a plot, with the paper's figures beside."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from alpha_clip.evaluation.paper import PAPER
from alpha_clip.visualize import plot_bars

_BARS = 8  # figures in the plot; more would not be legible


def compare(files: list[str], output: str) -> str:
    """Write a table (`NAME.md`, `NAME.csv`) and a plot (`NAME.png`) of several runs.

    Args:
        files: What `alpha-clip eval` wrote, `NAME.json`, at least two of the same benchmark.
        output: The table, `NAME.md`; the others get its name with other endings.

    Returns:
        The table.

    Raises:
        ValueError: If a file is none of them, or they are of different benchmarks or data.
    """
    if len(files) < 2:
        raise ValueError(f"expected at least two results to compare, got {len(files)}")
    records = {name: _read(file) for name, file in zip(_names(files), files, strict=True)}
    kinds = {record["benchmark"] for record in records.values()}
    if len(kinds) > 1:
        raise ValueError(f"expected results of one benchmark, got {', '.join(sorted(kinds))}")
    (kind,) = kinds
    counts = {
        json.dumps({k: v for k, v in r["scores"].items() if k not in r["intervals"]})
        for r in records.values()
    }
    if len(counts) > 1:
        raise ValueError(
            f"the results are of different data: {'; '.join(sorted(counts))}; evaluate them on "
            "the same"
        )
    columns = {name: record["scores"] for name, record in records.items()}
    paper = {f"{name} (paper)": figures for name, figures in PAPER.get(kind, {}).items()}
    figures = list(dict.fromkeys(figure for scores in columns.values() for figure in scores))
    paper = {name: found for name, found in paper.items() if found.keys() & set(figures)}
    file = Path(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = _markdown(figures, records, paper)
    file.write_text(text)
    with file.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        everything = {**columns, **paper}
        writer.writerow(["figure", *everything])
        writer.writerows([f, *(s.get(f, "") for s in everything.values())] for f in figures)
    drawn = _drawn(figures, records, paper)
    series = {n: {f: s[f] for f in drawn if f in s} for n, s in {**columns, **paper}.items()}
    top = max(value for values in series.values() for value in values.values())
    plot_bars(series, kind, file.with_suffix(".png"), limit=top or 1.0)
    return text


def _read(file: str) -> dict[str, Any]:
    try:
        record = json.loads(Path(file).read_text())
        sound = record["scores"].keys() >= record["intervals"].keys() and record["benchmark"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no result of alpha-clip eval: {error}") from error
    if not sound:
        raise ValueError(f"{file} is no result of alpha-clip eval: it lacks scores")
    found: dict[str, Any] = record
    return found


def _names(files: list[str]) -> list[str]:
    """Return what tells the files apart: their names, with as much of the folder as needed."""
    for depth in range(1, 20):
        names = ["/".join(Path(f).with_suffix("").parts[-depth:]) for f in files]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"a result is given twice: {', '.join(files)}")


def _markdown(
    figures: list[str], records: dict[str, dict[str, Any]], paper: dict[str, dict[str, float]]
) -> str:
    lines = [
        f"| | {' | '.join([*records, *paper])} |",
        "|---" * (1 + len(records) + len(paper)) + "|",
    ]
    for figure in figures:
        cells = [_cell(record, figure) for record in records.values()]
        cells += [f"{known[figure]:.4f}" if figure in known else "" for known in paper.values()]
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(record: dict[str, Any], figure: str) -> str:
    if figure not in record["scores"]:
        return ""
    value = record["scores"][figure]
    if figure not in record["intervals"]:
        return f"{value:g}"
    low, high = record["intervals"][figure]
    return f"{value:.4f} ({low:.4f}–{high:.4f})"


def _drawn(
    figures: list[str], records: dict[str, dict[str, Any]], paper: dict[str, dict[str, float]]
) -> list[str]:
    """Choose what to plot: what the paper has, too, else the first figures that all runs have."""
    known = [f for f in figures if any(f in p for p in paper.values())]
    common = [f for f in figures if all(f in r["intervals"] for r in records.values())]
    return (known or common or figures)[:_BARS]
