"""The SLURM engine: every task of a job array makes its share of the shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.engines.base import Engine, Outcome, Tick, ignore
from data_pipeline.engines.local import LocalEngine
from data_pipeline.shard_maker import ShardMaker, ShardTask


@dataclass(frozen=True)
class SlurmEngine(Engine):
    """Makes the share of the task of a SLURM array that this process runs in.

    `configs/data/slurm/grit.sbatch` submits such an array. The output must be on a file system that
    all nodes share. A task that is preempted, requeued or out of time needs no care: its unfinished
    shard is not there, and whoever runs the array again goes on with what is missing.

    Attributes:
        attempts: How often a shard is tried whose worker was killed or whose storage failed.
    """

    attempts: int = 3

    def __post_init__(self) -> None:
        LocalEngine(self.attempts)  # it says what is wrong with them

    def share(self, tasks: list[ShardTask]) -> list[ShardTask]:
        """Return the tasks of this place in the array.

        They go by the shards' numbers, not by their places in the list: tasks of an array start at
        different times, and find different shards done already.

        Raises:
            ValueError: If this is no task of a SLURM array; see `place_in_array`.
        """
        rank, count = place_in_array(os.environ)
        return [task for task in tasks if task.index % count == rank]

    def run(
        self,
        tasks: list[ShardTask],
        output: Path,
        maker: ShardMaker,
        workers: int,
        tick: Tick = ignore,
    ) -> Iterator[Outcome]:
        """Make shards on this machine; see `LocalEngine`."""
        return LocalEngine(self.attempts).run(tasks, output, maker, workers, tick)


def place_in_array(environ: Mapping[str, str]) -> tuple[int, int]:
    """Tell which of how many processes this is.

    Args:
        environ: The environment that SLURM made for it.

    Returns:
        Its rank, from 0, and the number of processes: array tasks times tasks of a job step.

    Raises:
        ValueError: If it was not started by SLURM as it should be.
    """
    if "SLURM_ARRAY_TASK_ID" not in environ:
        raise ValueError(
            "SlurmEngine works in a task of a SLURM array, and this is none; submit "
            "`sbatch configs/data/slurm/grit.sbatch`, or leave out the engine to work here"
        )
    first, last, step, count, task = (
        _number(environ, f"SLURM_ARRAY_TASK_{name}")
        for name in ("MIN", "MAX", "STEP", "COUNT", "ID")
    )
    if step < 1 or last != first + step * (count - 1):
        raise ValueError(
            f"the array has {count} tasks from {first} to {last} in steps of {step}; submit a "
            "range without gaps, such as --array=0-63 (finished shards are not made again)"
        )
    rank, rest = divmod(task - first, step)
    if rest or not 0 <= rank < count:
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID is {task}, but the array goes from {first} to {last} in steps of "
            f"{step}; submit it again"
        )
    step_rank, step_count = _place_in_step(environ)
    return rank * step_count + step_rank, count * step_count


def _place_in_step(environ: Mapping[str, str]) -> tuple[int, int]:
    if "SLURM_STEP_NUM_TASKS" not in environ:  # the batch script itself, of which there is one
        if _number(environ, "SLURM_NTASKS", 1) > 1:
            raise ValueError(
                f"the job has {environ['SLURM_NTASKS']} tasks, but this is none of them; start the "
                "command with srun, which starts all of them"
            )
        return 0, 1
    count = _number(environ, "SLURM_STEP_NUM_TASKS")
    rank = _number(environ, "SLURM_PROCID", 0 if count == 1 else None)
    if not 0 <= rank < count:
        raise ValueError(
            f"SLURM_PROCID is {rank}, but the job step has {count} tasks; start the command with "
            "srun"
        )
    return rank, count


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit()):
        raise ValueError(
            f"{name} must be a number from 0, as SLURM sets it, got {text!r}; submit "
            "`sbatch configs/data/slurm/grit.sbatch`"
        )
    return int(text)
