"""The local engine: shards in this process, or in several that are watched over."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from data_pipeline.engines.base import Engine, Outcome, Tick, attempt, ignore
from data_pipeline.shard_maker import ShardMaker, ShardTask
from data_pipeline.sources.base import StorageError

_GLANCE_S = 1.0  # how often the workers' counts are looked at


@dataclass(frozen=True)
class LocalEngine(Engine):
    """Makes shards on this machine.

    With one worker, everything happens in this process. With several, each has a process of its
    own; if that is killed (out of memory, say), its shard is done again by a fresh one, and the
    others do not notice.

    Attributes:
        attempts: How often a shard is tried whose worker was killed or whose storage failed.
        pause_s: Seconds to wait before the second attempt; before the third, twice as long.
    """

    attempts: int = 3
    pause_s: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.pause_s < 0:
            raise ValueError(
                f"expected attempts >= 1 and pause_s >= 0, got {self.attempts} and {self.pause_s}"
            )

    def run(
        self,
        tasks: list[ShardTask],
        output: Path,
        maker: ShardMaker,
        workers: int,
        tick: Tick = ignore,
    ) -> Iterator[Outcome]:
        """Make shards; see `Engine.run`."""
        if not tasks:
            return
        if workers <= 1 or len(tasks) == 1:
            maker.load()
            for task in tasks:
                yield self._try(task, lambda t: attempt(output, maker, t, tick))
            return
        maker.try_loading()  # missing weights stop the run here; workers load their own
        yield from self._supervise(tasks, output, maker, min(workers, len(tasks)), tick)

    def _supervise(
        self,
        tasks: list[ShardTask],
        output: Path,
        maker: ShardMaker,
        workers: int,
        tick: Tick,
    ) -> Iterator[Outcome]:
        # A pool of one process for each worker: when one is killed, the standard pool gives up all
        # of its processes (and multiprocessing.Pool waits for ever).
        over = threading.Event()
        slots = [_Slot(i, output, maker, over) for i in range(workers)]
        free: SimpleQueue[_Slot] = SimpleQueue()
        for slot in slots:
            free.put(slot)

        def work(task: ShardTask) -> Outcome:
            slot = free.get()
            try:
                return self._try(task, slot.attempt, over.wait)
            finally:
                free.put(slot)

        with ThreadPoolExecutor(workers) as threads:
            pending = {threads.submit(work, task) for task in tasks}
            try:
                told = 0
                while pending:
                    done, pending = wait(pending, _GLANCE_S, FIRST_COMPLETED)
                    samples = sum(slot.samples.value for slot in slots)
                    tick(samples - told)
                    told = samples
                    yield from (future.result() for future in done)
            finally:  # also when something systemic is wrong, or the caller has had enough
                over.set()
                for future in pending:
                    future.cancel()
                for slot in slots:
                    slot.stop()

    def _try(
        self,
        task: ShardTask,
        make: Callable[[ShardTask], Outcome],
        pause: Callable[[float], object] = time.sleep,
    ) -> Outcome:
        failure = ""
        for number in range(self.attempts):
            pause(number * self.pause_s)
            try:
                return make(task)
            except StorageError as error:
                failure = str(error)
            except BrokenProcessPool:
                failure = "its worker process was killed (out of memory?)"
        return Outcome(task, failure=f"{failure}, {self.attempts} times")


class _Slot:
    """A place for one worker process, started when it is needed and again when it died.

    Args:
        number: Its number among the places.
        output: The data set's folder.
        maker: How shards are made; a worker is told once, and keeps the weights.
        over: Set when the run has ended; no worker is started after that.

    Attributes:
        samples: How many its workers have done; only they write it, so nobody waits for a lock.
    """

    def __init__(self, number: int, output: Path, maker: ShardMaker, over: threading.Event) -> None:
        self._over = over
        self._spawn = get_context("spawn")
        self.samples = self._spawn.RawValue("Q", 0)
        self._told = (number, output, maker, self.samples)
        self._pool: ProcessPoolExecutor | None = None

    def attempt(self, task: ShardTask) -> Outcome:
        """Make a shard in the worker; raises `BrokenProcessPool` if that is killed."""
        if self._over.is_set():
            raise CancelledError
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, self._spawn, _begin, self._told)
        try:
            return self._pool.submit(_attempt, task).result()
        except BrokenProcessPool:
            self.stop()
            raise

    def stop(self) -> None:
        """End the worker, whatever it does."""
        pool, self._pool = self._pool, None
        if pool is not None:
            # shutdown() alone would wait for the shard, which may take an hour.
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)


_work: Callable[[ShardTask], Outcome] | None = None  # what this worker was told to do


def _begin(number: int, output: Path, maker: ShardMaker, samples: Any) -> None:
    """Prepare a worker: let it count, not outlive its run (it would hold a GPU), leave Ctrl-C."""
    global _work

    def count(done: int) -> None:
        samples.value += done

    maker.place(number)
    _work = partial(attempt, output, maker, tick=count)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _leave(*_: object) -> None:
    """Unwind on SIGTERM instead of dying, so that a half shard does not stay on a full disk."""
    raise SystemExit(143)


def _attempt(task: ShardTask) -> Outcome:
    if _work is None:
        raise RuntimeError("a worker must be told what to do before it is given a shard")
    return _work(task)
