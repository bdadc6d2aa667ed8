"""`python -m benchmarks NAME`, or `all`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

from jsonargparse import auto_cli

from benchmarks.encode import encode
from benchmarks.evaluation import evaluation
from benchmarks.focus.driver import focus
from benchmarks.gpu import gpu
from benchmarks.growth import growth
from benchmarks.late_alpha.driver import late_alpha
from benchmarks.late_alpha.speed import late_alpha_speed
from benchmarks.pipeline import pipeline
from benchmarks.ranking import ranking
from benchmarks.reader import reader
from benchmarks.regions import regions
from benchmarks.text import text
from benchmarks.training import training
from benchmarks.training_step import training_step

BENCHMARKS: dict[str, Callable[..., Any]] = {
    "encode": encode,
    "regions": regions,
    "late_alpha_speed": late_alpha_speed,
    "training_step": training_step,
    "training": training,
    "reader": reader,
    "text": text,
    "evaluation": evaluation,
    "pipeline": pipeline,
    "ranking": ranking,
    "growth": growth,
    "gpu": gpu,
    "focus": focus,
    "late_alpha": late_alpha,
}
ALONE = {"gpu": "needs a GPU", "focus": "takes an hour", "late_alpha": "takes an hour and a half"}


def main(arguments: list[str] | None = None) -> None:
    """Run one benchmark, or all but those that stand alone.

    With `all`, an option such as `--published CLONE` goes to the benchmarks that have it.
    """
    logging.disable(logging.WARNING)  # open_clip says that the weights are random; so they are
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] != ["all"]:
        auto_cli(BENCHMARKS, args=arguments, as_positional=False, prog="python -m benchmarks")
        return
    for name, given in options_of_each(arguments[1:]).items():
        if name in ALONE:
            sys.stdout.write(f"\n{name}: left out, it {ALONE[name]}\n")
        else:
            sys.stdout.write(f"\n{name}\n")
            auto_cli(BENCHMARKS, args=[name, *given], as_positional=False)


def options_of_each(arguments: list[str]) -> dict[str, list[str]]:
    """Return which of some options go to each benchmark: those that it has.

    Raises:
        SystemExit: If none of them has one.
    """
    given: dict[str, list[str]] = {name: [] for name in BENCHMARKS}
    takers: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            key = argument[2:].split("=")[0]
            takers = [n for n, f in BENCHMARKS.items() if key in signature(f).parameters]
            if not takers:
                sys.exit(
                    f"no benchmark has an option --{key}; see python -m benchmarks NAME --help"
                )
        for name in takers:
            given[name].append(argument)
    return given


if __name__ == "__main__":
    main()
