"""What a benchmark leaves: figures with intervals as JSON and CSV, per-class tables, pictures."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpha_clip.evaluation.base import Benchmark, Scores, scores_of
from alpha_clip.evaluation.columns import Columns
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.visualize import plot_counts, plot_intervals

_CONFUSIONS = 20  # pairs in the picture of what is mixed up


def write_results(
    benchmark: Benchmark,
    columns: Columns,
    dropped: list[tuple[str, str]],
    file: Path,
    **about: Any,
) -> str:
    """Write all files about a run; returns the figures as lines to print.

    `NAME.json` has everything in short; `NAME.csv` the figures with their 95 % intervals (bootstrap
    over pictures); `NAME.png` draws them; `NAME.classes.csv` and `NAME.confusions.png` tell of
    classes, where there are any; `NAME.dropped.csv` lists what could not be used;
    a benchmark may have more (`Benchmark.write`).

    Args:
        benchmark: What was measured.
        columns: Its rows.
        dropped: Reason and detail of what could not be used.
        file: `NAME.json`.
        about: What else to record, such as the model.
    """
    outcomes = benchmark.outcomes(columns)
    scores = scores_of(benchmark, columns, outcomes)
    intervals = {name: o.interval() for name, o in outcomes.items() if name in scores}
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **about,
        "benchmark": f"{type(benchmark).__name__} {benchmark.variant()}".rstrip(),
        "settings": benchmark.settings,
        "scores": scores,
        "intervals": intervals,
        "dropped": Counter(reason for reason, _ in dropped),
    }
    _table(
        file.with_suffix(".csv"),
        ["figure", "value", "low", "high"],
        [[name, value, *intervals.get(name, ("", ""))] for name, value in scores.items()],
    )
    plot_intervals(_panels(scores, intervals), file.with_suffix(".png"))
    if classes := benchmark.classes():
        _write_classes(outcomes, classes, file.with_suffix(".classes.csv"))
    answers = benchmark.confusions(columns)
    if answers and (mixed := _mixed_up(*answers, classes)):
        title = "taken for something else (regions)"
        plot_counts(mixed, title, file.with_suffix(".confusions.png"))
    benchmark.write(columns, file)
    if dropped:
        _table(file.with_suffix(".dropped.csv"), ["reason", "detail"], dropped)
    file.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return _lines(scores, intervals)


def _lines(scores: Scores, intervals: dict[str, tuple[float, float]]) -> str:
    width = max(map(len, scores))
    lines = []
    for name, value in scores.items():
        text = f"{value:g}"  # a count
        if name in intervals:
            low, high = intervals[name]
            text = f"{value:.4f}  ({low:.4f}–{high:.4f})"
        lines.append(f"{name:<{width}}  {text}\n")
    return "".join(lines)


def _table(file: Path, header: list[str], rows: Sequence[Sequence[object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


def _write_classes(outcomes: dict[str, Outcome], classes: list[str], file: Path) -> None:
    """Write a row for each class: how many regions, and the mean of each grouped figure."""
    grouped = {n: o for n, o in outcomes.items() if o.groups is not None}
    means = {name: outcome.by_group() for name, outcome in grouped.items()}
    rows: list[list[object]] = []
    for number, label in enumerate(classes):
        found = [mean.get(number) for mean in means.values()]
        count = max((f[1] for f in found if f), default=0)
        rows.append([label, count, *(f[0] if f else "" for f in found)])
    header = [name.replace("mean per class", "top-1", 1) for name in means]
    header = [name.replace("top-1 top-5", "top-5") for name in header]
    _table(file, ["class", "regions", *header], rows)


def _panels(
    scores: Scores, intervals: dict[str, tuple[float, float]]
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Sort figures by kind, the part before the last `/`: `mean per class/alpha`."""
    panels: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, bounds in intervals.items():
        kind, _, way = name.rpartition("/")
        panels.setdefault(kind or "share right", {})[way] = (scores[name], *bounds)
    return panels


def _mixed_up(right: Any, answer: Any, classes: list[str]) -> dict[str, float]:
    """Return the pairs of classes that are mixed up most often, and how often."""
    pairs = zip(right.tolist(), answer.tolist(), strict=True)
    wrong = Counter((r, a) for r, a in pairs if r != a)
    return {f"{classes[r]}  →  {classes[a]}": n for (r, a), n in wrong.most_common(_CONFUSIONS)}
