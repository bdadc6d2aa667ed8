"""Training as a LightningModule: one step for contrastive pre-training and for alpha tuning.

With `train_alpha` off, alpha's kernel stays at zero and the model is a plain CLIP: so the same code
trains the CLIP that an Alpha-CLIP starts from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from alpha_clip.batches import RegionBatch
from alpha_clip.checkpoint import save_checkpoint
from alpha_clip.data import RegionDataModule
from alpha_clip.factory import create_model
from alpha_clip.losses import RegionContrastiveLoss
from alpha_clip.optim import OptimConfig, create_optimizer, create_schedule
from alpha_clip.surgery import alpha_parameters


@dataclass(frozen=True)
class EncoderConfig:
    """What to train; see `alpha_clip.create_model`.

    Attributes:
        name: An open_clip architecture, or `local-dir:FOLDER` with its config.
        pretrained: An open_clip tag or file.
        checkpoint: A folder written by `save_checkpoint`, instead of the two.
    """

    name: str | None = None
    pretrained: str | None = None
    checkpoint: str | None = None


@dataclass(frozen=True)
class TrainableConfig:
    """Which parts learn. The paper trains alpha and all visual blocks (Table 6).

    Attributes:
        alpha: The alpha convolution; without it the model is a plain CLIP.
        visual: The rest of the image tower.
        text: The text tower.
        logit_scale: The temperature, kept within 1..100.
    """

    alpha: bool = True
    visual: bool = True
    text: bool = False
    logit_scale: bool = False

    def apply(self, model: nn.Module, visual: nn.Module, logit_scale: nn.Parameter) -> None:
        """Freeze what does not train."""
        added = {id(p) for p in alpha_parameters(visual)}
        inside = {id(p) for p in visual.parameters()}
        for parameter in model.parameters():
            if id(parameter) in added:
                trains = self.alpha
            elif id(parameter) in inside:
                trains = self.visual
            else:
                trains = self.logit_scale if parameter is logit_scale else self.text
            parameter.requires_grad_(trains)


class AlphaClipModule(L.LightningModule):
    """Trains an Alpha-CLIP on region–text pairs.

    Args:
        encoder: What to train.
        trainable: Which parts of it learn.
        optim: Rates and schedule.
        loss: The contrastive loss.
        output: Folder that receives the trained model (`save_checkpoint`) at every checkpoint.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        trainable: TrainableConfig = TrainableConfig(),
        optim: OptimConfig = OptimConfig(),
        loss: RegionContrastiveLoss | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__()
        self.trainable = trainable
        self.optim = optim
        self.loss = loss or RegionContrastiveLoss()
        self.output = output
        self.model, _, _ = create_model(encoder.name, encoder.pretrained, encoder.checkpoint)
        trainable.apply(self.model, self.model.visual, self.model.logit_scale)
        self._val: list[tuple[Tensor, Tensor]] = []

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW and its schedule over the real number of steps."""
        optimizer = create_optimizer(self.model, self.optim)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = create_schedule(optimizer, self.optim, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def forward(self, batch: RegionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return features of regions and phrases, of length 1, and the phrases' tokens."""
        count = batch.alphas.shape[0] * batch.alphas.shape[1]
        image = self.model.encode_regions(batch.rgb, batch.alphas, normalize=True, chunk=count)
        tokens = batch.tokens.flatten(0, 1)
        unique, place = torch.unique(tokens, dim=0, return_inverse=True)
        with torch.set_grad_enabled(self.trainable.text and torch.is_grad_enabled()):
            text = self.model.encode_text(unique, normalize=True)[place]
        return image.flatten(0, 1), text, tokens

    def training_step(self, batch: RegionBatch, batch_idx: int) -> Tensor:
        """One contrastive step."""
        image, text, tokens = self(batch)
        whole, regions = batch.whole.flatten(), batch.whole.shape[1]
        scale = self.model.logit_scale.exp()
        loss: Tensor = self.loss(image, text, tokens, scale, whole, regions)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        """Keep the temperature where CLIP keeps it."""
        if self.trainable.logit_scale:
            self.model.logit_scale.data.clamp_(0.0, 4.6052)

    def validation_step(self, batch: RegionBatch, batch_idx: int) -> None:
        """Collect the features of regions and the tokens of their phrases."""
        image = self.model.encode_regions(batch.rgb, batch.alphas, normalize=True)
        self._val.append((image.flatten(0, 1), batch.tokens.flatten(0, 1)))

    def on_validation_epoch_end(self) -> None:
        """Log region top-1: is a region closest to its own phrase, of all the set's phrases?"""
        image, tokens = (torch.cat([v[i] for v in self._val]) for i in (0, 1))
        self._val.clear()
        candidates, target = torch.unique(tokens, dim=0, return_inverse=True)
        text = torch.cat([self.model.encode_text(t, normalize=True) for t in candidates.split(256)])
        top1 = ((image @ text.T).argmax(-1) == target).float().mean()
        self.log("val/region_top1", top1, prog_bar=True, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        """Log what the readers dropped; write the weights, so that a cut run leaves a model."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, RegionDataModule):
            dropped = float(sum(data.drops.counts().values()))
            self.log("train/dropped_samples", dropped, sync_dist=True, reduce_fx="sum")
        if self.output and self.trainer.is_global_zero:
            save_checkpoint(self.model, self.output)
