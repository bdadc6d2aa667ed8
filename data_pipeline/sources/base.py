"""What a source yields: pictures with boxes and phrases, and what could not be used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from alpha_clip.regions import PhraseKind


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
    """A picture with boxed phrases, and the regions of it that could not be used.

    Attributes:
        key: Digits, unique in the data set.
        id: The sample's name in its source.
        caption: The caption of the whole image.
        image: The picture's bytes as they came; only the header has been looked at.
        width: Width in pixels, upright.
        height: Height in pixels, upright.
        phrases: What to make masks for.
        rejects: Regions that could not be used.
    """

    key: str
    id: str
    caption: str
    image: bytes
    width: int
    height: int
    phrases: tuple[BoxedPhrase, ...]
    rejects: tuple[Reject, ...] = field(default=())


class BadShardError(Exception):
    """An input shard that can't be read at all; trying again would not help."""


class StorageError(Exception):
    """The storage failed while a shard was read; trying again may help."""


class Source(ABC):
    """Reads input shards.

    Subclasses are frozen dataclasses; their fields are the settings that the config hash covers.

    Attributes:
        name: What the samples say that they come from.
        max_image_px: Larger pictures are rejected by their header, before memory is spent.
        tars: Whether the pictures lie in tars, which masks can be kept beside (a sidecar).
    """

    name: ClassVar[str]
    tars: ClassVar[bool] = False
    max_image_px: int

    def shards(self, inputs: list[str]) -> list[str]:
        """Return the names of the shards that inputs hold; by default each is one.

        Args:
            inputs: Paths or URLs.

        Raises:
            ValueError: If an input can't be looked at.
        """
        return inputs

    @abstractmethod
    def read(self, shard: str) -> Iterator[SourceSample | Reject]:
        """Yield every sample of an input shard, or why it can't be used.

        Args:
            shard: A name that `shards` gave: a path, or a URL that fsspec knows.

        Raises:
            BadShardError: If the shard can't be read at all.
            StorageError: If the storage fails.
        """

    def settings(self) -> dict[str, Any]:
        """Return what decides the samples, for the config hash: every field."""
        shown: Any = self
        return {f.name: getattr(self, f.name) for f in fields(shown)}
