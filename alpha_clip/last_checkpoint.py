"""The checkpoint to go on from: written on schedule, at the end, and when the machine is wanted."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

log = logging.getLogger(__name__)


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt` fresh; `ckpt_path: last` finds it.

    On SIGTERM, or the first Ctrl-C, it is written behind the running step, and the process ends
    with exit code 0: every process of the run, whichever of them was told. While validation runs,
    that waits for its end, so give a cluster's signal some minutes before it kills. It takes the
    place of Lightning's own handler, which saves nothing, and over several processes may wait for
    ever.

    Args:
        dirpath: Folder of the checkpoint.
        every_n_train_steps: Optimizer steps from one to the next.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int = 500) -> None:
        super().__init__(
            dirpath=dirpath, save_last=True, save_top_k=0, every_n_train_steps=every_n_train_steps
        )
        self._told = False
        self._before: dict[int, Any] = {}

    @property
    def state_key(self) -> str:
        """Name of its state in a checkpoint: whatever the interval, so that it may change."""
        return type(self).__name__

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals: not earlier, or Lightning's handler would come before this one.

        It broadcasts from within the handler, in the middle of whatever the processes exchange.
        """
        super().on_train_start(trainer, pl_module)
        self._told = False
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write it when its time has come; end the run if any process was told to."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        told = trainer.strategy.reduce_boolean_decision(self._told, all=False)
        # Between the batches of one optimizer step there is nothing to go on from.
        between = (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch
        if told and not between:
            self._write(trainer)
            if trainer.is_global_zero:
                where = trainer.global_step
                log.warning("stopped after step %d; the same command goes on from there", where)
            raise SIGTERMException(0)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the end of the run, and stop listening."""
        self._write(trainer)
        self._restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Stop listening."""
        super().on_exception(trainer, pl_module, exception)
        self._restore()

    def _write(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(os.path.join(str(self.dirpath), "last.ckpt"), weights_only=False)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._told and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._told = True
        log.warning("%s: the run ends after this step", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
