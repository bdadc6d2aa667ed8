"""Scored parts on disk: what is done is never done again."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alpha_clip.drops import Drops
from alpha_clip.evaluation.base import Benchmark
from alpha_clip.evaluation.columns import Columns
from alpha_clip.model import AlphaClip

_DROPPED = ("dropped/reason", "dropped/detail")
_COLUMN = "column/"  # so that none has the name of an argument of savez


class ListedDrops(Drops):
    """Counts what can't be used, and lists it.

    Attributes:
        list: Reason and detail, one by one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.list: list[tuple[str, str]] = []

    def add(self, reason: str, detail: str, times: int = 1) -> None:
        """Count and list a drop."""
        super().add(reason, detail, times)
        self.list += times * [(reason, detail)]


class Journal:
    """A folder with a file for each part that is done, written whole or not at all.

    Args:
        folder: Where; it is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, part: str) -> bool:
        """Say whether a part is done."""
        return self._file(part).exists()

    def write(self, part: str, columns: Columns, dropped: list[tuple[str, str]]) -> None:
        """Keep a part."""
        listed = {name: np.array([d[i] for d in dropped], str) for i, name in enumerate(_DROPPED)}
        columns = {f"{_COLUMN}{name}": column for name, column in columns.items()}
        file = self._file(part)
        half = file.with_suffix(f".{os.getpid()}.tmp")
        with half.open("wb") as stream:
            np.savez(stream, **{**columns, **listed})  # type: ignore[arg-type]  # not allow_pickle
        half.replace(file)

    def read(self, part: str) -> tuple[Columns, list[tuple[str, str]]]:
        """Return a part and what was dropped of it.

        Raises:
            ValueError: If its file is damaged; it is then removed, so that the part is done again.
        """
        file = self._file(part)
        try:
            # Opened here: NumPy leaves a damaged file open.
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                found = {name: stored[name] for name in stored.files}
            reasons, details = (found.pop(name).tolist() for name in _DROPPED)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            file.unlink(missing_ok=True)
            raise ValueError(f"{file} is damaged and was removed; run again ({error})") from error
        columns = {name.removeprefix(_COLUMN): column for name, column in found.items()}
        return columns, list(zip(reasons, details, strict=True))

    def _file(self, part: str) -> Path:
        return self.folder / f"{part}.npz"


def fingerprint(benchmark: Benchmark, models: list[AlphaClip]) -> str:
    """Return eight characters that tell runs apart: of the benchmark's settings and the weights."""
    kind, names = type(benchmark).__name__, benchmark.classes()
    settings = {k: v for k, v in benchmark.settings.items() if k not in benchmark.unscored}
    about = [kind, settings, names, benchmark.parts(), *(model.name for model in models)]
    digest = hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode())
    for model in models:
        add_weights(digest, model)
    return digest.hexdigest()[:8]


def add_weights(digest: Any, model: AlphaClip) -> None:
    """Add a model's weights to a digest of hashlib's."""
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
