"""Which samples come to a reader, and in what order.

A reader is one worker of one process. In every pass over a data set each of its samples comes to
exactly one reader. The order is a function of the seed and of the place: so a reader can go on
from any place as if it had never stopped, after reading one window of samples again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import count, islice

import numpy as np

from alpha_clip.drops import Drops
from alpha_clip.reader import Shard, read_samples
from alpha_clip.regions import RegionSample

_VAIN_PASSES = 10  # without a sound sample, before a reader gives up


@dataclass(frozen=True)
class ShardSet:
    """The shards of a data set, and how often to draw from it.

    Attributes:
        shards: Its shards.
        weight: How often a sample comes from it, relative to the other sets.
    """

    shards: tuple[Shard, ...]
    weight: float = 1.0

    @property
    def samples(self) -> int:
        """How many samples the manifests promise."""
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class Reader:
    """One of several readers.

    Attributes:
        index: Its number.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    def shares(self, shards: list[Shard]) -> list[tuple[Shard, int, int]]:
        """Return what this reader reads of shards, as `shard, part, parts`.

        Whole shards where there are enough; else readers share a shard, each taking every n-th
        sample of it.
        """
        parts = -(-self.count // len(shards)) if shards else 1
        units = [(shard, part, parts) for part in range(parts) for shard in shards]
        return units[self.index :: self.count]


@dataclass(frozen=True)
class Mark:
    """How far a reader is in one data set.

    Attributes:
        window: Number of the window that samples are given from.
        turn: Of the window's first sample: the pass.
        share: The share of that pass; see `Reader.shares`.
        sample: Samples of that share that come before it.
        given: Samples of the window that were given out.
    """

    window: int = 0
    turn: int = 0
    share: int = 0
    sample: int = 0
    given: int = 0


@dataclass(frozen=True)
class Place:
    """How far a reader is in its stream.

    Attributes:
        draws: Samples given out.
        marks: How far it is in each data set; empty at the start.
    """

    draws: int = 0
    marks: tuple[Mark, ...] = ()

    def numbers(self) -> list[list[int]]:
        """Return the place as plain numbers, for a checkpoint."""
        return [[self.draws], *(list(astuple(mark)) for mark in self.marks)]

    @classmethod
    def of(cls, numbers: list[list[int]]) -> Place:
        """Return the place that `numbers` described."""
        return cls(numbers[0][0], tuple(Mark(*row) for row in numbers[1:]))


def one_pass(sets: list[ShardSet], reader: Reader, drops: Drops) -> Iterator[RegionSample]:
    """Yield this reader's samples once, in order; weights do not matter."""
    shards = [shard for part in sets for shard in part.shards]
    for share in reader.shares(shards):
        yield from read_samples(share[0], drops, *share[1:])


def endless(
    sets: list[ShardSet],
    reader: Reader,
    drops: Drops,
    seed: list[int],
    hold: int,
    start: Place = Place(),
) -> Iterator[tuple[RegionSample, Place]]:
    """Yield samples for ever, drawn from the sets by their weights and shuffled.

    Args:
        sets: Data sets, each with at least one shard.
        reader: Who reads.
        drops: Where to count what is dropped.
        seed: Of the order.
        hold: Samples of a set that are shuffled together; fewer where the reader's part of a pass
            has fewer.
        start: Where to begin: the place that came with the last sample of an earlier run.

    Yields:
        A sample, and the place behind it.

    Raises:
        RuntimeError: If a set gives this reader nothing in several passes.
    """
    weights = np.array([part.weight for part in sets])
    weights = weights / weights.sum()
    marks = list(start.marks) or [Mark()] * len(sets)
    streams = [
        _shuffled(part, reader, drops, [*seed, i], hold, marks[i]) for i, part in enumerate(sets)
    ]
    for draws in count(start.draws):
        which = 0
        if len(sets) > 1:
            chance = np.random.default_rng([*seed, reader.index, draws])
            which = int(chance.choice(len(sets), p=weights))
        sample, marks[which] = next(streams[which])
        yield sample, Place(draws + 1, tuple(marks))


def _shuffled(
    part: ShardSet, reader: Reader, drops: Drops, seed: list[int], hold: int, mark: Mark
) -> Iterator[tuple[RegionSample, Mark]]:
    """Yield this reader's samples, window by window, each window in an order of its own.

    For each sample given, one of the next window is read: so work comes evenly, and no more than
    one window of samples is held.
    """
    hold = max(1, min(hold, part.samples // reader.count))
    reading = _passes(part, reader, drops, seed, mark)
    ahead = list(islice(reading, hold))
    while True:
        window, behind = mark.window, Mark(mark.window + 1, *ahead[-1][1])
        order = np.random.default_rng([*seed, reader.index, window]).permutation(hold)
        held = [ahead[i][0] for i in order[mark.given :][::-1]]
        ahead = []
        while held:
            ahead.append(next(reading))
            sample = held.pop()
            mark = replace(mark, given=hold - len(held)) if held else behind
            yield sample, mark
        ahead += islice(reading, hold - len(ahead))


def _passes(
    part: ShardSet, reader: Reader, drops: Drops, seed: list[int], start: Mark = Mark()
) -> Iterator[tuple[RegionSample, tuple[int, int, int]]]:
    """Yield this reader's samples of a set, pass after pass, each with other shards.

    With each sample comes what lies behind it: pass, share, and samples of the share.
    """
    vain, share, skip = 0, start.share, start.sample
    for turn in count(start.turn):
        order = np.random.default_rng([*seed, turn]).permutation(len(part.shards))
        shares = reader.shares([part.shards[i] for i in order])
        found = False
        for number in range(share, len(shares)):
            shard, *piece = shares[number]
            for done, sample in enumerate(read_samples(shard, drops, *piece)):
                if done >= skip:
                    found = True
                    yield sample, (turn, number, done + 1)
            skip = 0
        share = 0
        vain = 0 if found else vain + 1
        if vain == _VAIN_PASSES:
            raise RuntimeError(
                f"no sound sample in {len(part.shards)} shards like {part.shards[0].file}; "
                f"dropped: {dict(drops.counts())}"
            )
