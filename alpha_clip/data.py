"""Region–text shards to batches: one decode an image, several of its regions."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from alpha_clip.factory import Tokenizer, create_tokenizer
from alpha_clip.model import AlphaClip
from alpha_clip.reader import Shard, find_shards, read_samples
from alpha_clip.regions import RegionAnnotation, RegionSample, SampleError
from alpha_clip.transforms import Geometry, RegionAugment, RegionTransform

log = logging.getLogger(__name__)


@dataclass
class RegionBatch:
    """A batch of images, each with the same number of regions.

    Attributes:
        rgb: Normalised images.
        alphas: Normalised alphas of their regions.
        tokens: Tokens of the regions' phrases.
    """

    rgb: Float[Tensor, "batch 3 height width"]
    alphas: Float[Tensor, "batch regions 1 height width"]
    tokens: Int[Tensor, "batch regions context"]

    def to(self, *args: Any, **kwargs: Any) -> RegionBatch:
        """Return the batch on another device; Lightning calls it."""
        return RegionBatch(
            self.rgb.to(*args, **kwargs),
            self.alphas.to(*args, **kwargs),
            self.tokens.to(*args, **kwargs),
        )


@dataclass(frozen=True)
class Sampling:
    """What of an image goes into a batch.

    Attributes:
        regions_per_image: Regions drawn of each image; they share its decode and, in the loss, are
            negatives of each other.
        whole_image_ratio: Probability that a region is replaced by the whole image with its full
            caption (paper, section 3.2: 0.1).
        kinds: Kinds of phrases to take; `None` takes all.
    """

    regions_per_image: int = 1
    whole_image_ratio: float = 0.1
    kinds: list[str] | None = None

    def __post_init__(self) -> None:
        if self.regions_per_image < 1 or not 0 <= self.whole_image_ratio <= 1:
            raise ValueError(
                "expected regions_per_image >= 1 and whole_image_ratio in 0..1, got "
                f"{self.regions_per_image} and {self.whole_image_ratio}"
            )

    def draw(
        self, sample: RegionSample, rng: np.random.Generator
    ) -> list[tuple[RegionAnnotation | None, str]]:
        """Draw regions with their texts; `None` stands for the whole image.

        Raises:
            SampleError: If the sample has nothing of what is wanted.
        """
        regions = [r for r in sample.regions if self.kinds is None or r.kind in self.kinds]
        if not regions:
            raise SampleError("no_wanted_kind", f"{sample.key} has no phrase of {self.kinds}")
        order = [int(i) for i in rng.permutation(len(regions))]
        chosen: list[tuple[RegionAnnotation | None, str]] = []
        for i in range(self.regions_per_image):
            region = regions[order[i % len(order)]]
            whole = bool(sample.caption) and rng.random() < self.whole_image_ratio
            chosen.append((None, sample.caption) if whole else (region, region.text))
        return chosen


class RegionShards(IterableDataset[tuple[Tensor, Tensor, list[str]]]):
    """Streams `(rgb, alphas, texts)` of the shards that fall to this process and worker.

    Args:
        shards: All shards; each is read by one worker of one process.
        transform: Turns an image and regions into tensors.
        sampling: What to take of an image.
        seed: Order and choice are a function of it, the epoch and the worker.
        shuffle: Samples held back to draw from; 0 keeps the order and stops after one pass.
        rank: This process's number.
        world: Number of processes.
    """

    def __init__(
        self,
        shards: list[Shard],
        transform: RegionTransform | RegionAugment,
        sampling: Sampling,
        seed: int,
        shuffle: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.shards = shards
        self.transform = transform
        self.sampling = sampling
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine = self.shards[self.rank * workers + worker :: self.world * workers]
        rng = np.random.default_rng([self.seed, self.rank, worker])
        torch.manual_seed(int(rng.integers(2**31)))  # what RegionAugment draws from
        drops: Counter[str] = Counter()
        for sample in self._shuffled(mine, rng, drops):
            try:
                chosen = self.sampling.draw(sample, rng)
                image = Image.open(io.BytesIO(sample.jpeg))
                masks = [None if region is None else region.rle for region, _ in chosen]
                yield *self.transform.many(image, list(masks)), [text for _, text in chosen]
            except (SampleError, OSError) as error:
                drops[error.reason if isinstance(error, SampleError) else "corrupt_image"] += 1
                log.warning("%s: %s", sample.key, error)

    def _shuffled(
        self, shards: list[Shard], rng: np.random.Generator, drops: Counter[str]
    ) -> Iterator[RegionSample]:
        if not self.shuffle:
            for shard in shards:
                yield from read_samples(shard, drops)
            return
        held: list[RegionSample] = []
        for _ in count() if shards else ():
            found = 0
            for i in rng.permutation(len(shards)):
                for sample in read_samples(shards[int(i)], drops):
                    found += 1
                    if len(held) < self.shuffle:
                        held.append(sample)
                        continue
                    j = int(rng.integers(len(held)))
                    sample, held[j] = held[j], sample
                    yield sample
            if not found:
                raise RuntimeError(
                    f"no sound sample in {len(shards)} shards; dropped: {dict(drops)}"
                )


class RegionDataModule(L.LightningDataModule):
    """Training and validation batches of region–text shards.

    Size, normalisation and tokenizer are the model's own; nothing is said twice.

    Args:
        train: Folders of finished shards to train on.
        val: Folders to validate on; none is none.
        batch_size: Images a batch and process.
        sampling: What of an image goes into a training batch.
        augment_scale: Smallest and largest crop of training images, as a share of their area.
        flip: Probability of a mirror image in training.
        jitter: Strength of colour jitter in training.
        val_geometry: Geometry of validation images.
        shuffle: Training samples held back to draw from, each worker.
        workers: Processes that read and decode.
        seed: Order and choices of training.
    """

    def __init__(
        self,
        train: list[str],
        val: list[str] | None = None,
        batch_size: int = 64,
        sampling: Sampling = Sampling(),
        augment_scale: tuple[float, float] = (0.6, 1.0),
        flip: float = 0.0,
        jitter: float = 0.0,
        val_geometry: Geometry = "squash",
        shuffle: int = 1000,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val or []
        self.batch_size = batch_size
        self.sampling = sampling
        self.augment_scale = augment_scale
        self.flip = flip
        self.jitter = jitter
        self.val_geometry = val_geometry
        self.shuffle = shuffle
        self.workers = workers
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Find the shards; a missing or damaged one stops the run here."""
        self._train_shards = find_shards(self.train) if stage == "fit" else []
        self._val_shards = find_shards(self.val) if self.val else []
        readers = self.trainer.world_size * max(1, self.workers) if self.trainer else 1
        if stage == "fit" and len(self._train_shards) < readers:
            raise ValueError(
                f"{len(self._train_shards)} training shards can't feed {readers} readers "
                "(processes x workers); lower workers, or make smaller shards"
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless stream; the trainer's `limit_train_batches` says how long an epoch is."""
        model = self._model()
        augment = RegionAugment(
            model.image_size,
            model.normalisation,
            scale=self.augment_scale,
            flip=self.flip,
            jitter=self.jitter,
        )
        epoch = self.trainer.current_epoch if self.trainer else 0
        seed = self.seed + 1_000_003 * epoch
        return self._loader(self._train_shards, augment, self.sampling, seed, self.shuffle)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Every region of every validation image once, without its whole."""
        if not self._val_shards:
            return []
        model = self._model()
        transform = RegionTransform(model.image_size, model.normalisation, self.val_geometry)
        sampling = Sampling(1, 0.0, self.sampling.kinds)
        return self._loader(self._val_shards, transform, sampling, self.seed, 0)

    def _loader(
        self,
        shards: list[Shard],
        transform: RegionTransform | RegionAugment,
        sampling: Sampling,
        seed: int,
        shuffle: int,
    ) -> DataLoader[Any]:
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        data = RegionShards(shards, transform, sampling, seed, shuffle, rank, world)
        return DataLoader(
            data,
            batch_size=self.batch_size,
            num_workers=self.workers,
            collate_fn=Collate(create_tokenizer(self._model())),
            drop_last=shuffle > 0,
            worker_init_fn=_one_thread,
        )

    def _model(self) -> AlphaClip:
        module: Any = self.trainer.lightning_module if self.trainer else None
        return module.model  # type: ignore[no-any-return]


@dataclass
class Collate:
    """Stacks samples into a `RegionBatch`."""

    tokenizer: Tokenizer

    def __call__(self, samples: list[tuple[Tensor, Tensor, list[str]]]) -> RegionBatch:
        """Stack images and alphas and tokenize the phrases."""
        texts = [text for _, _, phrases in samples for text in phrases]
        tokens = self.tokenizer(texts).unflatten(0, (len(samples), -1))
        rgb, alphas = (torch.stack([s[i] for s in samples]) for i in (0, 1))  # type: ignore[misc]
        return RegionBatch(rgb, alphas, tokens)


def _one_thread(_: int) -> None:
    """Keep a worker to one core; the step needs the others."""
    torch.set_num_threads(1)
