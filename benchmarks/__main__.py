"""`python -m benchmarks NAME`, or `all`."""

from __future__ import annotations

import logging
import sys

import torch
from jsonargparse import auto_cli

from benchmarks.alpha_cost import alpha_cost
from benchmarks.data import data
from benchmarks.evaluation import evaluation
from benchmarks.focus.driver import focus
from benchmarks.ranking import ranking
from benchmarks.regions import regions
from benchmarks.text import text
from benchmarks.training import training
from benchmarks.training_step import training_step

BENCHMARKS = {
    "alpha_cost": alpha_cost,
    "data": data,
    "evaluation": evaluation,
    "focus": focus,
    "ranking": ranking,
    "regions": regions,
    "text": text,
    "training": training,
    "training_step": training_step,
}


def main(arguments: list[str] | None = None) -> None:
    """Run one benchmark, or each with its defaults."""
    logging.disable(logging.WARNING)  # open_clip says that the weights are random; so they are
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["all"]:
        for name in BENCHMARKS:
            if name == "focus" or (name == "training_step" and not torch.cuda.is_available()):
                why = "takes an hour" if name == "focus" else "needs a GPU"
                sys.stdout.write(f"{name}: left out, it {why}\n")
                continue
            auto_cli(BENCHMARKS, args=[name, *arguments[1:]], as_positional=False)
    else:
        auto_cli(BENCHMARKS, args=arguments, as_positional=False, prog="python -m benchmarks")


if __name__ == "__main__":
    main()
