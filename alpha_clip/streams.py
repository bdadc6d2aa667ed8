"""Which samples come to a reader, and in what order.

A reader is one worker of one process. In every pass over a data set each of its samples comes to
exactly one reader; the order, and who gets what, is a function of the seed and the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

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


def one_pass(sets: list[ShardSet], reader: Reader, drops: Drops) -> Iterator[RegionSample]:
    """Yield this reader's samples once, in order; weights do not matter."""
    shards = [shard for part in sets for shard in part.shards]
    for share in reader.shares(shards):
        yield from read_samples(share[0], drops, *share[1:])


def endless(
    sets: list[ShardSet], reader: Reader, drops: Drops, seed: int, hold: int
) -> Iterator[RegionSample]:
    """Yield samples for ever, drawn from the sets by their weights and shuffled.

    Args:
        sets: Data sets, each with at least one shard.
        reader: Who reads.
        drops: Where to count what is dropped.
        seed: Of the order.
        hold: Samples held back to draw from.

    Raises:
        RuntimeError: If a set gives this reader nothing in several passes.
    """
    rng = np.random.default_rng([seed, reader.index])
    weights = np.array([part.weight for part in sets])
    streams = [_passes(part, i, reader, drops, seed) for i, part in enumerate(sets)]
    held: list[RegionSample] = []
    while True:
        which = int(rng.choice(len(sets), p=weights / weights.sum())) if len(sets) > 1 else 0
        sample = next(streams[which])
        if len(held) < hold:
            held.append(sample)
            continue
        j = int(rng.integers(len(held))) if held else 0
        if held:
            sample, held[j] = held[j], sample
        yield sample


def _passes(
    part: ShardSet, number: int, reader: Reader, drops: Drops, seed: int
) -> Iterator[RegionSample]:
    """Yield this reader's samples of a set, pass after pass, each with other shards."""
    vain = 0
    for turn in count():
        order = np.random.default_rng([seed, number, turn]).permutation(len(part.shards))
        found = False
        for share in reader.shares([part.shards[i] for i in order]):
            for sample in read_samples(share[0], drops, *share[1:]):
                found = True
                yield sample
        vain = 0 if found else vain + 1
        if vain == _VAIN_PASSES:
            raise RuntimeError(
                f"no sound sample in {len(part.shards)} shards like {part.shards[0].file}; "
                f"dropped: {dict(drops.counts())}"
            )
