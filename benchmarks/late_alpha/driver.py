"""Trains alpha in front of every block, measures how well each looks and what a region costs."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.focus.job import HERE as FOCUS
from benchmarks.focus.job import Job, given_or_drawn
from benchmarks.late_alpha.methods import AS_IT_IS, UNTRAINED_IN_ALPHA, blocks_of, entries
from benchmarks.late_alpha.table import report

_TOWER = Path(__file__).parent / "tower"


def late_alpha(
    blocks: list[int] | None = None,
    parts_at: list[int] = [6],  # noqa: B006 - shown by --help, never changed
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    regions: int = 32,
    tower: Path = _TOWER,
    output: Path = Path("runs/benchmarks/late_alpha"),
    train: list[str] | None = None,
    test: list[str] | None = None,
    base: str | None = None,
    config: Path = FOCUS / "alpha.yaml",
    parallel: int = 2,
) -> None:
    """Find out how late alpha may enter: accuracy against the cost of a region.

    On drawn scenes, or on any region–text shards with a CLIP to start from. What is done stays: the
    same command goes on.

    Args:
        blocks: Where alpha enters; all blocks by default.
        parts_at: Where it also enters without what helps: once, with repetition alone, and with
            the summary alone.
        seeds: Of training; each is a run of every method.
        regions: Regions an image, for the cost of one.
        tower: Folder with the config of the CLIP that is made where no `base` is given.
        output: Folder for everything: models, scores, `late_alpha.csv`, `.md` and `.png`.
        train: Folders of shards to train on; `None` draws scenes.
        test: Folders of other shards to evaluate on.
        base: What `create_model(checkpoint=...)` takes; `None` trains a tiny CLIP on the captions.
        config: Recipe of the training with alpha, for `alpha-clip fit`.
        parallel: Commands at a time; each has its part of the cores.

    Raises:
        ValueError: If only one of `train`, `test` and `base` is given, or there is no such block.
        RuntimeError: If a command fails.
    """
    name = f"local-dir:{tower}"
    recipe = ["--config", str(FOCUS / "base.yaml"), "--model.encoder.name", name]
    material, start = given_or_drawn(output, train, test, base, recipe)
    places = entries(blocks_of(start, blocks), parts_at)
    threads = max(1, (os.cpu_count() or 1) // parallel)
    job = Job(output, material, start, config, AS_IT_IS, threads)
    job.run_all([*(place.method for place in places), UNTRAINED_IN_ALPHA], seeds, parallel)
    report(output, places, seeds, start, regions)
