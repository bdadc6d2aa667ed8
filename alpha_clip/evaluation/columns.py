"""The rows that scoring a part gives, and the rows of all parts together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Columns: TypeAlias = dict[str, NDArray[Any]]
"""Name -> array with a row for each region, query or pair; numbers or text, never objects."""

PICTURE = "picture"  # column with the picture of each row, numbered within its part


def join(parts: Iterable[Columns], folder: Path | None = None) -> Columns:
    """Put the columns of parts one below the other; pictures are numbered on.

    Args:
        parts: The columns of each part; none, if nothing in it could be used.
        folder: Where there is room for columns of vectors, such as features: they are mapped from
            a file that is gone with them, and memory does not grow with the data. `None` holds
            them.
    """
    found: dict[str, list[NDArray[Any]]] = {}
    mapped: dict[str, _Mapped] = {}
    pictures = 0
    for columns in parts:
        if not columns:
            continue
        own = columns[PICTURE].astype(np.int64) + pictures
        pictures = int(own.max()) + 1
        for name, column in {**columns, PICTURE: own}.items():
            if folder is None or column.ndim == 1:
                found.setdefault(name, []).append(column)
            else:
                if name not in mapped:
                    mapped[name] = _Mapped(column, folder)
                mapped[name].add(column)
    held = {name: np.concatenate(columns) for name, columns in found.items()}
    return {**held, **{name: column.all() for name, column in mapped.items()}}


class _Mapped:
    """A column of vectors in a file without a name, to which parts are added."""

    def __init__(self, like: NDArray[Any], folder: Path) -> None:
        self._stream = TemporaryFile(dir=folder)
        self._rows = 0
        self._shape, self._dtype = like.shape[1:], like.dtype

    def add(self, column: NDArray[Any]) -> None:
        self._stream.write(np.ascontiguousarray(column).tobytes())
        self._rows += len(column)

    def all(self) -> NDArray[Any]:
        with self._stream as stream:
            stream.flush()
            return np.memmap(stream, self._dtype, "r", shape=(self._rows, *self._shape))
