"""Embeddings on disk: parts that are whole or not there, and a record that is written last.

A folder holds `part-NNNNN-DIGEST.parquet` (or `.npy` with features beside `.jsonl` with rows), the
digest that of the data in it, and in the end `embeddings.json`. The hidden `.parts` says which
parts are done and how they are made, so that a run that was stopped can go on.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpha_clip.evaluation.journal import Journal

RECORD = "embeddings.json"
_PARTS = ".parts"
_SETTINGS = "settings.json"
_IDS = "ids"
Format: TypeAlias = Literal["parquet", "npy"]
Dtype: TypeAlias = Literal["float32", "float16"]


class Row(NamedTuple):
    """What an embedding is of.

    Attributes:
        id: Unique in the folder.
        image: Key or file of the picture.
        box: `x1, y1, x2, y2` in px.
        text: What the data say about it; may be empty.
    """

    id: str
    image: str
    box: tuple[float, float, float, float]
    text: str


class EmbeddingStore:
    """A folder of embeddings that is being written.

    Args:
        folder: Where; it is made.
        settings: All that the embeddings depend on, with `format`, `dtype`, `dim`, `model` and
            `fingerprint`.

    Raises:
        ValueError: If the folder holds embeddings of other settings, or something else.
        ModuleNotFoundError: If pyarrow is missing, which parquet needs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        if settings["format"] == "parquet":
            import pyarrow  # noqa: F401 - better missing now than after the first part
        self.folder, self.settings = folder, settings
        held = folder / _PARTS / _SETTINGS
        if held.is_file():
            _check_settings(folder, json.loads(held.read_text(encoding="utf-8")), settings)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is there and holds no embeddings; give an empty folder")
        self.journal = Journal(folder / _PARTS)
        if not held.is_file():
            _write_json(held, settings)

    def check_parts(self, names: list[str]) -> None:
        """Refuse parts of other data.

        Raises:
            ValueError: If there are some.
        """
        known = {file.name for name in names for file in self._files(name)}
        other = sorted(f.name for f in self.folder.glob("part-*") if f.name not in known)
        if other:
            raise ValueError(
                f"{self.folder} holds embeddings of other data, such as {other[0]}; the pictures, "
                "annotations or max_images changed: give another folder, or delete this one"
            )

    def reopen(self) -> None:
        """Take the record away: a part is missing."""
        (self.folder / RECORD).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Say whether a part is done."""
        return self.journal.has(name) and all(file.is_file() for file in self._files(name))

    def write(
        self,
        name: str,
        features: NDArray[np.float32],
        rows: list[Row],
        dropped: list[tuple[str, str]],
    ) -> None:
        """Keep a part; `features` are `[rows, dim]`.

        Raises:
            ValueError: If two rows have one id.
        """
        twice = [id for id, times in Counter(row.id for row in rows).items() if times > 1]
        if twice:
            raise ValueError(f"two rows have the id {twice[0]!r}; {_TWICE}")
        features = features.reshape(len(rows), self.settings["dim"])
        features = features.astype(self.settings["dtype"])
        *_, last = files = self._files(name)
        if self.settings["format"] == "parquet":
            _write_whole(last, lambda stream: self._write_parquet(stream, features, rows))
        else:
            lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows]
            _write_whole(files[0], lambda stream: stream.write("".join(lines).encode()))
            _write_whole(last, lambda stream: np.save(stream, features))
        hashes = np.array([_hash(row.id) for row in rows], np.uint64)
        self.journal.write(name, {_IDS: hashes}, dropped)

    def finish(self, names: list[str]) -> dict[str, Any]:
        """Write the record over all parts, which are done.

        Returns:
            What it says.

        Raises:
            ValueError: If two rows have one id, or there is no row.
        """
        parts: list[dict[str, Any]] = []
        hashes: list[NDArray[np.uint64]] = []
        reasons: Counter[str] = Counter()
        for name in names:
            columns, dropped = self.journal.read(name)
            hashes.append(columns[_IDS])
            reasons.update(reason for reason, _ in dropped)
            parts.append({"file": self._files(name)[-1].name, "rows": len(columns[_IDS])})
        self._check_ids(names, np.concatenate(hashes or [np.empty(0, np.uint64)]))
        rows = sum(part["rows"] for part in parts)
        if not rows:
            raise ValueError("no picture or region could be embedded; are these the right folders?")
        for left in self.folder.glob(".part-*.tmp"):  # of runs that were killed
            left.unlink(missing_ok=True)
        record = {**self.settings, "rows": rows, "dropped": dict(reasons), "parts": parts}
        _write_json(self.folder / RECORD, record)
        return record

    def _check_ids(self, names: list[str], hashes: NDArray[np.uint64]) -> None:
        hashes = np.sort(hashes)
        alike = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if alike:  # ids, or by bad luck their hashes alone
            ids = (row["id"] for n in names for row in _read(self._files(n)[-1])[1])
            found = Counter(id for id in ids if _hash(id) in alike)
            twice = [id for id, times in found.items() if times > 1]
            if twice:
                raise ValueError(f"two rows of {self.folder} have the id {twice[0]!r}; {_TWICE}")

    def _files(self, name: str) -> list[Path]:
        endings = [".parquet"] if self.settings["format"] == "parquet" else [".jsonl", ".npy"]
        return [self.folder / f"part-{name}{ending}" for ending in endings]

    def _write_parquet(self, stream: Any, features: NDArray[Any], rows: list[Row]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        vectors = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
        columns = {
            "id": pa.array([row.id for row in rows], pa.string()),
            "image": pa.array([row.image for row in rows], pa.string()),
            # Not of fixed size, which databases take for a column of vectors.
            "box": pa.array([list(row.box) for row in rows], pa.list_(pa.float64())),
            "text": pa.array([row.text for row in rows], pa.string()),
            "embedding": vectors,
        }
        about = {f"alpha_clip.{key}": str(self.settings[key]) for key in ("model", "fingerprint")}
        table = pa.table(columns).replace_schema_metadata(about)
        pq.write_table(table, stream, use_dictionary=["image", "text"])


_TWICE = "ids of regions are KEY/RID, annotation ids or paths: embed one data set at a time"


def load_embeddings(folder: str | Path) -> tuple[NDArray[Any], list[dict[str, Any]]]:
    """Read what `alpha-clip embed` wrote.

    Args:
        folder: The folder.

    Returns:
        Features `[rows, dim]` of length 1 (mapped from disk if they are one `.npy`), and for each
        row its `id`, `image`, `box` (`x1, y1, x2, y2` in px) and `text`.

    Raises:
        ValueError: If the folder is not finished, or a part is missing or not as it was written.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        parts = [(folder / part["file"], int(part["rows"])) for part in record["parts"]]
        shape, dtype = (int(record["rows"]), int(record["dim"])), np.dtype(record["dtype"])
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has no {RECORD}, which is written last; run the same `alpha-clip embed` "
            "again, it goes on where it was"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / RECORD} is no record of embeddings: {error}") from error
    features: NDArray[Any] = np.empty(shape if len(parts) > 1 else (0, 0), dtype)
    rows: list[dict[str, Any]] = []
    for file, count in parts:
        try:
            found, about = _read(file)
        except (OSError, ValueError, EOFError) as error:  # pyarrow's are among them
            raise ValueError(
                f"{file} is missing or damaged; delete it and run again: {error}"
            ) from error
        if found.shape != (count, shape[1]) or found.dtype != dtype or len(about) != count:
            raise ValueError(
                f"{file} holds {found.shape} {found.dtype} and {len(about)} rows, but {RECORD} "
                f"says {(count, shape[1])} {dtype}; delete the file and run again"
            )
        if len(parts) == 1:
            features = found
        else:
            features[len(rows) : len(rows) + count] = found
        rows += about
    return features, rows


