"""The local engine: shards in this process, or in several that are watched over."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import copy
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from data_pipeline.runner import PipelineConfig, ShardTask, process_shard
from data_pipeline.shards import ShardManifest
from data_pipeline.sources.base import BadShardError

Outcome = tuple[ShardTask, ShardManifest | str]


def run_local(
    tasks: list[ShardTask], output: Path, config: PipelineConfig, workers: int
) -> Iterator[Outcome]:
    """Make shards on this machine.

    Args:
        tasks: What to make.
        output: The data set's folder.
        config: How.
        workers: Processes; with 1, everything happens in this one.

    Yields:
        Each task with its manifest, or with the reason why its input could not be read.

    Raises:
        RuntimeError: If a worker was killed. What is committed stays; run again to go on.
    """
    if workers <= 1 or len(tasks) <= 1:
        config.segmenter.load()
        yield from (_attempt(output, config, task) for task in tasks)
        return
    copy(config.segmenter).load()  # missing weights stop the run here; workers load their own
    work = partial(_attempt, output, config)
    # Not multiprocessing.Pool, which waits for ever on a worker that was killed.
    with ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn")) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process was killed (out of memory?); finished shards are kept, run the "
                "same command again to go on"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _attempt(output: Path, config: PipelineConfig, task: ShardTask) -> Outcome:
    try:
        return task, process_shard(task, output, config)
    except BadShardError as error:
        return task, str(error)
