"""`python -m benchmarks NAME`, or `all`."""

from __future__ import annotations

import logging
import sys

from jsonargparse import auto_cli

from benchmarks.alpha_cost import alpha_cost
from benchmarks.data import data
from benchmarks.regions import regions
from benchmarks.text import text

BENCHMARKS = {"alpha_cost": alpha_cost, "data": data, "regions": regions, "text": text}


def main(arguments: list[str] | None = None) -> None:
    """Run one benchmark, or each with its defaults."""
    logging.disable(logging.WARNING)  # open_clip says that the weights are random; so they are
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["all"]:
        for name in BENCHMARKS:
            auto_cli(BENCHMARKS, args=[name, *arguments[1:]], as_positional=False)
    else:
        auto_cli(BENCHMARKS, args=arguments, as_positional=False, prog="python -m benchmarks")


if __name__ == "__main__":
    main()
