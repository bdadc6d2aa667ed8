"""How fast training is, and what share of the device's peak that is."""

from __future__ import annotations

import copy
import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from alpha_clip.batches import RegionBatch
from alpha_clip.late_alpha import LateAlpha
from alpha_clip.many_regions import encode_many
from alpha_clip.model import AlphaClip
from alpha_clip.pooled import pooled_features


class Throughput(L.Callback):
    """Logs `speed/images`, `speed/regions` (a second, all processes) and `speed/mfu`.

    Over the steps since the last time, with all that a run does in between; the device is waited
    for only then. MFU counts the image tower's forward and backward pass as the recipe needs them,
    without what checkpointing computes again, against the peak of the device for the precision of
    the run; it is left out where that is unknown (CPUs).
    """

    def __init__(self) -> None:
        self._flops: float | None = None
        self._peak: float | None = None
        self._since = 0.0
        self._images = self._regions = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look up the peak of the device; count what a region costs, while the model is whole."""
        half = "bf16" in str(trainer.precision) or "16" in str(trainer.precision)
        dtype = torch.bfloat16 if half else torch.float32
        self._peak = get_available_flops(trainer.strategy.root_device, dtype)
        if self._peak:
            module: Any = pl_module
            data = getattr(trainer, "datamodule", None)
            sampling = getattr(data, "sampling", None)
            self._flops = flops_per_region(module.model, getattr(sampling, "regions_per_image", 1))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to measure."""
        self._begin(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: RegionBatch,
        batch_idx: int,
    ) -> None:
        """Count, and log now and then."""
        self._images += len(batch.alphas)
        self._regions += batch.alphas.shape[0] * batch.alphas.shape[1]
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a part
        if (batch_idx + 1) % interval:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._since
        speeds = {
            "speed/images": trainer.world_size * self._images / seconds,
            "speed/regions": trainer.world_size * self._regions / seconds,
        }
        if self._flops and self._peak:
            speeds["speed/mfu"] = self._regions * self._flops / seconds / self._peak
        for logger in trainer.loggers:
            logger.log_metrics(speeds, step=trainer.global_step)
        self._begin(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave validation out."""
        self._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        self._since = time.perf_counter()
        self._images = self._regions = 0


def flops_per_region(model: AlphaClip, regions: int = 1) -> float:
    """Return the floating-point operations of a training step for one region in the image tower.

    Counted on a copy without memory, by the short way (`pooled_features`). What is frozen costs no
    gradient of its own, and what checkpointing computes again does not count.

    Args:
        model: The model.
        regions: Regions an image; with late alpha they share what comes before it.
    """
    empty = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad)
        for p in model.visual.parameters()
    }
    tower: Any = copy.deepcopy(model.visual, empty).to("meta")
    if hasattr(tower, "set_grad_checkpointing"):
        tower.set_grad_checkpointing(False)
    rgba = torch.zeros(regions, 4, model.image_size, model.image_size, device="meta")
    late = isinstance(tower, LateAlpha)
    with FlopCounterMode(display=False) as counter:
        if late:
            features = encode_many(tower, rgba[:1, :3], rgba[None, :, 3:], chunk=regions)
        else:
            features = pooled_features(tower, rgba)
        if features.requires_grad:
            features.sum().backward()
    return float(counter.get_total_flops()) / regions
