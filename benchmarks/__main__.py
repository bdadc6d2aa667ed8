"""`python -m benchmarks NAME`, or `all`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import auto_cli

from benchmarks.encode import encode
from benchmarks.evaluation import evaluation
from benchmarks.focus.driver import focus
from benchmarks.gpu import gpu
from benchmarks.growth import growth
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
}
ALONE = {"gpu": "needs a GPU", "focus": "takes an hour"}
WITH_CLONE = ("encode", "regions", "training_step")


def main(arguments: list[str] | None = None) -> None:
    """Run one benchmark, or all with their defaults; `all --published CLONE` compares."""
    logging.disable(logging.WARNING)  # open_clip says that the weights are random; so they are
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["all"]:
        for name in BENCHMARKS:
            if name in ALONE:
                sys.stdout.write(f"\n{name}: left out, it {ALONE[name]}\n")
                continue
            sys.stdout.write(f"\n{name}\n")
            given = arguments[1:] if name in WITH_CLONE else []
            auto_cli(BENCHMARKS, args=[name, *given], as_positional=False)
    else:
        auto_cli(BENCHMARKS, args=arguments, as_positional=False, prog="python -m benchmarks")


if __name__ == "__main__":
    main()
