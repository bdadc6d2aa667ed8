"""What an engine is: it gets shards made, somewhere, and says what became of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.shard_maker import ShardMaker, ShardTask, StageClock
from data_pipeline.shards import ShardManifest
from data_pipeline.sources.base import BadShardError

Tick = Callable[[int], None]


def ignore(samples: int) -> None:
    """Take no notice of progress."""


@dataclass(frozen=True)
class Outcome:
    """What became of a shard.

    Attributes:
        task: The shard.
        manifest: What was committed; `None` if nothing was.
        bad_input: Why the input could not be read; trying again would not help.
        failure: Why the worker did not finish; trying again may help.
        seconds: Time spent in each stage.
    """

    task: ShardTask
    manifest: ShardManifest | None = None
    bad_input: str | None = None
    failure: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Engine(ABC):
    """Gets shards made.

    Subclasses are dataclasses; their fields say where and how, never what, so that the same bytes
    come out of each.
    """

    def share(self, tasks: list[ShardTask]) -> list[ShardTask]:
        """Return those of the tasks that fall to this process; by default all."""
        return tasks

    @abstractmethod
    def run(
        self,
        tasks: list[ShardTask],
        output: Path,
        maker: ShardMaker,
        workers: int,
        tick: Tick = ignore,
    ) -> Iterator[Outcome]:
        """Make shards.

        Args:
            tasks: What to make.
            output: The data set's folder.
            maker: How.
            workers: How many to make at a time.
            tick: Told in this process, now and then, how many more samples are done.

        Yields:
            What became of each, in the order in which they end.

        Raises:
            ValueError: If weights are missing or damaged; before any work.
            RuntimeError, OSError: If something systemic is wrong, such as a full disk. What is
                committed stays.
        """


def attempt(output: Path, maker: ShardMaker, task: ShardTask, tick: Tick = ignore) -> Outcome:
    """Make one shard here and now; raises what `ShardMaker.make` does but `BadShardError`."""
    clock = StageClock(tick)
    try:
        manifest = maker.make(task, output, clock)
    except BadShardError as error:
        return Outcome(task, bad_input=str(error), seconds=clock.seconds)
    return Outcome(task, manifest, seconds=clock.seconds)
