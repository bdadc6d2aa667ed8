"""Region–text shards to batches: one decode an image, several of its regions."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from alpha_clip.batches import Collate, RegionBatch
from alpha_clip.datasets import RegionShards
from alpha_clip.drops import Drops
from alpha_clip.geometry import SharedGeometry
from alpha_clip.loader import TrainingBatches, start_worker
from alpha_clip.model import AlphaClip
from alpha_clip.phrases import PhraseFeatures
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
        train_geometry: What makes training images, or crops of them, square.
        augment_scale: Smallest and largest crop of training images, as a share of their area.
        flip: Probability of a mirror image in training.
        jitter: Strength of colour jitter in training.
        val_geometry: Geometry of validation images.
        shuffle: Training samples that each worker shuffles together.
        workers: Processes that read and decode.
        seed: Order and choices of training.
        phrases: Folder of text features made by `alpha-clip phrases` from the training data, for a
            frozen text tower; by default it encodes each batch's phrases.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        train: list[str | DataSet],
        val: list[str | DataSet] | None = None,
        batch_size: int = 64,
        sampling: Sampling = Sampling(),
        train_geometry: SharedGeometry = "squash",
        augment_scale: tuple[float, float] = (0.6, 1.0),
        flip: float = 0.0,
        jitter: float = 0.0,
        val_geometry: SharedGeometry = "squash",
        shuffle: int = 1000,
        workers: int = 2,
        seed: int = 0,
        phrases: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("shuffle", shuffle, 1),
            ("workers", workers, 0),
        ):
            if value < least:
                raise ValueError(f"expected {name} of at least {least}, got {value}")
        if not train:
            raise ValueError("expected at least one data set in data.train, got none")
        self.train = train
        self.val = val or []
        self.batch_size = batch_size
        self.sampling = sampling
        self.train_geometry = train_geometry
        self.augment_scale = augment_scale
        self.flip = flip
        self.jitter = jitter
        self.val_geometry = val_geometry
        self.shuffle = shuffle
        self.workers = workers
        self.seed = seed
        self.phrases = phrases
        self.drops = Drops(max(1, workers))
        self._batches: TrainingBatches | None = None
        self._state: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Find the shards; a missing or damaged one stops the run here."""
        self._train_sets = [_shard_set(part) for part in self.train] if stage == "fit" else []
        self._val_sets = [_shard_set(part) for part in self.val]

    def teardown(self, stage: str) -> None:
        """Say what was dropped on the way."""
        if counts := self.drops.counts():
            log.warning("dropped while reading: %s", dict(counts))

    def train_dataloader(self) -> TrainingBatches:
        """Endless stream; an epoch is one pass, or what `limit_train_batches` says."""
        model = self._model()
        augment = RegionAugment(
            model.image_size,
            model.normalisation,
            scale=self.augment_scale,
            flip=self.flip,
            jitter=self.jitter,
            interpolation=model.transform.interpolation,
            geometry=self.train_geometry,
        )
        data = self._shards(self._train_sets, augment, training=True)
        collate = Collate(model.tokenizer, self._features(model))
        self._batches = TrainingBatches(
            data, self.batch_size, self.workers, collate, self._on_gpu()
        )
        if self._state:
            self._batches.load_state_dict(self._state)
        return self._batches

    def on_before_batch_transfer(self, batch: RegionBatch, dataloader_idx: int) -> RegionBatch:
        """Note which batches are trained on."""
        if self._batches and self.trainer and self.trainer.training:
            self._batches.took(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return how far training is in its data; every process has to call it."""
        return self._batches.state_dict() if self._batches else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the samples that come after those of the checkpoint."""
        self._state = state_dict
        if self._batches:
            self._batches.load_state_dict(state_dict)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Every region of every validation image once, each in a row of its own."""
        if not self._val_sets:
            return []
        model = self._model()
        transform = model.transform.replace(geometry=self.val_geometry)
        return DataLoader(
            self._shards(self._val_sets, transform, training=False),
            batch_size=self.batch_size,
            num_workers=self.workers,
            collate_fn=Collate(model.tokenizer),
            pin_memory=self._on_gpu(),
            worker_init_fn=start_worker,
        )

    def _shards(
        self, sets: list[ShardSet], transform: RegionTransform | RegionAugment, training: bool
    ) -> RegionShards:
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        return RegionShards(
            sets,
            transform,
            self.sampling,
            self.seed,
            shuffle=self.shuffle if training else 0,
            every_region=not training,
            rank=rank,
            world=world,
            drops=self.drops,
        )

    def _features(self, model: AlphaClip) -> PhraseFeatures | None:
        if self.phrases is None:
            return None
        inside = {id(p) for p in model.visual.parameters()} | {id(model.logit_scale)}
        text = (p for p in model.parameters() if id(p) not in inside and p.ndim > 0)
        if any(p.requires_grad for p in text):
            raise ValueError(
                "data.phrases holds features of a frozen text tower, but trainable.text is on; "
                "leave one of them out"
            )
        features = PhraseFeatures(self.phrases)
        features.check(model)
        return features

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

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
