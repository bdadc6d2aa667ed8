"""How time and memory grow with images, regions, workers and shards."""

from __future__ import annotations

import csv
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alpha_clip.demo import config_file
from benchmarks.growth_work import GROWTHS, TORCH, draw, serve
from benchmarks.machine import machine
from benchmarks.timing import measure

LIMIT = 1.05  # the most that exponents should be
_FLAT_MIB, _FLAT_SHARE = 5.0, 0.1  # memory that rises by less does not grow
_LEAST_MIB = 0.1  # less can't be seen, and what is nothing has no logarithm
_COLUMNS = 5  # of the picture
_GREY, _BLUE = "#6b7280", "#2563eb"
_COLOURS = {"yes": "#dc2626", "unclear": "#d97706", "no": "black"}


@dataclass(frozen=True)
class Point:
    """Work of one size.

    Attributes:
        growth: What is done.
        axis: What there is more of.
        size: How much of it.
        seconds: Time of each round; the rounds of all sizes correspond.
        mib: Memory on top of what the process had when all was imported and prepared.
    """

    growth: str
    axis: str
    size: int
    seconds: tuple[float, ...]
    mib: float

    def record(self) -> dict[str, Any]:
        """Return its line of `growth.csv`: of the seconds the median and the quartiles."""
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        times = {"seconds": middle, "low": low, "high": high, "rounds": len(self.seconds)}
        return asdict(self) | times


class Exponent(NamedTuple):
    """The `b` of what grows as `size ** b`: the slope of logarithms.

    A constant cost hides growth among small sizes, so that the larger ones are fitted alone, too.

    Attributes:
        all: Of all sizes.
        upper: Of the upper half of them.
    """

    all: float
    upper: float

    def __str__(self) -> str:
        return f"{self.all:.2f} ({self.upper:.2f})"


