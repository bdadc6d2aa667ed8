"""GRIT's own parquet files, with the pictures in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from alpha_clip.regions import IMAGE_EXTENSIONS, SampleError
from data_pipeline.sources.base import BadShardError, Reject, SourceSample, StorageError
from data_pipeline.sources.grit_records import ORIGINAL_SIZE, GritRecords, as_text
from data_pipeline.sources.storage import MAX_FILE_BYTES, open_input

_ROWS = 256  # decoded at a time
_BUFFER = 1 << 21  # bytes of a column read at a time; by default a whole row group is, of 1 GB, say
_FIELD = re.compile(r"\{(.*?)\}")
_PART = re.compile(r"(.+)#(\d{9,})")
_NAME = re.compile(r"(?!\.)[\w .,=@+-]+")  # of a file: no "..", nothing that a URL is made of


@dataclass(frozen=True)
class GritParquetSource(GritRecords):
    """Reads GRIT's parquet files. See `GritRecords` for the other settings.

    A file of more than `rows_per_shard` rows, as GRIT's own are, makes several shards.

    img2dataset's `--output_format files` writes `NNNNN.parquet` beside a folder `NNNNN` of
    pictures: `images: '/data/grit/{shard}/{key}'`, `key: key`.

    Attributes:
        images: Where a row's picture is: a path or URL in which `{shard}` stands for the parquet
            file's name and `{column}` for a column of the row. Without an extension, jpg, jpeg,
            png and webp are tried in turn.
        key: Column of the key: digits, unique in the data set.
        rows_per_shard: Rows that make a shard.
    """

    images: str = "images/{id}"
    key: str = "id"
    rows_per_shard: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._fields():
            raise ValueError(
                "images must name a column in braces, so that each row has a picture of its own, "
                f"such as '/data/images/{{id}}', got {self.images!r}"
            )
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {self.rows_per_shard}")

    def shards(self, inputs: list[str]) -> list[str]:
        """Return a name for each `rows_per_shard` rows: `PATH#FIRST`, or `PATH` of a small file.

        Raises:
            ValueError: If a file's storage fails. (One that is no parquet is reported when it is
                read.)
        """
        names = []
        for path in inputs:
            try:
                with open_input(path) as file, _table(path, file) as table:
                    starts = range(0, table.metadata.num_rows, self.rows_per_shard)
            except BadShardError:
                starts = range(1)
            except StorageError as error:
                raise ValueError(str(error)) from error
            several = len(starts) > 1
            names += [f"{path}#{start:09d}" for start in starts] if several else [path]
        return names

    def read(self, shard: str) -> Iterator[SourceSample | Reject]:
        """Yield every row of a shard; see `Source.read`."""
        seen: set[str] = set()
        part = _PART.fullmatch(shard)
        path, first = (part[1], int(part[2])) if part else (shard, 0)
        last = first + self.rows_per_shard if part else None
        stem = path.rsplit("/", 1)[-1].removesuffix(".parquet")
        for row in self._rows(path, first, last):
            if isinstance(row, Reject):
                yield row
                continue
            key = as_text(row[self.key])
            try:
                lists = {name: _list(name, row.get(name)) for name in self.lists}
            except SampleError as error:
                yield Reject(key, None, error.reason, error.detail)
                continue
            yield self.build(key, {**row, **lists}, partial(self._image, row, stem), seen)

    def _rows(self, path: str, first: int, last: int | None) -> Iterator[dict[str, Any] | Reject]:
        with open_input(path) as file, _table(path, file) as table:
            columns = self._columns(path, table.schema_arrow.names)
            sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            ends = list(accumulate(sizes))
            last = table.metadata.num_rows if last is None else last
            groups = [i for i, end in enumerate(ends) if end > first and end - sizes[i] < last]
            at = ends[groups[0]] - sizes[groups[0]] if groups else 0
            for batch in table.iter_batches(_ROWS, row_groups=groups, columns=columns):
                begin, end = max(first - at, 0), min(last - at, batch.num_rows)
                yield from (_row(batch.slice(i, 1)) for i in range(begin, end))
                at += batch.num_rows
                if at >= last:
                    return

    def _columns(self, shard: str, names: list[str]) -> list[str]:
        needed = {self.key, "caption", *self.lists, *self._fields()}
        if missing := needed - set(names):
            raise BadShardError(
                f"{shard} lacks the columns {sorted(missing)}; it has {sorted(names)}"
            )
        return [name for name in names if name in needed | {"id", *ORIGINAL_SIZE}]

    def _fields(self) -> set[str]:
        return set(_FIELD.findall(self.images)) - {"shard"}

    def _image(self, row: dict[str, Any], stem: str) -> bytes:
        values = {name: as_text(row[name]) for name in self._fields()}
        for name, value in values.items():
            if row[name] is None or not all(map(_NAME.fullmatch, value.split("/"))):
                raise SampleError("bad_path", f"{name} is no path in a folder: {value[:200]!r}")
        path = _FIELD.sub(lambda field: {**values, "shard": stem}[field[1]], self.images)
        whole = path.rsplit(".", 1)[-1].lower() in IMAGE_EXTENSIONS
        candidates = [path] if whole else [f"{path}.{e}" for e in IMAGE_EXTENSIONS]
        for candidate in candidates:
            try:
                with open_input(candidate) as file:
                    return file.read(MAX_FILE_BYTES)
            except BadShardError:  # no such file
                continue
        raise SampleError("missing_image", f"there is no {' or '.join(candidates)}")


@contextmanager
def _table(path: str, file: Any) -> Iterator[Any]:
    """Open a parquet file; whatever is damaged in it comes as `BadShardError`."""
    from pyarrow.parquet import ParquetFile

    try:
        yield ParquetFile(
            file,
            buffer_size=_BUFFER,
            pre_buffer=False,
            page_checksum_verification=True,  # of files that have any
        )
    except (BadShardError, StorageError):
        raise
    except Exception as error:  # pyarrow has no one exception for what is damaged
        raise BadShardError(f"{path} is no readable parquet file: {error}") from error


def _row(batch: Any) -> dict[str, Any] | Reject:
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Reject("", None, "bad_text", f"text that is not UTF-8: {error}")
    return row


def _list(name: str, value: Any) -> Any:
    """Return a list column's value; some tools write it as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", f"{name}: {error}") from error
