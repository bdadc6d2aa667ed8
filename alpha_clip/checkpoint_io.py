"""Training checkpoints on disk: whole or not at all, and nothing in them is unpickled."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from alpha_clip.training_checkpoint import load_training_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, to the disk, and then renames: a kill or a full disk keeps the old.

    Lightning's own goes through the temporary folder and memory twice the size; its rename is no
    rename where that folder is on another file system. URLs (`s3://`) are left to Lightning.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            OSError: If it can't be written; what was at `path` is still there.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.tmp")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except (OSError, RuntimeError) as error:  # torch's writer turns ENOSPC into its own
            part.unlink(missing_ok=True)
            raise OSError(
                f"the checkpoint {target} could not be written ({error}); the last one that was is "
                "sound: make room and start the same command again"
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; whatever `weights_only` says, nothing is unpickled.

        Raises:
            ValueError: If it is damaged, or holds more than tensors and plain values.
        """
        if "://" in str(path):
            loaded: dict[str, Any] = super().load_checkpoint(path, map_location, True)
            return loaded
        return load_training_checkpoint(path, map_location)
