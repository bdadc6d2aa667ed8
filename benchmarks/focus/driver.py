"""Trains and evaluates every method, by the commands that a user would type."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.focus.job import HERE, Job, given_or_drawn
from benchmarks.focus.methods import AS_IT_IS, TRAINED
from benchmarks.focus.table import report


def focus(
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - shown by --help, never changed
    output: Path = Path("runs/benchmarks/focus"),
    train: list[str] | None = None,
    test: list[str] | None = None,
    base: str | None = None,
    config: Path = HERE / "alpha.yaml",
    parallel: int = 2,
) -> None:
    """Compare ways of pointing at a region: accuracy, and what they cost the whole image.

    On drawn scenes, or on any region–text shards with a CLIP to start from. What is done stays: the
    same command goes on.

    Args:
        seeds: Of training; each is a run of every trained method.
        output: Folder for everything: models, scores, `focus.csv`, `focus.md`, `focus.png`.
        train: Folders of shards to train on; `None` draws scenes.
        test: Folders of other shards to evaluate on.
        base: What `create_model(checkpoint=...)` takes; `None` trains a tiny CLIP on the captions.
        config: Recipe of the training with alpha, for `alpha-clip fit`.
        parallel: Commands at a time; each has its part of the cores.

    Raises:
        ValueError: If only one of `train`, `test` and `base` is given.
        RuntimeError: If a command fails.
    """
    recipe = ["--config", str(HERE / "base.yaml")]
    material, start = given_or_drawn(output, train, test, base, recipe)
    threads = max(1, (os.cpu_count() or 1) // parallel)
    job = Job(output, material, start, config, AS_IT_IS, threads)
    job.run_all(TRAINED, seeds, parallel)
    report(output, seeds)
