"""Pictures whose masks are there already, and only lack words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from alpha_clip.regions import SampleError
from data_pipeline.candidates import Candidate, as_candidates, read_candidates
from data_pipeline.ranking_record import Ranking, load_ranking
from data_pipeline.sources.base import BadShardError, Reject
from data_pipeline.sources.imagenet import ImageNetSource


@dataclass(frozen=True)
class MaskedRegion:
    """A mask of a picture.

    Attributes:
        rid: Its number, unique in the picture.
        name: What it shows, in words: a class name.
        box_xyxy_px: Box around it.
        rle: The mask as COCO RLE of the picture's size.
        area: Its pixels.
        score: How sure the source is of the name.
        sam_iou: The segmenter's estimate of its IoU.
        stability: The segmenter's stability score.
        caption: What is said of it, or `None` if that is still to be done.
    """

    rid: int
    name: str
    box_xyxy_px: tuple[float, float, float, float]
    rle: dict[str, Any]
    area: int
    score: float | None = None
    sam_iou: float | None = None
    stability: float | None = None
    caption: str | None = None


@dataclass(frozen=True)
class MaskedPicture:
    """A picture and its masks.

    Attributes:
        key: Digits, unique in the data set.
        id: The picture's name in its source.
        data: Its bytes as they came.
        name: What the whole picture shows, in words.
        regions: Its masks, at least one.
    """

    key: str
    id: str
    data: bytes
    name: str
    regions: tuple[MaskedRegion, ...]


class MaskedSource(Protocol):
    """Reads pictures with their masks."""

    @property
    def name(self) -> str:
        """What the samples say that they come from."""

    @property
    def max_image_px(self) -> int:
        """Larger pictures are rejected by their header, before memory is spent."""

    def settings(self) -> dict[str, Any]:
        """Return what decides the samples, for the config hash."""

    def read(self, shard: str, index: int) -> Iterator[MaskedPicture | Reject]:
        """Yield every picture of a shard, or why it can't be used.

        Args:
            shard: The shard.
            index: Its number.

        Raises:
            BadShardError: If it can't be read at all.
            StorageError: If the storage fails.
        """


@dataclass(frozen=True)
class KeptCandidates:
    """What a ranking kept of ImageNet's candidates.

    Attributes:
        source: Reads the pictures.
        candidates: Folder of the candidates.
        ranking: Folder of the ranking.
    """

    source: ImageNetSource
    candidates: Path
    ranking: Path

    name = ImageNetSource.name

    @property
    def max_image_px(self) -> int:
        """Larger pictures are rejected."""
        return self.source.max_image_px

    @cached_property
    def _found(self) -> Ranking:
        return load_ranking(self.ranking)

    def settings(self) -> dict[str, Any]:
        """Return what decides the samples: the ranking covers the candidates and their source."""
        return {"ranking": self._found.hash}

    def read(self, shard: str, index: int) -> Iterator[MaskedPicture | Reject]:
        """Yield the pictures with something kept; see `MaskedSource.read`."""
        if index not in self._found.shards:
            raise BadShardError(f"{shard} has no candidates; the masks' stage said why")
        kept = {rows[0].image: rows for rows in self._pictures(index)}
        for item in self.source.read(shard, kept) if kept else ():
            if isinstance(item, Reject):  # the first stage told of it
                continue
            rows = kept.pop(item.image, None)
            if rows is None or rows[0].key != item.key:
                raise BadShardError(
                    f"{shard} has changed since its candidates were made: {item.image} is another"
                )
            regions = tuple(_region(row) for row in rows)
            where = f"{item.wnid}/{item.image}"
            yield MaskedPicture(item.key, where, item.data, item.name, regions)
        for image, rows in kept.items():
            yield Reject(rows[0].key, None, "missing_image", f"{image} is gone", len(rows))

    def _pictures(self, index: int) -> Iterator[list[Candidate]]:
        """Yield the kept candidates of each picture."""
        wanted, _ = self._found.rows(index)
        rows = iter(wanted.tolist())
        following, start = next(rows, None), 0
        found: list[Candidate] = []
        file = self.candidates / f"{index:05d}.candidates.parquet"
        try:
            for batch in read_candidates(file) if following is not None else ():
                end, places = start + batch.num_rows, []
                while following is not None and following < end:
                    places.append(following - start)
                    following = next(rows, None)
                found += as_candidates(batch.take(places)) if places else ()
                start = end
        except SampleError as error:
            raise OSError(f"{file} is damaged: {error}") from error
        for _, group in groupby(found, key=lambda row: row.key):
            yield list(group)


def _region(row: Candidate) -> MaskedRegion:
    shared = {f.name for f in fields(MaskedRegion)} & {f.name for f in fields(Candidate)}
    return MaskedRegion(
        rle=row.rle, score=row.score, **{n: getattr(row, n) for n in shared - {"score"}}
    )
