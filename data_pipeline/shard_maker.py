"""What engines run: a maker that turns one input shard into one output shard."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.shards import ShardManifest, ShardWriter

_ENOUGH = 100  # samples that say something about a rate


@dataclass(frozen=True)
class ShardTask:
    """One input shard, a path or URL, and the number of the shard to make of it."""

    path: str
    index: int


class StageClock:
    """Adds up the seconds spent in each stage, and tells when samples are done.

    Args:
        tick: Called with how many samples have been done since the last call.
    """

    def __init__(self, tick: Callable[[int], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._tick = tick

    def tick(self, samples: int) -> None:
        """Say that more samples are done."""
        if self._tick is not None:
            self._tick(samples)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside towards a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class ShardMaker(ABC):
    """Makes an output shard of an input shard; the same maker gives the same bytes.

    It is cheap to build and to pickle: engines send it to their workers, which load the weights.
    """

    @property
    @abstractmethod
    def hash(self) -> str:
        """Digest of everything that decides the output's content."""

    def check(self) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse settings that do not go together; called before any work.

        Raises:
            ValueError: If they don't.
        """

    @abstractmethod
    def load(self) -> None:
        """Load weights; called once a process, before any work.

        Raises:
            ValueError: If they are missing or damaged.
        """

    @abstractmethod
    def try_loading(self) -> None:
        """Load weights and let go of them, to see that they are there; raises as `load` does."""

    @abstractmethod
    def place(self, worker: int) -> None:
        """Be told, before `load`, which of several workers on this machine this is."""

    @abstractmethod
    def make(self, task: ShardTask, output: Path, clock: StageClock) -> ShardManifest:
        """Make one output shard.

        Args:
            task: Which input, and its number.
            output: The data set's folder.
            clock: Told how long each stage took, and how far it is.

        Returns:
            The manifest that was committed.

        Raises:
            BadShardError: If the input can't be read at all.
            StorageError: If the input's storage fails.
            RuntimeError: If nothing works, or too many samples are rejected.
            OSError: If the output can't be written. Whatever is raised, nothing is committed.
        """


def digest_of(settings: Any) -> str:
    """Return a short digest of settings, which JSON must be able to hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def check_rate(writer: ShardWriter[Any], max_reject_rate: float) -> None:
    """Refuse a shard of some size of which too much was lost.

    Args:
        writer: The shard, before it is committed.
        max_reject_rate: Greatest share of lost samples.

    Raises:
        RuntimeError: If more was lost.
    """
    lost = writer.lost_samples
    total = writer.samples + lost
    if total >= _ENOUGH and lost > max_reject_rate * total:
        reasons = Counter(r.reason for r in writer.rejects if r.rid is None).most_common(5)
        raise RuntimeError(
            f"{lost} of {total} samples were rejected ({dict(reasons)}), so the shard is not "
            f"committed; if that is right, raise max_reject_rate ({max_reject_rate})"
        )