def _read(file: Path) -> tuple[NDArray[Any], list[dict[str, Any]]]:
    """Return features and rows of a part."""
    if file.suffix == ".npy":
        lines = file.with_suffix(".jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return np.load(file, mmap_mode="r", allow_pickle=False), [json.loads(s) for s in lines]
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as opened:
        table = opened.read()
    column = table.column("embedding").combine_chunks()
    size: int = column.type.list_size
    values: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
    return values, table.drop_columns(["embedding"]).to_pylist()


def _check_settings(folder: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a folder of other embeddings; versions of libraries may differ."""
    keys = [key for key in wanted if key not in ("fingerprint", "versions")]
    other = [f"{key} {held.get(key)!r}, not {wanted[key]!r}" for key in keys
             if held.get(key) != wanted[key]]  # fmt: skip
    if other:
        raise ValueError(
            f"{folder} holds embeddings with {'; '.join(other)}: give another folder, or delete "
            "this one"
        )


def _hash(id: str) -> int:
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "little")


def _write_json(file: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    _write_whole(file, lambda stream: stream.write(text.encode()))


def _write_whole(file: Path, write: Callable[[Any], object]) -> None:
    """Write a file beside its place, to the disk, and then rename it."""
    half = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with half.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        half.replace(file)
    except BaseException:
        half.unlink(missing_ok=True)
        raise
