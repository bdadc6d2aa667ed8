"""Shards as a stream of tensors: one decode an image, several of its regions."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from alpha_clip.batches import LoadedSample
from alpha_clip.drops import Drops
from alpha_clip.regions import Region, RegionSample, SampleError, decode_jpeg
from alpha_clip.sampling import Sampling
from alpha_clip.streams import Place, Reader, ShardSet, endless, one_pass
from alpha_clip.transforms import RegionAugment, RegionTransform

_LARGE_BLOCK = 31 << 20  # bytes; from 32 MB on, glibc learns nothing from it


class RegionShards(IterableDataset[LoadedSample]):
    """Streams the samples of the shards that fall to this process and worker.

    Every choice (order, regions, augmentation) is a function of the seed, the reader and the number
    of the sample in its stream, so a stream goes on from any `Place` as if it had never stopped.

    Args:
        sets: Data sets with their weights.
        transform: Turns an image and regions into tensors.
        sampling: What to take of an image.
        seed: Of all choices.
        shuffle: Samples that are shuffled together; 0 keeps the order and stops after one pass.
        every_region: Yield each region in a row of its own instead of drawing some.
        rank: This process's number.
        world: Number of processes.
        drops: Where to count what is dropped; it has a row for each worker.
    """

    def __init__(
        self,
        sets: list[ShardSet],
        transform: RegionTransform | RegionAugment,
        sampling: Sampling,
        seed: int,
        shuffle: int,
        every_region: bool = False,
        rank: int = 0,
        world: int = 1,
        drops: Drops | None = None,
    ) -> None:
        self.sets = sets
        self.transform = transform
        self.sampling = sampling
        self.seed = [seed]
        self.shuffle = shuffle
        self.every_region = every_region
        self.rank = rank
        self.world = world
        self.drops = drops or Drops()
        self.places: dict[int, Place] = {}
        """Where each worker's reader begins; the start of its stream, if it is not here."""
        self.first_worker = 0
        """Which reader the first worker is: data loaders take their first batch from that one."""

    def __iter__(self) -> Iterator[LoadedSample]:
        info = get_worker_info()
        _keep_freed_memory()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        worker = (worker + self.first_worker) % workers
        drops = self.drops.reader(worker)
        reader = Reader(self.rank * workers + worker, self.world * workers)
        patience = self.shuffle + 2 * sum(part.samples for part in self.sets)
        in_vain = 0
        for sample, place in self._places(reader, drops, worker):
            try:
                loaded = self._load(sample, [*self.seed, reader.index, place.draws])
            except SampleError as error:
                drops.add(error.reason, f"{sample.key}: {error.detail}")
                in_vain += 1
                if self.shuffle and in_vain > patience:
                    raise RuntimeError(
                        f"no usable sample in the shards; dropped: {dict(drops.counts())}"
                    ) from error
                continue
            in_vain = 0
            for row in loaded:
                row.reader, row.place = worker, place
                yield row

    def _places(
        self, reader: Reader, drops: Drops, worker: int
    ) -> Iterator[tuple[RegionSample, Place]]:
        if self.shuffle:
            start = self.places.get(worker, Place())
            return endless(self.sets, reader, drops, self.seed, self.shuffle, start)
        samples = one_pass(self.sets, reader, drops)
        return ((sample, Place(draws)) for draws, sample in enumerate(samples, 1))

    def _load(self, sample: RegionSample, seed: list[int]) -> list[LoadedSample]:
        """Decode an image once, for the regions drawn of it or, in order, for each of them."""
        every = self.every_region
        rng = np.random.default_rng(seed)
        chosen = self.sampling.every(sample) if every else self.sampling.draw(sample, rng)
        image = decode_jpeg(sample.jpeg)
        masks: list[Region] = [None if r is None else r.rle for r, _ in chosen]
        with torch.random.fork_rng(devices=()):  # what RegionAugment draws from
            # Not torch.manual_seed: it asks every kind of device, a millisecond each time.
            torch.default_generator.manual_seed(int(rng.integers(2**62)))
            rgb, alphas = self.transform.many(image, masks)
        texts, whole = [text for _, text in chosen], [mask is None for mask in masks]
        picture = _number(f"{sample.source}/{sample.key}")
        if not every:
            return [LoadedSample(rgb, alphas, texts, whole, picture)]
        alone = (slice(i, i + 1) for i in range(len(chosen)))
        return [LoadedSample(rgb, alphas[i], texts[i], whole[i], picture) for i in alone]


def _keep_freed_memory() -> None:
    """Let an image's tensors lie where those of the image before lay.

    glibc returns freed memory to the kernel and takes it back page by page, up to a quarter of the
    time of an image, until it has seen a large block freed. This one is not even touched.
    """
    np.empty(_LARGE_BLOCK, np.uint8)


def _number(name: str) -> int:
    """Return a number that tells a picture from others, on every process alike."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
