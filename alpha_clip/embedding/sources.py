"""What can be embedded: shards, the pictures of a folder, the objects of an annotation file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpha_clip.drops import Drops
from alpha_clip.embedding.store import Row
from alpha_clip.evaluation.annotations import file_stamp, labelled, open_picture, pictures_in
from alpha_clip.evaluation.inputs import samples_of
from alpha_clip.evaluation.labelled import LabelledPicture, LabelledRegion
from alpha_clip.evaluation.proposals import Proposals, read_categories
from alpha_clip.reader import Shard, find_shards
from alpha_clip.regions import Box, RegionSample, SampleError, decode_jpeg

_PART = 1024  # pictures in a part


@dataclass(frozen=True)
class Opened:
    """A picture with what to embed of it.

    Attributes:
        picture: The picture; without regions, the whole of it. None, if it can't be used.
        rows: One for each region, or for the picture.
        dropped: Reason and detail of what can't be used.
    """

    picture: LabelledPicture | None = None
    rows: list[Row] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)


class Source(ABC):
    """Data in parts that can be read by themselves.

    Attributes:
        whole: Whether each picture is a row, not its regions.
    """

    whole = False

    @abstractmethod
    def parts(self) -> dict[str, int]:
        """Return the parts, `NNNNN-DIGEST`, in order, with the number of pictures in each."""

    @abstractmethod
    def entries(self, part: str, drops: Drops) -> Iterator[tuple[Any, int]]:
        """Yield the pictures of a part, not yet decoded, with their numbers of rows."""

    @abstractmethod
    def open(self, entry: Any) -> Opened:
        """Decode one of these; any thread may."""


def open_source(
    data: list[str] | None,
    images: str | None,
    annotations: str | None,
    texts: str | None,
    max_images: int | None,
) -> Source:
    """Return what is to be embedded; see `alpha_clip.embedding.embed`.

    Raises:
        ValueError: If that is nothing or two things, or can't be read.
    """
    if bool(data) == bool(images) or (annotations and not images) or (texts and not annotations):
        given = {"data": data, "images": images, "annotations": annotations, "texts": texts}
        got = ", ".join(key for key, value in given.items() if value) or "none of these"
        raise ValueError(
            "expected data (folders of shards), images (a folder of pictures), or images with "
            f"annotations (and texts for these), got {got}"
        )
    if data:
        return ShardSource(data, max_images)
    if images and annotations:
        return ObjectSource(images, annotations, texts, max_images)
    return FolderSource(images or "", max_images)


class ShardSource(Source):
    """The regions of region–text shards, each shard a part."""

    def __init__(self, data: list[str], max_images: int | None) -> None:
        if len({Path(folder).resolve() for folder in data}) < len(data):
            raise ValueError(f"data names a folder twice: {', '.join(data)}")
        self._parts: dict[str, tuple[str, Shard, int]] = {}
        wanted = math.inf if max_images is None else max_images
        for folder in data:
            prefix = f"{folder.rstrip('/')}/" if len(data) > 1 else ""
            for shard in find_shards([folder]):
                count = int(min(shard.samples, wanted))
                wanted -= count
                if count > 0:
                    about = [prefix, shard.file.name, shard.file.stat().st_size, count]
                    self._parts[_named(len(self._parts), about)] = prefix, shard, count

    def parts(self) -> dict[str, int]:
        """Return the shards."""
        return {part: count for part, (_, _, count) in self._parts.items()}

    def entries(self, part: str, drops: Drops) -> Iterator[tuple[tuple[str, RegionSample], int]]:
        """Yield the samples of a shard."""
        prefix, shard, count = self._parts[part]
        for sample in samples_of([shard], count, drops):
            yield (prefix, sample), len(sample.regions)

    def open(self, entry: tuple[str, RegionSample]) -> Opened:
        """Decode the picture of a sample."""
        prefix, sample = entry
        key = prefix + sample.key
        try:
            image = decode_jpeg(sample.jpeg).convert("RGB")
        except SampleError as error:
            return Opened(dropped=[(error.reason, f"{key}: {error.detail}")])
        regions = [LabelledRegion(0, r.rle, Box(*r.box)) for r in sample.regions]
        rows = [Row(f"{key}/{r.rid}", key, r.box, r.text) for r in sample.regions]
        return Opened(LabelledPicture(image, regions), rows)


class FolderSource(Source):
    """The pictures of a folder, at any depth; none that is hidden."""

    whole = True

    def __init__(self, images: str, max_images: int | None) -> None:
        self._root = Path(images)
        names = pictures_in(self._root)[:max_images]
        self._parts: dict[str, list[str]] = {}
        for first in range(0, len(names), _PART):
            some = names[first : first + _PART]
            about = [[name, *file_stamp(self._root / name)] for name in some]
            self._parts[_named(len(self._parts), about)] = some

    def parts(self) -> dict[str, int]:
        """Return stretches of the sorted list of pictures."""
        return {part: len(names) for part, names in self._parts.items()}

    def entries(self, part: str, drops: Drops) -> Iterator[tuple[str, int]]:
        """Yield the names of the pictures."""
        return ((name, 1) for name in self._parts[part])

    def open(self, entry: str) -> Opened:
        """Decode a picture."""
        try:
            image = open_picture(self._root / entry, None)
        except SampleError as error:
            return Opened(dropped=[(error.reason, error.detail)])
        name = _as_text(entry)
        box = (0.0, 0.0, float(image.width), float(image.height))
        return Opened(LabelledPicture(image, []), [Row(name, name, box, "")])


class ObjectSource(Source):
    """The objects of a COCO or LVIS file."""

    def __init__(
        self, images: str, annotations: str, texts: str | None, max_images: int | None
    ) -> None:
        self._root = Path(images)
        self._objects = _Objects(annotations, images, None, max_images)
        names = {c["id"]: c["name"] for c in read_categories(texts or annotations)}
        found = self._objects.regions
        ids = {str(region["id"]) for region in found if "id" in region}
        if len(ids) < len(found):
            raise ValueError(
                f"expected annotations with ids of their own, {annotations} has {len(found)} "
                f"objects with {len(ids)} different ids; number them"
            )
        self._texts = [str(names.get(region.get("category_id"), "")) for region in found]
        self._parts: dict[str, list[Any]] = {}
        entries = self._objects.entries
        for first in range(0, len(entries), _PART):
            some = entries[first : first + _PART]
            about = [[image, [(r, self._texts[n]) for n, r in found]] for image, found in some]
            self._parts[_named(len(self._parts), about)] = some

    def parts(self) -> dict[str, int]:
        """Return stretches of the file's pictures."""
        return {part: len(entries) for part, entries in self._parts.items()}

    def entries(self, part: str, drops: Drops) -> Iterator[tuple[Any, int]]:
        """Yield pictures with their objects."""
        return ((entry, len(entry[1])) for entry in self._parts[part])

    def open(self, entry: Any) -> Opened:
        """Decode a picture and rasterise its objects; one of them may be dropped alone."""
        try:
            file, size = self._objects.file_of(entry)
            image = open_picture(file, size)
            found = list(self._objects.regions_of(entry))
        except SampleError as error:
            return Opened(dropped=[(error.reason, error.detail)])
        name = _as_text(file.relative_to(self._root).as_posix())
        regions, rows, dropped = list[LabelledRegion](), list[Row](), list[tuple[str, str]]()
        for number, region, box in found:
            id = str(self._objects.regions[number]["id"])
            try:
                made = labelled(number, region, box, image)
            except (TypeError, ValueError) as error:
                dropped.append(("bad_rle", f"{file}: object {id}: {error}"))
                continue
            where = (float(made.box.x1), float(made.box.y1), float(made.box.x2), float(made.box.y2))
            regions.append(made)
            rows.append(Row(id, name, where, self._texts[number]))
        return Opened(LabelledPicture(image, regions), rows, dropped)


class _Objects(Proposals):
    """The objects of a file, picture by picture."""

    @property
    def entries(self) -> list[Any]:
        """Pictures, each with its regions and their numbers."""
        return self._entries


def _named(number: int, about: Any) -> str:
    """Return the name of a part: data that were edited are another one."""
    digest = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()
    return f"{number:05d}-{digest[:8]}"


def _as_text(name: str) -> str:
    """Return a file's name as UTF-8, whatever its encoding."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
