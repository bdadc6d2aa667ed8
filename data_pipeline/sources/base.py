"""What a source yields: pictures with boxes and phrases, and what could not be used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from alpha_clip.regions import PhraseKind
from data_pipeline.images import StoredImage


@dataclass(frozen=True)
class BoxedPhrase:
    """A phrase and its box.

    Attributes:
        rid: Number in the source, unique in the image.
        text: The phrase.
        kind: Where it comes from.
        span: Its characters `[start, end)` in the caption, or `None`.
        box_xyxy_px: Its box, inside the image.
        score: The source's confidence.
    """

    rid: int
    text: str
    kind: PhraseKind
    span: tuple[int, int] | None
    box_xyxy_px: tuple[float, float, float, float]
    score: float | None


@dataclass(frozen=True)
class Reject:
    """Something that could not be used, and why.

    Attributes:
        key: The sample.
        rid: The region, or `None` if the whole sample is lost.
        reason: A short, stable name to count by.
        detail: What exactly was wrong.
        regions: Regions lost with a whole sample.
    """

    key: str
    rid: int | None
    reason: str
    detail: str = ""
    regions: int = 0


@dataclass(frozen=True)
class SourceSample:
    """A picture with boxed phrases, and the regions of it that could not be used."""

    key: str
    id: str
    caption: str
    image: StoredImage
    phrases: tuple[BoxedPhrase, ...]
    rejects: tuple[Reject, ...] = field(default=())


class BadShardError(Exception):
    """An input shard that can't be read at all."""


class Source(ABC):
    """Reads input shards.

    Subclasses are frozen dataclasses; their fields are the settings that the config hash covers.
    """

    name: str

    @abstractmethod
    def read(self, shard: Path) -> Iterator[SourceSample | Reject]:
        """Yield every sample of an input shard, or why it can't be used.

        Raises:
            BadShardError: If the shard can't be read at all.
        """
