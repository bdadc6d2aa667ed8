"""The figures of all methods as a table and a plot: mean and standard deviation over the seeds."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.focus.methods import AS_IT_IS, TRAINED, Method

# Column -> file and key of the score; `{way}` is how the method points.
COLUMNS = {
    "region top-1": ("regions", "{way}"),
    "held-out pairs": ("regions", "held out/{way}"),
    "of its image": ("regions", "within image/{way}"),
    "cosine": ("regions", "within image cosine/{way}"),
    "image to text": ("retrieval", "image to text R@1"),
    "text to image": ("retrieval", "text to image R@1"),
}
_CONTROLS = ["shuffled alpha", "alpha of another object", "inverted alpha", "alpha only"]
Figures = dict[str, tuple[float, float]]  # mean and standard deviation


def report(output: Path, seeds: list[int]) -> None:
    """Write `focus.csv`, `focus.md` and `focus.png`, and print the table.

    Args:
        output: Folder of the benchmark.
        seeds: Which runs to take together.
    """
    rows: dict[str, Figures] = {}
    for method in AS_IT_IS:
        scores = [read(output / "runs" / "base")]
        if any(f"regions/{method.way}" in s for s in scores):  # not every tower can be masked
            rows[method.name] = figures(method, scores)
    runs = {m.name: [read(output / "runs" / m.slug / str(seed)) for seed in seeds] for m in TRAINED}
    rows |= {method.name: figures(method, runs[method.name]) for method in TRAINED}
    controls: dict[str, Figures] = {}
    for control in _CONTROLS:
        way = Method(control, control)
        controls[f"all blocks, {control}"] = figures(way, runs["all blocks"])
    write_csv({**rows, **controls}, output / "focus.csv")
    text = markdown(rows) + "\n" + markdown(controls)
    (output / "focus.md").write_text(text)
    _plot(rows, output / "focus.png")
    sys.stdout.write(f"{text}{output / 'focus.png'}\n")


def read(folder: Path) -> dict[str, float]:
    """Return the scores of one run as `file/key`.

    Args:
        folder: Of the run.
    """
    found = {}
    for name in ("regions", "retrieval"):
        record: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        found |= {f"{name}/{key}": float(value) for key, value in record["scores"].items()}
    return found


def figures(method: Method, runs: list[dict[str, float]]) -> Figures:
    """Return mean and standard deviation over runs, by column.

    Args:
        method: Whose way of pointing to look for.
        runs: Scores of each, as `read` gives them.
    """
    found = {}
    for column, (file, key) in COLUMNS.items():
        name = f"{file}/{key.format(way=method.way)}"
        values = [scores[name] for scores in runs if name in scores]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[column] = (statistics.fmean(values), spread)
    return found


def write_csv(
    rows: dict[str, Figures], file: Path, columns: Sequence[str] = tuple(COLUMNS)
) -> None:
    """Write a row for each method, two columns for each figure."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["method", *(part for c in columns for part in (c, f"{c} sd"))])
        for name, figures in rows.items():
            cells = [figures.get(column, ("", "")) for column in columns]
            writer.writerow([name, *(value for cell in cells for value in cell)])


def markdown(rows: dict[str, Figures], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """Return the figures as a table for a README."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in rows.items():
        cells = [_cell(*figures[c]) if c in figures else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(mean: float, spread: float) -> str:
    return f"{mean:.3f} ± {spread:.3f}" if spread else f"{mean:.3f}"


def _plot(rows: dict[str, Figures], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 0.4 * len(rows) + 1.2), sharey=True)
    panels = (
        ("Which region is it? (top-1)", ["region top-1", "held-out pairs"]),
        ("Are regions of one image alike? (cosine)", ["cosine"]),
        ("Is the whole image kept? (R@1)", ["image to text", "text to image"]),
    )
    for axis, (title, columns) in zip(axes, panels, strict=True):
        for i, column in enumerate(columns):
            place = [y + 0.38 * (i - (len(columns) - 1) / 2) for y in range(len(rows))]
            means = [figures.get(column, (0.0, 0.0)) for figures in rows.values()]
            axis.barh(
                place,
                [mean for mean, _ in means],
                xerr=[spread for _, spread in means],
                height=0.36 if len(columns) > 1 else 0.6,
                label=column,
                error_kw={"lw": 0.8},
            )
        axis.set_title(title, fontsize=10, pad=22)
        axis.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", lw=0.4)
        axis.set_axisbelow(True)
        if len(columns) > 1:
            above = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.99), "ncols": len(columns)}
            axis.legend(fontsize=8, frameon=False, **above)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
