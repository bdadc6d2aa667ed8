"""Shards as a stream of tensors: one decode an image, several of its regions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from alpha_clip.batches import LoadedSample
from alpha_clip.drops import Drops
from alpha_clip.regions import Region, RegionSample, SampleError, decode_jpeg
from alpha_clip.sampling import Sampling
from alpha_clip.streams import Reader, ShardSet, endless, one_pass
from alpha_clip.transforms import RegionAugment, RegionTransform


class RegionShards(IterableDataset[LoadedSample]):
    """Streams the samples of the shards that fall to this process and worker.

    Args:
        sets: Data sets with their weights.
        transform: Turns an image and regions into tensors.
        sampling: What to take of an image.
        seed: Order and choice are a function of it and of the reader.
        shuffle: Samples held back to draw from; 0 keeps the order and stops after one pass.
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
        self.seed = seed
        self.shuffle = shuffle
        self.every_region = every_region
        self.rank = rank
        self.world = world
        self.drops = drops or Drops()

    def __iter__(self) -> Iterator[LoadedSample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        drops = self.drops.reader(worker)
        reader = Reader(self.rank * workers + worker, self.world * workers)
        rng = np.random.default_rng([self.seed, self.rank, worker])
        torch.manual_seed(int(rng.integers(2**31)))  # what RegionAugment draws from
        if self.shuffle:
            samples = endless(self.sets, reader, drops, self.seed, self.shuffle)
        else:
            samples = one_pass(self.sets, reader, drops)
        patience = self.shuffle + 2 * sum(s.samples for part in self.sets for s in part.shards)
        in_vain = 0
        for sample in samples:
            try:
                loaded = self._load(sample, rng)
            except SampleError as error:
                drops.add(error.reason, f"{sample.key}: {error.detail}")
                in_vain += 1
                if self.shuffle and in_vain > patience:
                    raise RuntimeError(
                        f"no usable sample in the shards; dropped: {dict(drops.counts())}"
                    ) from error
                continue
            in_vain = 0
            yield from loaded

    def _load(self, sample: RegionSample, rng: np.random.Generator) -> list[LoadedSample]:
        """Decode an image once, for the regions drawn of it or, in order, for each of them."""
        every = self.every_region
        chosen = self.sampling.every(sample) if every else self.sampling.draw(sample, rng)
        image = decode_jpeg(sample.jpeg)
        masks: list[Region] = [None if r is None else r.rle for r, _ in chosen]
        rgb, alphas = self.transform.many(image, masks)
        texts, whole = [text for _, text in chosen], [mask is None for mask in masks]
        if not every:
            return [LoadedSample(rgb, alphas, texts, whole)]
        alone = (slice(i, i + 1) for i in range(len(chosen)))
        return [LoadedSample(rgb, alphas[i], texts[i], whole[i]) for i in alone]
