"""The Ray engine: shards made by actors on the nodes of a cluster, one a GPU."""

from __future__ import annotations

import os
import platform
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.engines.base import Engine, Outcome, Tick, attempt, ignore
from data_pipeline.shard_maker import ShardMaker, ShardTask
from data_pipeline.shards import ShardManifest
from data_pipeline.sources.base import StorageError

_USAGE = "RAY_USAGE_STATS_ENABLED"
_ROUNDING = 1e-6  # 1 / 0.1 is to be ten


@dataclass(frozen=True)
class RayEngine(Engine):
    """Makes shards on a Ray cluster, or on this machine if there is none.

    Actors are told the names of shards; what is in them passes through no object store. An actor
    that dies, alone or with its node, is replaced, and its shard is done again. `workers` is the
    number of actors; 0 means as many as the cluster has room for.

    Every node must have this package, and must see the inputs, the weights, the output and the
    folder that the run is started in under the same paths: a file system that all nodes share.

    Attributes:
        address: Of the cluster, as `ray.init` takes it; `None` is that of `RAY_ADDRESS`, else a
            cluster on this machine for as long as the run takes.
        gpus_per_actor: GPUs of each; 0.5 lets two share one, 0 uses none.
        cpus_per_actor: CPU cores of each.
        attempts: How often a shard is tried whose actor died or whose storage failed.
    """

    address: str | None = None
    gpus_per_actor: float = 1.0
    cpus_per_actor: float = 1.0
    attempts: int = 3

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")
        gpus, cpus = self.gpus_per_actor, self.cpus_per_actor
        if not (gpus >= 0 and cpus >= 0 and gpus + cpus > 0):
            raise ValueError(
                "gpus_per_actor and cpus_per_actor must not be negative, nor both 0; got "
                f"{gpus} and {cpus}"
            )
        if gpus > 1 and gpus % 1:
            raise ValueError(f"gpus_per_actor must be whole above 1, got {gpus}")

    def run(
        self,
        tasks: list[ShardTask],
        output: Path,
        maker: ShardMaker,
        workers: int,
        tick: Tick = ignore,
    ) -> Iterator[Outcome]:
        """Make shards; see `Engine.run`. Samples are told of when their shard is done.

        Raises:
            ValueError: Also if Ray is not installed, or the cluster has no room for the actors.
        """
        if not tasks:
            return
        ray = _import_ray()
        output, folder = output.absolute(), os.getcwd()
        with _connected(ray, self.address):
            actors = min(self._actors(ray, workers), len(tasks))
            kind = ray.remote(_Maker).options(
                num_gpus=self.gpus_per_actor, num_cpus=self.cpus_per_actor, max_restarts=0
            )
            crew = _Crew(ray, lambda: kind.remote(folder, output, maker), self.attempts)
            for outcome in crew.make(tasks, actors):
                if outcome.manifest is not None:
                    _check_shared(outcome.task, outcome.manifest, output)
                    tick(outcome.manifest.input["samples"])
                yield outcome

    def _actors(self, ray: Any, wanted: int) -> int:
        """Return how many actors to start; Ray would wait for ever for what it does not have."""
        room = sum(self._room(node["Resources"]) for node in ray.nodes() if node["Alive"])
        if room < max(wanted, 1):
            has = ray.cluster_resources()
            raise ValueError(
                f"{max(wanted, 1)} actors with {self.gpus_per_actor:g} GPUs and "
                f"{self.cpus_per_actor:g} CPU cores each were asked for, but the Ray cluster "
                f"({has.get('GPU', 0):g} GPUs, {has.get('CPU', 0):g} cores) has room for {room}; "
                "lower workers, gpus_per_actor or cpus_per_actor, or add nodes"
            )
        return wanted if wanted > 0 else room

    def _room(self, resources: dict[str, float]) -> int:
        """Return how many actors fit on a node; a GPU is shared, but never split between two."""
        gpus, cpus = self.gpus_per_actor, self.cpus_per_actor
        rooms = []
        if gpus >= 1:
            rooms.append(resources.get("GPU", 0) // gpus)
        elif gpus > 0:
            rooms.append(resources.get("GPU", 0) * ((1 / gpus + _ROUNDING) // 1))
        if cpus > 0:
            rooms.append(resources.get("CPU", 0) / cpus + _ROUNDING)
        return int(min(rooms))


class _Maker:
    """Makes shards on a node: the actor."""

    def __init__(self, folder: str, output: Path, maker: ShardMaker) -> None:
        self._folder = folder
        self._output = output
        self._maker = maker

    def load(self) -> None:
        # Relative paths of inputs, weights and pictures then mean here what they mean there, and
        # manifests keep them as they were given.
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise ValueError(
                f"{platform.node()} can't enter {self._folder} ({error.strerror}); start the run "
                "in a folder that all nodes share"
            ) from error
        self._maker.load()

    def make(self, task: ShardTask, seen: bool) -> Outcome:
        if seen and not Path(task.path).exists():  # must not pass for a bad input
            raise FileNotFoundError(
                f"{platform.node()} does not see {task.path}; inputs must be on a file system that "
                "all nodes share"
            )
        return attempt(self._output, self._maker, task)


@dataclass
class _Post:
    """A place for one actor, and how often in a row it died there before it could work."""

    actor: Any
    deaths: int = 0


class _Crew:
    """Hands out shards to actors, and replaces those that die."""

    def __init__(self, ray: Any, start: Callable[[], Any], attempts: int) -> None:
        self._ray = ray
        self._start = start
        self._attempts = attempts
        self._pending: dict[Any, tuple[_Post, ShardTask | None]] = {}  # no task: it is loading
        self._waiting: deque[ShardTask] = deque()
        self._tries: Counter[int] = Counter()

    def make(self, tasks: list[ShardTask], actors: int) -> Iterator[Outcome]:
        self._waiting.extend(tasks)
        unfinished = len(tasks)
        try:
            for _ in range(actors):
                self._fill(_Post(None))
            while unfinished:  # an actor may still wait for its node when all is done
                [ready], _ = self._ray.wait(list(self._pending))
                if outcome := self._answer(ready):
                    unfinished -= 1
                    yield outcome
        finally:
            for post, _ in self._pending.values():
                self._ray.kill(post.actor)

    def _fill(self, post: _Post) -> None:
        post.actor = self._start()
        self._pending[post.actor.load.remote()] = (post, None)

    def _hand_out(self, post: _Post) -> None:
        if self._waiting:
            task = self._waiting.popleft()
            seen = Path(task.path).exists()  # False for URLs
            self._pending[post.actor.make.remote(task, seen)] = (post, task)
        else:
            self._ray.kill(post.actor)  # its GPU is free for others

    def _answer(self, ready: Any) -> Outcome | None:
        """Take what an actor says, or that it died, and see to it that the post is filled."""
        post, task = self._pending[ready]
        outcome, lost = None, False
        try:
            outcome = self._ray.get(ready)
        except self._ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, StorageError) or task is None:
                raise error.cause from error
            outcome = self._again(task, str(error.cause))
        except self._ray.exceptions.RayError as error:
            lost = True
            if task is None:
                self._count_death(post, error)
            else:
                name = type(error).__name__
                outcome = self._again(task, f"its actor was lost ({name}; out of memory?)")
        else:
            post.deaths = 0
        del self._pending[ready]
        if lost:
            self._ray.kill(post.actor)  # it may only be out of reach
            if self._waiting:
                self._fill(post)
        else:
            self._hand_out(post)
        return outcome

    def _again(self, task: ShardTask, failure: str) -> Outcome | None:
        self._tries[task.index] += 1
        if self._tries[task.index] == self._attempts:
            return Outcome(task, failure=f"{failure}, {self._attempts} times")
        self._waiting.append(task)
        return None

    def _count_death(self, post: _Post, error: Exception) -> None:
        post.deaths += 1
        if post.deaths == self._attempts:
            raise RuntimeError(
                f"an actor died {self._attempts} times before it could work; is this package on "
                f"every node, and is there memory for the segmenter? Ray says: {error}"
            ) from error


def _check_shared(task: ShardTask, manifest: ShardManifest, output: Path) -> None:
    if not manifest.file(output).exists():
        raise OSError(
            f"a node made shard {task.index:05d}, but it can't be seen here in {output}; "
            "the output must be on a file system that all nodes share"
        )


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            f"RayEngine needs Ray ({error}); run: pip install 'alpha-clip[ray]'"
        ) from error
    return ray


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Be connected to a cluster; a connection that was there before stays."""
    if ray.is_initialized():
        yield
        return
    before = os.environ.get(_USAGE)
    os.environ[_USAGE] = "0"  # nothing is reported to anyone
    try:
        ray.init(address)
    finally:
        os.environ.pop(_USAGE, None)
        if before is not None:
            os.environ[_USAGE] = before
    try:
        yield
    finally:
        ray.shutdown()
