"""Region–text shards to batches: one decode an image, several of its regions."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from alpha_clip.batches import Collate
from alpha_clip.datasets import RegionShards
from alpha_clip.drops import Drops
from alpha_clip.geometry import SharedGeometry
from alpha_clip.model import AlphaClip
from alpha_clip.reader import find_shards
from alpha_clip.sampling import Sampling
from alpha_clip.streams import ShardSet
from alpha_clip.transforms import RegionAugment, RegionTransform

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSet:
    """A data set to read.

    Attributes:
        path: Folder of finished shards.
        weight: How often a training sample comes from it, relative to the other data sets.
        originals: Of masks that lie beside the pictures (sidecars): folder or URL where the
            original tars are now, if they have moved since the masks were made.
    """

    path: str
    weight: float = 1.0
    originals: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"the weight of {self.path} must be above 0, got {self.weight}; leave the data "
                "set out if nothing is to come from it"
            )


class RegionDataModule(L.LightningDataModule):
    """Training and validation batches of region–text shards.

    Size, normalisation and tokenizer are the model's own; nothing is said twice.

    Args:
        train: Data sets to train on: folders of finished shards, or `DataSet`s with weights.
        val: Data sets to validate on; none is none, and weights do not matter.
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
        train: list[str | DataSet],
        val: list[str | DataSet] | None = None,
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
        self.drops = Drops(max(1, workers))

    def setup(self, stage: str) -> None:
        """Find the shards; a missing or damaged one stops the run here."""
        self._train_sets = [_shard_set(part) for part in self.train] if stage == "fit" else []
        self._val_sets = [_shard_set(part) for part in self.val]

    def teardown(self, stage: str) -> None:
        """Say what was dropped on the way."""
        if counts := self.drops.counts():
            log.warning("dropped while reading: %s", dict(counts))

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
        return self._loader(self._train_sets, augment, seed, training=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Every region of every validation image once, each in a row of its own."""
        if not self._val_sets:
            return []
        model = self._model()
        transform = model.transform.replace(geometry=self.val_geometry)
        return self._loader(self._val_sets, transform, self.seed, training=False)

    def _loader(
        self,
        sets: list[ShardSet],
        transform: RegionTransform | RegionAugment,
        seed: int,
        training: bool,
    ) -> DataLoader[Any]:
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        data = RegionShards(
            sets,
            transform,
            self.sampling,
            seed,
            shuffle=self.shuffle if training else 0,
            every_region=not training,
            rank=rank,
            world=world,
            drops=self.drops,
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
        if self.trainer is None:
            raise RuntimeError(
                "the batches follow the model (size, normalisation, tokenizer), so a Trainer has "
                "to know this module: trainer.fit(AlphaClipModule(...), datamodule=...); to read "
                "shards without one, use alpha_clip.datasets.RegionShards"
            )
        module: Any = self.trainer.lightning_module
        return module.model  # type: ignore[no-any-return]


def _shard_set(part: str | DataSet) -> ShardSet:
    part = DataSet(part) if isinstance(part, str) else part
    return ShardSet(tuple(find_shards([part.path], part.originals)), part.weight)


def _one_thread(_: int) -> None:
    """Keep a worker to one core; the step needs the others."""
    torch.set_num_threads(1)
