"""Training as a LightningModule: one step for contrastive pre-training and for alpha tuning.

With `trainable.alpha` off, alpha's kernel stays at zero and the model is a plain CLIP: so the same
code trains the CLIP that an Alpha-CLIP starts from.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from alpha_clip.batches import RegionBatch
from alpha_clip.data import RegionDataModule
from alpha_clip.factory import create_model
from alpha_clip.geometry import Geometry
from alpha_clip.late_alpha import AlphaEntry
from alpha_clip.late_number import LateNumber
from alpha_clip.losses import Pairs, RegionContrastiveLoss, RegionLoss, RegionSigmoidLoss
from alpha_clip.many_regions import encode_many
from alpha_clip.optim import OptimConfig, create_optimizer, create_schedule, declare_roles
from alpha_clip.region_matching import RegionMatching
from alpha_clip.sharding import join, shard, split
from alpha_clip.surgery import alpha_entry
from alpha_clip.trainable import TrainableConfig
from alpha_clip.training_checkpoint import add_model, check_recipe, write_model

LARGEST_SCALE = 4.6052  # logarithm of 100, CLIP's bound (arXiv 2103.00020, section 2.5)


@dataclass(frozen=True)
class EncoderConfig:
    """What to train; see `alpha_clip.create_model`.

    Attributes:
        name: An open_clip architecture, or `local-dir:FOLDER` with its config.
        pretrained: An open_clip tag or file.
        checkpoint: A folder of `save_checkpoint`, or a `.ckpt` of a run, instead of the two.
        image_size: Side of the input in pixels, if it should be another than the architecture's.
        geometry: How the trained model's own transform makes an image square.
        alpha_block: In front of which block alpha enters, if not as the checkpoint has it; a number
            or an `AlphaEntry`.
    """

    name: str | None = None
    pretrained: str | None = None
    checkpoint: str | None = None
    image_size: int | None = None
    geometry: Geometry | None = None
    alpha_block: int | AlphaEntry | None = None


class AlphaClipModule(L.LightningModule):
    """Trains an Alpha-CLIP on region–text pairs.

    Args:
        encoder: What to train.
        trainable: Which parts of it learn.
        optim: Rates and schedule.
        loss: What to minimise; by default CLIP's, or SigLIP's for a model with a logit bias.
        logit_scale: Logarithm of what cosines are multiplied with; by default the model's own.
        chunk: Regions that go through the image tower at a time. The rest of the batch keeps no
            activations: they are computed again for the gradient, a third more work. So a batch,
            and its negatives, can be as large as one likes (GradCache, arXiv 2101.06983, has the
            same cost; here the gradient comes in one backward pass).
        grad_checkpointing: Whether the tower's blocks compute their activations again.
        compile: Whether the image tower goes through `torch.compile`.
        output: Folder that receives the trained model (`save_checkpoint`) at every checkpoint.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        trainable: TrainableConfig = TrainableConfig(),
        optim: OptimConfig = OptimConfig(),
        loss: RegionLoss | None = None,
        logit_scale: float | None = None,
        chunk: int | None = None,
        grad_checkpointing: bool = False,
        compile: bool = False,
        output: str | None = None,
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"expected a chunk of at least 1 region, got {chunk}")
        self.trainable = trainable
        self.optim = optim
        self.chunk = chunk
        self.output = output
        self.model, _, _ = create_model(
            encoder.name,
            encoder.pretrained,
            encoder.checkpoint,
            geometry=encoder.geometry,
            image_size=encoder.image_size,
            alpha_block=encoder.alpha_block,
        )
        if logit_scale is not None:
            self.model.logit_scale.data.fill_(logit_scale)
        self.loss = loss or (
            RegionContrastiveLoss() if self._bias() is None else RegionSigmoidLoss()
        )
        self.val_matching = RegionMatching()
        trainable.apply(self.model)
        self.roles = declare_roles(self.model)
        tower: Any = self.model.visual
        if grad_checkpointing:
            tower.set_grad_checkpointing(True)
        if compile:
            tower.compile()
        self._joins = compile
        self._seed = 0
        self._norm: LateNumber | None = None

    def configure_model(self) -> None:
        """Split the image tower over the GPUs, where the strategy is FSDP2."""
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        if mesh.size() != self.trainer.world_size:
            raise ValueError(
                f"the strategy splits the data over {mesh.size()} of {self.trainer.world_size} "
                "processes: the others would train models of their own; set data_parallel_size to "
                "their number and tensor_parallel_size to 1"
            )
        shard(self.model, mesh)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW and its schedule over the real number of steps."""
        optimizer = create_optimizer(self.model.named_parameters(), self.roles, self.optim)
        schedule = create_schedule(optimizer, self.optim, self._steps())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("the run has no end: set trainer.max_epochs or trainer.max_steps")
        return int(steps)

    def on_fit_start(self) -> None:
        """Remember the run's seed."""
        self._seed = torch.initial_seed()

    def on_train_batch_start(self, batch: RegionBatch, batch_idx: int) -> None:
        """Make dropout and the like a function of the step: a resumed run repeats it."""
        place = (self._seed, self.current_epoch, batch_idx, self.global_rank)
        seed = hash(place) % 2**63
        # torch.manual_seed would visit every kind of device, which takes longer than all else here.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def forward(self, batch: RegionBatch) -> Pairs:
        """Return the features of a training batch."""
        return self._pairs(batch, self._encode(batch), self.trainable.text)

    def training_step(self, batch: RegionBatch, batch_idx: int) -> Tensor:
        """One contrastive step."""
        loss: Tensor = self.loss(self(batch), self.model.logit_scale.exp(), self._bias())
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Under FSDP, gather the weights: processes may have different numbers of batches."""
        join(self.model)

    def validation_step(self, batch: RegionBatch, batch_idx: int) -> None:
        """Collect the features of regions and of their phrases."""
        image = self.model.encode_regions(batch.rgb, batch.alphas, normalize=True)
        pairs = self._pairs(batch, image, text_trains=False)
        self.val_matching.update(pairs.image, pairs.text, pairs.phrase_ids, pairs.image_ids)

    def on_validation_epoch_end(self) -> None:
        """Log how well regions find their phrases; see `RegionMatching`."""
        for name, value in self.val_matching.compute().items():
            # The same on every process already; Lightning wants to be told.
            self.log(f"val/{name}", value, prog_bar=name == "region_top1", sync_dist=True)
        self.val_matching.reset()
        split(self.model)

    def _encode(self, batch: RegionBatch) -> Tensor:
        """Return the features of all regions, `[batch, regions, dim]`, of length 1."""
        count = batch.alphas.shape[:2].numel()
        recompute = self.chunk is not None
        features = encode_many(
            self.model.visual, batch.rgb, batch.alphas, self.chunk or count, recompute, self._joins
        )
        return F.normalize(features, dim=-1)

    def _pairs(self, batch: RegionBatch, image: Tensor, text_trains: bool) -> Pairs:
        text = batch.text
        if text is None:
            with torch.set_grad_enabled(text_trains and torch.is_grad_enabled()):
                text = self.model.encode_text(batch.tokens, normalize=True)
        text = text[batch.phrase.flatten()]
        pictures = batch.image_ids[:, None].expand_as(batch.phrase_ids).flatten()
        return Pairs(
            image.flatten(0, 1), text, batch.phrase_ids.flatten(), pictures, batch.whole.flatten()
        )

    def _bias(self) -> Tensor | None:
        return getattr(self.model.clip, "logit_bias", None)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the length of the gradient; stop if that of the step before was not finite."""
        self._check_finite()
        learning = (p for group in optimizer.param_groups for p in group["params"])
        norm = torch.nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
        self._norm = LateNumber(norm)
        self.log("train/grad_norm", norm)

    def _check_finite(self) -> None:
        """Stop a run whose weights are lost.

        That is noticed one step late, so that a GPU need not wait for the CPU, but before every
        checkpoint: those hold sound weights.
        """
        scales = isinstance(self.trainer.precision_plugin, MixedPrecision) and (
            self.trainer.precision_plugin.scaler is not None
        )  # fp16's scaler leaves such steps out by itself
        if self._norm is None or scales or math.isfinite(norm := self._norm.read()):
            return
        raise RuntimeError(
            f"the gradient was {norm} in step {self.global_step} (epoch "
            f"{self.current_epoch}): the loss or the learning rate went out of bounds. The weights "
            "of this moment are not kept; the last checkpoint is sound. Go on from it with smaller "
            "rates or trainer.gradient_clip_val, in a new run (model.encoder.checkpoint)"
        )

    def on_train_batch_end(self, *args: Any) -> None:
        """Keep the temperature where CLIP keeps it."""
        if self.trainable.logit_scale:
            self.model.logit_scale.data.clamp_(0.0, LARGEST_SCALE)

    def on_train_epoch_end(self) -> None:
        """Log what the readers dropped."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, RegionDataModule):
            dropped = float(sum(data.drops.counts().values()))
            self.log("train/dropped_samples", dropped, sync_dist=True, reduce_fx="sum")

    def recipe(self) -> dict[str, Any]:
        """Return what a run has to have in common with the checkpoint that it goes on from."""
        loss = {"loss": type(self.loss).__name__, **vars(self.loss)}
        public = {k: v for k, v in loss.items() if not k.startswith("_") and k != "training"}
        entry = alpha_entry(self.model.visual)
        return {
            "model": self.model.name,
            "image_size": self.model.image_size,
            **({} if entry.is_first_layer else {"alpha_block": asdict(entry)}),
            "trainable": asdict(self.trainable),
            "optim": {**asdict(self.optim), "betas": list(self.optim.betas)},
            "loss": public,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in a checkpoint what it is of; write the model, so that a cut run leaves one."""
        self._check_finite()
        add_model(checkpoint, self.model, self.recipe())
        if self.output and self.trainer.is_global_zero:
            write_model(checkpoint, self.output)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another recipe."""
        check_recipe(checkpoint, self.recipe())