def fit(sizes: Sequence[int], values: Sequence[float]) -> Exponent:
    """Fit an exponent to values above 0, the sizes ascending."""
    x, y = np.log(np.array(sizes, float)), np.log(np.array(values, float))
    slopes = [float(np.polyfit(x[i:], y[i:], 1)[0]) for i in (0, (len(sizes) - 1) // 2)]
    return Exponent(*slopes)


def fit_memory(sizes: Sequence[int], mib: Sequence[float]) -> Exponent | None:
    """Fit an exponent to memory above 0, the sizes ascending.

    Returns:
        `None` where it is flat: it rises by less than 5 MiB, or less than a tenth.
    """
    if max(mib) - mib[0] < max(_FLAT_MIB, _FLAT_SHARE * mib[0]):
        return None
    return fit(sizes, mib)


class Fitted:
    """The points of a growth, ascending, with the exponents of their medians.

    Attributes:
        time: Exponent of the time.
        memory: Exponent of the memory; `None`, if it is flat.
        above: "yes" if one is above the limit; "unclear" if that of the time is, but not in three
            quarters of the rounds, so that more of them may tell; else "no".
    """

    def __init__(self, points: list[Point]) -> None:
        self.points, self.sizes = points, [point.size for point in points]
        self.time = fit(self.sizes, [statistics.median(point.seconds) for point in points])
        self.memory = fit_memory(self.sizes, [point.mib for point in points])
        rounds = zip(*(point.seconds for point in points), strict=True)
        worst = [max(fit(self.sizes, seconds)) for seconds in rounds]
        low, *_ = statistics.quantiles(worst, n=4, method="inclusive")
        sure = max((low, *(self.memory or ()))) > LIMIT
        self.above = "yes" if sure else "unclear" if max(self.time) > LIMIT else "no"

    def record(self) -> dict[str, Any]:
        """Return its line of `growth_exponents.csv`."""
        first, last, memory = self.points[0], self.points[-1], self.memory
        return {
            "growth": last.growth,
            "sizes": f"{first.size}–{last.size} {last.axis}",
            "seconds": f"{statistics.median(last.seconds):.3g}",
            "time": f"{self.time.all:.3f}",
            "upper half": f"{self.time.upper:.3f}",
            "MiB": f"{last.mib:.1f}",
            "memory": f"{memory.all:.3f}" if memory else "flat",
            "its upper half": f"{memory.upper:.3f}" if memory else "flat",
            f"above {LIMIT}": self.above,
        }


def growth(
    only: list[str] | None = None,
    largest: float = 1.0,
    rounds: int = 5,
    name: str | None = None,
    output: Path = Path("runs/benchmarks/growth.csv"),
) -> list[Point]:
    """Measure how time and memory grow, and fit exponents: 1 is linear, 2 quadratic.

    Each size has a process of its own, with one thread; the sizes take turns. Of the data loader's
    workers it is the processor's time in all. Memory is read from /proc, so this wants Linux.
    Beside the points lie their exponents, `growth_exponents.csv`, and `growth.png` with both.

    Args:
        only: Some of the growths; `null` measures all.
        largest: By how much to multiply the sizes, but for the numbers of workers.
        rounds: How often to measure.
        name: An open_clip architecture; `null` is the demo's tiny one.
        output: CSV file for the points.

    Raises:
        ValueError: If `only` names something else, or `rounds` or what is left of the sizes is
            below 2.
        RuntimeError: If one of the processes fails.
    """
    sizes = _sizes(only, largest)
    if rounds < 2:
        raise ValueError(f"expected at least two rounds, for quartiles, got rounds={rounds}")
    tower = name or f"local-dir:{config_file('models/tiny')}"
    context = multiprocessing.get_context("forkserver")  # imports once; each process is a copy
    torch = any(GROWTHS[growth].torch for growth in sizes)
    context.set_forkserver_preload(["benchmarks.growth_work", *(TORCH if torch else ())])
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as folder:
        for growth, some in sizes.items():
            data = {size: Path(folder) / GROWTHS[growth].axis / str(size) for size in some}
            for size, place in data.items():
                draw(GROWTHS[growth].axis, place, size)
            points += _measured(growth, data, rounds, tower)
    report(points, output)
    return points


def _sizes(only: list[str] | None, largest: float) -> dict[str, list[int]]:
    """Return the sizes of each growth that is asked for."""
    sizes: dict[str, list[int]] = {}
    for growth in only or GROWTHS:
        if growth not in GROWTHS:
            raise ValueError(f"no growth is called {growth!r}; expected some of {list(GROWTHS)}")
        factor = 1.0 if GROWTHS[growth].axis == "workers" else largest
        sizes[growth] = sorted({max(1, round(size * factor)) for size in GROWTHS[growth].sizes})
        if len(sizes[growth]) < 2:
            raise ValueError(
                f"expected two sizes of {growth} or more, largest={largest} leaves {sizes[growth]}"
                "; make it larger, or leave that growth out (only)"
            )
    return sizes


class _Process:
    """A process that does work of one size when it is told to."""

    def __init__(self, growth: str, size: int, data: Path, tower: str) -> None:
        context = multiprocessing.get_context("forkserver")
        self._connection, theirs = context.Pipe()
        self._called = f"{growth} of size {size}"
        told = (growth, size, data, tower, multiprocessing.get_start_method(), theirs)
        self._process = context.Process(target=serve, args=told)
        self._process.start()
        theirs.close()
        self.mib: list[float] = []

    def run(self) -> float:
        """Do it once more; return the seconds."""
        try:
            with suppress(OSError):  # it has ended; what it said before can be read
                self._connection.send(True)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            why = "its process was killed; if memory is short, take smaller sizes (largest)"
            raise RuntimeError(f"{self._called} failed: {why}") from error
        if isinstance(answer, str):
            raise RuntimeError(f"{self._called} failed: {answer}")
        self.mib.append(answer[1])
        return float(answer[0])

    def stop(self) -> None:
        """End it, unless it has ended."""
        with suppress(OSError):
            self._connection.send(False)
        self._connection.close()
        self._process.join()


def _measured(growth: str, data: dict[int, Path], rounds: int, tower: str) -> list[Point]:
    with ExitStack() as stack:
        processes = {size: _Process(growth, size, place, tower) for size, place in data.items()}
        for process in processes.values():
            stack.callback(process.stop)
        ways: dict[str, Callable[[], object]] = {str(n): p.run for n, p in processes.items()}
        seconds = measure(growth, ways, rounds, "cpu", warmup=1).seconds
    axis = GROWTHS[growth].axis
    mib = {size: max(_LEAST_MIB, statistics.median(p.mib)) for size, p in processes.items()}
    return [Point(growth, axis, size, tuple(seconds[str(size)]), mib[size]) for size in data]


def report(points: Sequence[Point], file: Path) -> None:
    """Print exponents, write them and the points as CSV, and draw both.

    Args:
        points: What was measured, the sizes of a growth ascending.
        file: CSV file for the points; what else is written lies beside it.
    """
    names = dict.fromkeys(point.growth for point in points)
    fitted = [Fitted([p for p in points if p.growth == name]) for name in names]
    files = [file, file.with_name(f"{file.stem}_exponents.csv"), file.with_suffix(".png")]
    records = [growth.record() for growth in fitted]
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, rows in ((files[0], [p.record() for p in points]), (files[1], records)):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [*rows[0], "machine"])
            writer.writeheader()
            writer.writerows({**row, "machine": machine()} for row in rows)
    show(fitted, files[-1])
    lines = [list(records[0]), *(list(record.values()) for record in records)]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (f"{cell:>{w}}" for cell, w in zip(line, wide, strict=True))
        sys.stdout.write("  ".join(cells) + "\n")
    sys.stdout.write(f"{machine()}\n{', '.join(map(str, files))}\n")


def show(fitted: Sequence[Fitted], file: Path) -> None:
    """Draw each growth: time, and memory below it.

    Args:
        fitted: What to draw.
        file: PNG file.
    """
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(fitted))
    rows = -(-len(fitted) // columns)
    figure = Figure(figsize=(max(5.0, 0.5 + 2.6 * columns), 0.8 + 4.4 * rows), layout="constrained")
    panels = figure.subplots(2 * rows, columns, squeeze=False)
    for number, growth in enumerate(fitted):
        row, column = 2 * (number // columns), number % columns
        _panel(panels[row, column], growth, time=True)
        _panel(panels[row + 1, column], growth, time=False)
    for panel in panels[-2:, columns - (-len(fitted) % columns) :].flat:  # there is nothing there
        panel.axis("off")
    legend = f"exponent of all sizes (of the upper half); grey: linear\n{machine()}"
    figure.supxlabel(legend, fontsize=7, color=_GREY)
    figure.savefig(file, dpi=110)


def _panel(axes: Any, growth: Fitted, time: bool) -> None:
    from matplotlib.ticker import LogLocator

    sizes, first = growth.sizes, growth.points[0]
    values = [point.seconds if time else (point.mib,) for point in growth.points]
    middle = [statistics.median(each) for each in values]
    axes.plot(sizes, [middle[-1] * size / sizes[-1] for size in sizes], color=_GREY, linewidth=0.8)
    axes.plot(sizes, values, ".", color=_BLUE, alpha=0.3)
    axes.plot(sizes, middle, color=_BLUE, marker=".")
    axes.set(xscale="log", yscale="log", xlabel=first.axis, ylabel="seconds" if time else "MiB")
    axes.set_xticks(sizes[::-2], sizes[::-2])
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5), numticks=8), major_formatter="{x:g}")
    axes.minorticks_off()
    exponent = growth.time if time else growth.memory
    colour = _COLOURS[growth.above if exponent and max(exponent) > LIMIT else "no"]
    title = f"{first.growth}\ntime" if time else "memory"
    axes.set_title(f"{title} {exponent or 'flat'}", fontsize=9, color=colour)
    axes.grid(alpha=0.3)
