"""Pictures with regions that have a class: what region classification is measured on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from alpha_clip.drops import Drops
from alpha_clip.evaluation.inputs import samples_of
from alpha_clip.reader import Shard
from alpha_clip.regions import Box, RegionSample, SampleError, decode_jpeg


@dataclass(frozen=True)
class LabelledRegion:
    """A region of known class.

    Attributes:
        label: Number of its class.
        rle: Its mask as COCO RLE, of the picture's size.
        box: Its box.
    """

    label: int
    rle: Mapping[str, Any]
    box: Box


@dataclass(frozen=True)
class LabelledPicture:
    """A picture, RGB, with its regions."""

    image: Image.Image
    regions: list[LabelledRegion]


class LabelledRegions(ABC):
    """A data set of such pictures; it falls into parts that can be read by themselves."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The names of the classes, in order."""

    @abstractmethod
    def parts(self) -> dict[str, int]:
        """Return the parts, in order, with the number of pictures in each."""

    @abstractmethod
    def pictures(self, part: str, drops: Drops) -> Iterator[LabelledPicture]:
        """Yield the pictures of a part; what can't be used is counted."""


class ShardRegions(LabelledRegions):
    """The regions of region–text shards; a phrase is a class.

    Args:
        shards: The shards; each is a part.
        names: The classes; regions with other phrases are left out. Empty: all phrases that there
            are, which takes reading the shards once.
        max_images: Most pictures to read; `None` reads all.
    """

    def __init__(self, shards: list[Shard], names: list[str], max_images: int | None) -> None:
        self._names = names
        self._shards: dict[str, tuple[Shard, int]] = {}
        left = sum(shard.samples for shard in shards) if max_images is None else max_images
        for shard in shards:
            if left > 0:
                count = min(left, shard.samples)
                self._shards[f"{len(self._shards):05d}-{shard.file.stem}"] = (shard, count)
                left -= count

    @property
    def names(self) -> list[str]:
        """The names of the classes, in order."""
        if not self._names:
            read = (s for shard, count in self._shards.values() for s in samples_of([shard], count))
            self._names = sorted({region.text for sample in read for region in sample.regions})
        return self._names

    def parts(self) -> dict[str, int]:
        """Return the shards."""
        return {name: count for name, (_, count) in self._shards.items()}

    def pictures(self, part: str, drops: Drops) -> Iterator[LabelledPicture]:
        """Yield the pictures of a shard."""
        number = {name: i for i, name in enumerate(self.names)}
        for sample, image in self.decoded(part, drops):
            regions = [
                LabelledRegion(number[r.text], r.rle, Box(*r.box))
                for r in sample.regions
                if r.text in number
            ]
            yield LabelledPicture(image, regions)

    def decoded(self, part: str, drops: Drops) -> Iterator[tuple[RegionSample, Image.Image]]:
        """Yield the samples of a shard with their pictures, RGB."""
        shard, count = self._shards[part]
        for sample in samples_of([shard], count, drops):
            try:
                yield sample, decode_jpeg(sample.jpeg).convert("RGB")
            except SampleError as error:
                drops.add(error.reason, f"{sample.key}: {error.detail}")
