"""The endless training stream as a loader that goes on exactly where a checkpoint left it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from alpha_clip.batches import Collate, RegionBatch
from alpha_clip.datasets import RegionShards
from alpha_clip.streams import Place

log = logging.getLogger(__name__)

_ENDS = (signal.SIGTERM, signal.SIGINT)


class TrainingBatches:
    """Batches of an endless stream; an epoch is as long as one pass over the data.

    What a loader's workers have read ahead is no measure of what was trained on: so whoever trains
    tells it of each batch that it takes (`took`), and the state follows from those.

    Args:
        data: The stream.
        batch_size: Images a batch.
        workers: Processes that read and decode.
        collate: Makes batches of samples.
        pin_memory: Whether batches are put where a GPU copies them from.

    Raises:
        ValueError: If one pass does not fill a batch, a reader would get nothing of a data set, or
            a step would have a single region, which nothing contradicts.
    """

    def __init__(
        self,
        data: RegionShards,
        batch_size: int,
        workers: int,
        collate: Collate,
        pin_memory: bool = False,
    ) -> None:
        self._data = data
        self._batch_size = batch_size
        self._workers = workers
        self._collate = collate
        self._pin_memory = pin_memory
        self._places: dict[int, Place] = {}
        self._taken = 0
        readers = data.world * max(1, workers)
        few = min(data.sets, key=lambda part: part.samples)
        if few.samples < readers:
            raise ValueError(
                f"the {few.samples} images like those in {few.shards[0].file} do not suffice for "
                f"{readers} readers ({data.world} processes x {workers} workers); use fewer workers"
            )
        if batch_size * data.world * data.sampling.regions_per_image < 2:
            raise ValueError(
                "a step needs at least two regions to tell apart, got batch_size 1 with one region "
                "an image; make data.batch_size or data.sampling.regions_per_image larger"
            )
        samples = sum(part.samples for part in data.sets)
        self._length = samples // (batch_size * data.world)
        if not self._length:
            raise ValueError(
                f"{samples} images in {len(data.sets)} data sets do not fill one batch: "
                f"{data.world} processes x batch_size {batch_size}; make batch_size smaller"
            )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[RegionBatch]:
        # Nothing is read before the first batch is asked for: until then a state may be loaded.
        self._data.places = dict(self._places)
        self._data.first_worker = self._taken % max(1, self._workers)
        loader = DataLoader(
            self._data,
            batch_size=self._batch_size,
            num_workers=self._workers,
            collate_fn=self._collate,
            pin_memory=self._pin_memory,
            worker_init_fn=start_worker,
        )
        with _signals_held():  # until the workers have begun to ignore them
            batches = iter(loader)
        yield from batches

    def took(self, batch: RegionBatch) -> None:
        """Note that a batch was trained on."""
        self._places[batch.reader] = batch.place
        self._taken += 1

    def state_dict(self) -> dict[str, Any]:
        """Return how far the readers of all processes are; every process has to call it."""
        places = {reader: place.numbers() for reader, place in self._places.items()}
        return {
            "readers": [self._data.world, self._workers],
            "sets": len(self._data.sets),
            "seed": self._data.seed,
            "taken": self._taken,
            "places": _of_every_process(places, self._data.world),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        With another number of processes, workers or data sets the places mean nothing; then the
        stream begins anew, in an order of its own.
        """
        mine = [self._data.world, self._workers]
        self._taken = int(state["taken"])
        if state["readers"] == mine and state["sets"] == len(self._data.sets):
            self._data.seed = list(state["seed"])
            places = state["places"][self._data.rank]
            self._places = {int(reader): Place.of(rows) for reader, rows in places.items()}
            return
        self._data.seed = [*self._data.seed, self._taken]
        log.warning(
            "the checkpoint was written with %s processes x workers and %s data sets, this run has "
            "%s and %s: it does not go on with the same samples, but with a new order of all",
            *(state["readers"], state["sets"], mine, len(self._data.sets)),
        )


def start_worker(_: int) -> None:
    """Keep a worker to one core, and to its work: whoever ends a run, its parent ends it.

    A terminal's Ctrl-C and a cluster's SIGTERM reach every process; a run without its readers could
    not finish the step that it saves behind. The parent's own SIGTERM is obeyed: Python sends it to
    processes that are left when a script ends, and waits for them.
    """
    torch.set_num_threads(1)
    for number in _ENDS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if hasattr(signal, "sigwaitinfo") and parent is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what is ignored can't be waited for
        threading.Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):  # macOS does not say who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)


def _end_when_told(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let signals wait; processes that are started in between inherit that."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _of_every_process(places: dict[int, Any], world: int) -> list[dict[int, Any]]:
    if world == 1:
        return [places]
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, places)
    return gathered
