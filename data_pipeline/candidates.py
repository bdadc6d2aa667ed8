"""Candidates: masks of everything in a picture, each scored against the picture's class.

What the first stage of `alpha-clip-data imagenet` writes and the ranking reads: a parquet file a
shard, `NNNNN.candidates.parquet`, one row a candidate. The pictures stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from alpha_clip.regions import SampleError, decode_rle
from data_pipeline.shard_files import ShardFile

_ROWS = 4096  # written and read at a time


@dataclass(frozen=True)
class Candidate:
    """A mask of a picture, and how much it looks like the picture's class.

    Attributes:
        key: The picture: digits, unique in the data set.
        id: The picture's name in its source.
        image: Where the picture lies in the input shard: a file's or a tar member's name.
        wnid: The picture's class, as its source names it.
        name: The class in words.
        w: The picture's width in pixels, upright.
        h: Its height.
        rid: Number of the candidate in the picture.
        box_xyxy_px: Box around the mask.
        counts: The mask as compressed COCO RLE, of size `[h, w]`.
        area: The mask's pixels.
        sam_iou: The segmenter's estimate of the IoU with an object, or `None`.
        stability: Its stability score, or `None`.
        score: How much it is what the class names; by CLIP, a cosine.
    """

    key: str
    id: str
    image: str
    wnid: str
    name: str
    w: int
    h: int
    rid: int
    box_xyxy_px: tuple[float, float, float, float]
    counts: str
    area: int
    sam_iou: float | None
    stability: float | None
    score: float

    @property
    def rle(self) -> dict[str, Any]:
        """The mask as a COCO RLE."""
        return {"size": [self.h, self.w], "counts": self.counts}

    def check(self) -> None:
        """Refuse what can't be.

        Raises:
            SampleError: If a name is empty, a score no number, or mask, area and box are not of one
                another.
        """
        key = self.key if self.key.isascii() and self.key.isdigit() else "-1"
        if not 0 <= int(key) < 2**63:
            raise SampleError("bad_key", f"a key must be digits, below 2^63, got {self.key!r}")
        if not (self.wnid and self.name.strip() and self.image):
            raise SampleError("bad_record", f"candidate {self.rid} of {self.key} lacks a name")
        numbers = (self.score, self.sam_iou, self.stability, *self.box_xyxy_px)
        if not all(number is None or math.isfinite(number) for number in numbers):
            raise SampleError("bad_record", f"{self.key}: candidate {self.rid} has no finite score")
        x1, y1, x2, y2 = self.box_xyxy_px
        if not (0 <= x1 < x2 <= self.w and 0 <= y1 < y2 <= self.h):
            raise SampleError("bad_box", f"{self.key}: {self.box_xyxy_px} in {self.w} x {self.h}")
        try:
            area = int(decode_rle(self.rle).sum())
        except ValueError as error:
            raise SampleError("bad_rle", f"{self.key}: {error}") from error
        if area != self.area or area < 1:
            raise SampleError("bad_rle", f"{self.key}: a mask of {area} pixels, not {self.area}")


@dataclass(frozen=True)
class CandidateSample:
    """A picture's candidates.

    Attributes:
        key: The picture.
        regions: The candidates, in the order of their numbers.
    """

    key: str
    regions: tuple[Candidate, ...]


class CandidateFile(ShardFile[CandidateSample]):
    """Collects rows and writes them in groups; the bytes depend on the rows alone."""

    suffix: ClassVar[str] = ".candidates.parquet"

    def __init__(self, path: Path) -> None:
        from pyarrow.parquet import ParquetWriter

        super().__init__(path)
        self._writer = ParquetWriter(self.file, _schema(), compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def write(self, sample: CandidateSample, picture: bytes) -> None:
        """Add a picture's candidates, without the picture; see `ShardFile.write`."""
        for candidate in sample.regions:
            candidate.check()
        self._rows += map(asdict, sample.regions)
        if len(self._rows) >= _ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the end."""
        try:
            self._flush()
            self._writer.close()
        finally:
            super().close()

    @classmethod
    def read_back(cls, path: Path) -> tuple[int, int]:
        """Count pictures and candidates; see `ShardFile.read_back`."""
        pictures = candidates = 0
        last = None
        try:
            for batch in read_candidates(path):
                for candidate in as_candidates(batch):
                    pictures += candidate.key != last
                    candidates += 1
                    last = candidate.key
        except SampleError as error:
            raise OSError(f"{path} is damaged: {error}") from error
        return pictures, candidates

    def _flush(self) -> None:
        import pyarrow

        if self._rows:
            self._writer.write_table(pyarrow.Table.from_pylist(self._rows, _schema()))
        self._rows = []


def read_candidates(path: Path, columns: list[str] | None = None) -> Iterator[Any]:
    """Yield a file's rows, in order, as pyarrow's record batches.

    Args:
        path: The file.
        columns: Those to read; by default all.

    Raises:
        OSError: If it is damaged.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            if not table.schema_arrow.equals(_schema()):
                raise OSError(f"{path} has other columns than candidates have")
            yield from table.iter_batches(_ROWS, columns=columns)
    except (pyarrow.ArrowException, ValueError) as error:
        raise OSError(f"{path} is damaged: {error}") from error


def as_candidates(batch: Any) -> Iterator[Candidate]:
    """Turn a record batch of all columns into checked candidates.

    Raises:
        SampleError: If one is not sound.
    """
    for row in batch.to_pylist():
        candidate = Candidate(**{**row, "box_xyxy_px": tuple(row["box_xyxy_px"])})
        candidate.check()
        yield candidate


def _schema() -> Any:
    """Return pyarrow's schema; one column a field, in order."""
    import pyarrow as pa

    kinds = {
        **dict.fromkeys(("key", "id", "image", "counts"), pa.string()),
        **dict.fromkeys(("wnid", "name"), pa.dictionary(pa.int32(), pa.string())),
        **dict.fromkeys(("w", "h", "rid"), pa.int32()),
        "area": pa.int64(),
        "box_xyxy_px": pa.list_(pa.float64(), 4),
        **dict.fromkeys(("sam_iou", "stability", "score"), pa.float64()),
    }
    optional = ("sam_iou", "stability")
    return pa.schema(
        [pa.field(f.name, kinds[f.name], nullable=f.name in optional) for f in fields(Candidate)]
    )
