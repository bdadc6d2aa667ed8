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
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from alpha_clip.geometry import SharedGeometry
from alpha_clip.model import AlphaClip
from alpha_clip.reader import Shard, find_shards, read_samples
from alpha_clip.regions import Region, RegionSample, SampleError
from alpha_clip.sampling import Sampling
from alpha_clip.text import Tokenizer
from alpha_clip.transforms import RegionAugment, RegionTransform

log = logging.getLogger(__name__)


@dataclass
class RegionBatch:
    """A batch of images, each with the same number of regions.

    Attributes:
        rgb: Normalised images.
        alphas: Normalised alphas of their regions.
        tokens: Tokens of the regions' phrases.
        whole: Which regions are the whole image, with its caption.
    """

    rgb: Float[Tensor, "batch 3 height width"]
    alphas: Float[Tensor, "batch regions 1 height width"]
    tokens: Int[Tensor, "batch regions context"]
    whole: Bool[Tensor, "batch regions"]

    def to(self, *args: Any, **kwargs: Any) -> RegionBatch:
        """Return the batch on another device; Lightning calls it."""
        return RegionBatch(
            self.rgb.to(*args, **kwargs),
            self.alphas.to(*args, **kwargs),
            self.tokens.to(*args, **kwargs),
            self.whole.to(*args, **kwargs),
        )


@dataclass(frozen=True)
class LoadedSample:
    """One image with the regions drawn of it, before it is batched; see `RegionBatch`."""

    rgb: Float[Tensor, "3 height width"]
    alphas: Float[Tensor, "regions 1 height width"]
    texts: list[str]
    whole: list[bool]


class RegionShards(IterableDataset[LoadedSample]):
    """Streams the samples of the shards that fall to this process and worker.

    Args:
        shards: All shards; each is read by one worker of one process.
        transform: Turns an image and regions into tensors.
        sampling: What to take of an image.
        seed: Order and choice are a function of it, the epoch and the worker.
        shuffle: Samples held back to draw from; 0 keeps the order and stops after one pass.
        every_region: Yield each region in a row of its own instead of drawing some.
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
        every_region: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.shards = shards
        self.transform = transform
        self.sampling = sampling
        self.seed = seed
        self.shuffle = shuffle
        self.every_region = every_region
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[LoadedSample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine = self.shards[self.rank * workers + worker :: self.world * workers]
        rng = np.random.default_rng([self.seed, self.rank, worker])
        torch.manual_seed(int(rng.integers(2**31)))  # what RegionAugment draws from
        drops: Counter[str] = Counter()
        patience = self.shuffle + sum(shard.samples for shard in mine)
        in_vain = 0
        for sample in self._shuffled(mine, rng, drops):
            try:
                loaded = self._load(sample, rng)
            except (SampleError, OSError) as error:
                drops[error.reason if isinstance(error, SampleError) else "corrupt_image"] += 1
                log.warning("%s: %s", sample.key, error)
                in_vain += 1
                if self.shuffle and in_vain > patience:
                    raise RuntimeError(
                        f"no usable sample in {len(mine)} shards; dropped: {dict(drops)}"
                    ) from error
                continue
            in_vain = 0
            yield from loaded

    def _load(self, sample: RegionSample, rng: np.random.Generator) -> list[LoadedSample]:
        """Decode an image once, for the regions drawn of it or, in order, for each of them."""
        every = self.every_region
        chosen = self.sampling.every(sample) if every else self.sampling.draw(sample, rng)
        image = Image.open(io.BytesIO(sample.jpeg))
        masks: list[Region] = [None if r is None else r.rle for r, _ in chosen]
        rgb, alphas = self.transform.many(image, masks)
        texts, whole = [text for _, text in chosen], [mask is None for mask in masks]
        if not every:
            return [LoadedSample(rgb, alphas, texts, whole)]
        alone = (slice(i, i + 1) for i in range(len(chosen)))
        return [LoadedSample(rgb, alphas[i], texts[i], whole[i]) for i in alone]

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
        val_geometry: SharedGeometry = "squash",
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
            interpolation=model.transform.interpolation,
        )
        epoch = self.trainer.current_epoch if self.trainer else 0
        seed = self.seed + 1_000_003 * epoch
        return self._loader(self._train_shards, augment, seed, training=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Every region of every validation image once, each in a row of its own."""
        if not self._val_shards:
            return []
        model = self._model()
        transform = model.transform.replace(geometry=self.val_geometry)
        return self._loader(self._val_shards, transform, self.seed, training=False)

    def _loader(
        self,
        shards: list[Shard],
        transform: RegionTransform | RegionAugment,
        seed: int,
        training: bool,
    ) -> DataLoader[Any]:
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        data = RegionShards(
            shards,
            transform,
            self.sampling,
            seed,
            shuffle=self.shuffle if training else 0,
            every_region=not training,
            rank=rank,
            world=world,
        )
        return DataLoader(
            data,
            batch_size=self.batch_size,
            num_workers=self.workers,
            collate_fn=Collate(self._model().tokenizer),
            drop_last=training,
            worker_init_fn=_one_thread,
        )

    def _model(self) -> AlphaClip:
        module: Any = self.trainer.lightning_module if self.trainer else None
        return module.model  # type: ignore[no-any-return]


@dataclass
class Collate:
    """Stacks samples into a `RegionBatch`."""

    tokenizer: Tokenizer

    def __call__(self, samples: list[LoadedSample]) -> RegionBatch:
        """Stack images and alphas and tokenize the phrases."""
        tokens = self.tokenizer([text for sample in samples for text in sample.texts])
        return RegionBatch(
            rgb=torch.stack([sample.rgb for sample in samples]),
            alphas=torch.stack([sample.alphas for sample in samples]),
            tokens=tokens.unflatten(0, (len(samples), -1)),
            whole=torch.tensor([sample.whole for sample in samples]),
        )


def _one_thread(_: int) -> None:
    """Keep a worker to one core; the step needs the others."""
    torch.set_num_threads(1)
