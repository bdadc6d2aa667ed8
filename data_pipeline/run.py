"""A run: what is missing gets made by an engine, and what became of it is told."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.engines.base import Engine
from data_pipeline.locks import clear_leftovers
from data_pipeline.planning import Progress, RunSummary, plan
from data_pipeline.shard_maker import ShardMaker
from data_pipeline.shards import read_manifests


def make_shards(
    inputs: list[str], output: Path, maker: ShardMaker, engine: Engine, workers: int
) -> RunSummary:
    """Make the shards that are missing.

    Args:
        inputs: Input shards; their order numbers the output.
        output: The data set's folder; what is there is kept.
        maker: Makes a shard.
        engine: Where.
        workers: Shards at a time.

    Returns:
        What the folder holds now, and what could not be done.

    Raises:
        ValueError: If weights are missing, or the folder holds shards of something else.
        RuntimeError, OSError: If something systemic is wrong, such as a full disk.
    """
    clear_leftovers(output)
    missing = plan(inputs, output, maker)
    tasks, done = engine.share(missing), len(inputs) - len(missing)
    summary = RunSummary()
    with Progress(done, done + len(tasks)) as progress:
        for outcome in engine.run(tasks, output, maker, workers, progress.tick):
            summary.seconds.update(outcome.seconds)
            if outcome.bad_input is not None:
                summary.bad_shards[outcome.task.path] = outcome.bad_input
            if outcome.failure is not None:
                summary.failures[outcome.task.path] = outcome.failure
            progress.shard()
    for manifest in read_manifests(output).values():
        summary.add(manifest)
    return summary
