"""A run's progress: one bar over its steps, another over a validation."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class RunProgress(ProgressBar):
    """Shows how many optimizer steps are done, how fast, and when the run will end.

    Lightning's own bars count the batches of an epoch, a number that shards do not tell beforehand,
    and they read the loss of every step, for which a GPU has to wait. This one reads it when it is
    logged anyway (`trainer.log_every_n_steps`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bars: dict[str, tqdm[Any]] = {}

    def disable(self) -> None:
        """Show nothing from now on: Lightning asks for it in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show what begins from now on."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bars."""
        tqdm.write(kwargs.get("sep", " ").join(str(a) for a in args))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step that the run goes on from."""
        self._open("train", trainer.estimated_stepping_batches, trainer.global_step, unit="step")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count; now and then, show the loss."""
        bar = self._bars["train"]
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a part
        if (batch_idx + 1) % interval == 0:
            self._show_figures(trainer)
        bar.update(trainer.global_step - bar.n)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the full bar."""
        self._close("train")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a bar that goes away by itself."""
        checks = trainer.sanity_checking
        batches = sum(trainer.num_sanity_val_batches if checks else trainer.num_val_batches)
        self._open("check" if checks else "validate", batches, 0, unit="batch", leave=False)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count."""
        self._bars["check" if trainer.sanity_checking else "validate"].update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take it away, and show the new figures beside the training."""
        self._close("check" if trainer.sanity_checking else "validate")
        self._show_figures(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal in order."""
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close what is open."""
        for name in reversed(list(self._bars)):  # the inner one first, or it would stay
            self._close(name)

    def _open(self, name: str, total: float, done: int, **options: Any) -> None:
        length = int(total) if math.isfinite(total) else None
        self._bars[name] = tqdm(
            desc=name,
            total=length,
            initial=done,
            disable=not self._enabled,
            dynamic_ncols=True,
            smoothing=0.05,  # a validation in between should not make the end seem far
            **options,
        )

    def _close(self, name: str) -> None:
        self._bars.pop(name).close()

    def _show_figures(self, trainer: L.Trainer) -> None:
        bar = self._bars.get("train")
        if bar is not None and not bar.disable:
            names = trainer.progress_bar_metrics.items()
            bar.set_postfix({name: f"{value:.3f}" for name, value in names}, refresh=False)
