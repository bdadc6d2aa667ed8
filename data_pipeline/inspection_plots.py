"""What finished shards hold, drawn: one figure of small multiples."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SCATTERED = 500  # more pictures than this are counted in cells, not drawn one by one
_BARS = 15  # rejects' reasons; the rest of them is one bar
_LAYOUT = [["size", "regions", "phrases"], ["area", "fill", "phrases"], ["score", "words", "lost"]]
_GREY = "#777777"


def check_plots() -> None:
    """Make sure that pictures can be drawn.

    Raises:
        RuntimeError: If matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise RuntimeError("the plots need matplotlib: pip install 'alpha-clip[data]'") from error


def one_line(text: str, limit: int = 32) -> str:
    """Return a text without control characters, in one line of at most `limit` characters."""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    line = " ".join(words)
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def plot_contents(
    columns: Mapping[str, NDArray[np.float64]],
    phrases: Mapping[str, int],
    rejects: Mapping[str, int],
    title: str,
) -> bytes:
    """Draw sizes, counts, masks, scores, phrases and rejects.

    Args:
        columns: `width`, `height` and `regions_per_image`, a value an image; `area_share`,
            `box_fill` and `phrase_words`, a value a region; `score`, `sam_iou` and `stability`, a
            value for each region that has one. Any may be empty.
        phrases: The most frequent phrases and how often they occur, in the order of the bars.
        rejects: Reason -> how often.
        title: Above everything.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure  # not pyplot: no backend, no global state

    figure: Any = Figure(figsize=(13, 9.5), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    axes = figure.subplot_mosaic(_LAYOUT)
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.grid(axis="y", alpha=0.3, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.yaxis.get_major_locator().set_params(integer=True)
        panel.yaxis.set_major_formatter("{x:,.0f}")
    _plot_sizes(axes["size"], columns["width"], columns["height"])
    _plot_whole(axes["regions"], columns["regions_per_image"], ("regions an image", "images"))
    _plot_areas(axes["area"], columns["area_share"])
    _plot_fill(axes["fill"], columns["box_fill"])
    _plot_scores(axes["score"], columns)
    _plot_whole(axes["words"], columns["phrase_words"], ("words a phrase", "phrases"))
    _plot_bars(axes["phrases"], phrases, 20, ("most frequent phrases", "no phrases"))
    reasons = ("rejects by reason", "nothing was rejected")
    _plot_bars(axes["lost"], _longest(rejects), 9, reasons)
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # the font lacks some scripts; their phrases show as boxes
        warnings.filterwarnings("ignore", "Glyph|.*Unicode", UserWarning)
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _plot_sizes(axes: Any, width: NDArray[np.float64], height: NDArray[np.float64]) -> None:
    """Draw every picture's size: points while they are few, else counts in cells."""
    from matplotlib.ticker import LogFormatter, NullLocator

    if not _begin(axes, "image size", width, "no images"):
        return
    sides = np.log2(np.concatenate([width, height]))
    # Whole powers of two, and room on both sides for one size alone.
    low, high = np.floor(sides.min() - 0.1), np.ceil(sides.max() + 0.1)
    limits = (2**low, 2**high)
    axes.plot(limits, limits, color=_GREY, linewidth=0.7, alpha=0.6, zorder=0)
    if len(width) <= _SCATTERED:
        axes.scatter(width, height, s=22, alpha=0.45, linewidths=0)
    else:
        edges = np.logspace(low, high, 61, base=2)
        counts = axes.hist2d(width, height, (edges, edges), cmin=1, norm="log", cmap="viridis_r")
        bar = axes.figure.colorbar(counts[3], ax=axes, shrink=0.7, format="%g")
        bar.ax.set_title("images", fontsize=8)
        bar.ax.tick_params(labelsize=8, which="both")
        bar.ax.yaxis.set_minor_formatter(LogFormatter())  # says little unless within a decade
    ticks = 2 ** np.arange(low, high + 1, max(1, (high - low) // 6))
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log", base=2)
        axis.set_ticks(ticks, [f"{tick:.0f}" for tick in ticks])
        axis.set_minor_locator(NullLocator())
    axes.set(xlabel="width, px", ylabel="height, px", xlim=limits, ylim=limits, aspect="equal")


def _plot_whole(axes: Any, values: NDArray[np.float64], labels: tuple[str, str]) -> None:
    """Draw how often each whole number occurs; the few far above all others share a bar."""
    from matplotlib.ticker import MaxNLocator

    name, counted = labels
    if not _begin(axes, name, values, "no regions", "{:.3g}"):
        return
    limit = max(int(np.ceil(np.quantile(values, 0.995))), 8)
    step = 1 + limit // 40
    edges = np.arange(0.5, limit + step, step)
    axes.hist(np.minimum(values, edges[-1] - 0.25), edges, rwidth=0.92)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    more = int((values > edges[-1]).sum())
    axes.set(xlabel=f"last bar: up to {values.max():.0f}" if more else "", ylabel=counted)


def _plot_areas(axes: Any, values: NDArray[np.float64]) -> None:
    """Draw the masks' share of the image, whose logarithm is what spreads."""
    if not _begin(axes, "mask's share of the image", values, "no regions", "{:.1%}"):
        return
    low = min(-1.0, float(np.floor(np.log10(values.min()))))
    axes.hist(values, np.logspace(low, 0, _bins(len(values)) + 1))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set(ylabel="regions", xlim=(10**low, 1))


def _plot_fill(axes: Any, values: NDArray[np.float64]) -> None:
    """Draw which share of its box each mask fills; masks that leave their box may exceed 1."""
    if not _begin(axes, "mask area / box area", values, "no regions", "{:.2f}"):
        return
    most = float(values.max())
    limit = 1.0 if most <= 1 else 1.5
    bins = 3 * (_bins(len(values)) // 3)  # so that 1 is an edge in both cases
    axes.hist(np.minimum(values, limit), np.linspace(0, limit, bins + 1))
    axes.axvline(1, color=_GREY, linewidth=0.7)
    axes.set(xlabel=f"last bar: up to {most:.3g}" if most > limit else "", ylabel="regions")


def _plot_scores(axes: Any, columns: Mapping[str, NDArray[np.float64]]) -> None:
    """Draw the segmenter's own scores, or the source's where it gives none."""
    shown = {name: columns[name] for name in ("sam_iou", "stability") if len(columns[name])}
    title = "segmenter's scores" if shown else "source's score"
    shown = shown or {"score": columns["score"]}
    every = np.concatenate(list(shown.values()))
    if not _begin(axes, title, every, "no scores", "{:.2f}" if len(shown) == 1 else ""):
        return
    margin = max(0.01, 0.01 * np.abs(every).max())  # all scores may be the same
    low, high = np.floor(20 * (every.min() - margin)) / 20, np.ceil(20 * every.max()) / 20
    edges = np.linspace(low, high, _bins(len(every)) + 1)
    for name, values in shown.items():
        label = f"{name}, median {np.median(values):.2f}"
        axes.hist(values, edges, alpha=1 if len(shown) == 1 else 0.6, label=label)
    if len(shown) > 1:
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.set_ylabel("regions")


def _plot_bars(axes: Any, counts: Mapping[str, int], rows: int, texts: tuple[str, str]) -> None:
    """Draw a bar with its count for each name, the first on top, in room for at least `rows`."""
    numbers = list(counts.values())
    title, otherwise = texts
    logarithmic = bool(numbers) and max(numbers) > 100 * min(numbers)
    title += ", logarithmic" if logarithmic else ""
    if not _begin(axes, title, numbers, otherwise):
        return
    bars = axes.barh(range(len(numbers)), numbers, 0.75)
    axes.bar_label(bars, [f"{n:,}" for n in numbers], fontsize=8, padding=3)
    # Phrases may hold a `$`, which would be read as mathematics.
    names = [one_line(name) for name in counts]
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.set_ylim(max(len(numbers), rows) - 0.4, -0.6)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(0.5, 5 * max(numbers))  # a count of 1 stays visible
    else:
        axes.set_xlim(0, 1.15 * max(numbers))
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.xaxis.set_visible(False)  # the bars say their counts


def _longest(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the largest counts in falling order, and the sum of the others."""
    ranked = Counter(counts).most_common()
    if len(ranked) > _BARS:
        others = sum(count for _, count in ranked[_BARS - 1 :])
        ranked = [*ranked[: _BARS - 1], (f"{len(ranked) - _BARS + 1} others", others)]
    return dict(ranked)


def _bins(count: int) -> int:
    """Return a number of bins that `count` values fill without looking ragged."""
    return int(np.clip(np.sqrt(count), 8, 40))


def _begin(
    axes: Any,
    title: str,
    values: Sequence[float] | NDArray[np.float64],
    otherwise: str,
    median: str = "",
) -> bool:
    """Write a panel's title and its median, in the form `median`; return whether there are values.

    Without any, the panel says `otherwise`.
    """
    axes.set_title(title, loc="left", fontsize=10)
    if not len(values):
        axes.text(0.5, 0.5, otherwise, ha="center", va="center", color=_GREY, fontsize=11)
        axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
        axes.spines[:].set_visible(False)
        return False
    if median:
        text = f"median {median.format(np.median(values))}"
        axes.set_title(text, loc="right", fontsize=8, color=_GREY)
    return True
