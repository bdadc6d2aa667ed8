"""The paper's own masks and captions of ImageNet-21k: Zery/MaskImageNet on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from alpha_clip.regions import SampleError, upright_size
from data_pipeline.segmenters.fingerprint import fingerprint
from data_pipeline.sources.base import BadShardError, Reject, StorageError
from data_pipeline.sources.imagenet import ImageNetSource, picture_key
from data_pipeline.sources.json_list import scan_list
from data_pipeline.sources.mask_imagenet_records import picture_of, region_of
from data_pipeline.sources.masked import MaskedPicture, MaskedRegion
from data_pipeline.sources.storage import MAX_FILE_BYTES

_PART = re.compile(r"(.+)#(\d{9,})")
_UNKNOWN = ""  # the picture of records that name none; sorts before all others


@dataclass(frozen=True)
class MaskImageNetSource:
    """Reads pictures of ImageNet-21k with the masks and captions that the paper published.

    The annotations, about 1 GB, are never in memory: each process goes through them once and keeps
    where the records of each picture lie.

    Attributes:
        annotations: The file, `M_ImageNet_top_460k.json`: one JSON list of records.
        images: Folder of ImageNet-21k's pictures, `n01440764/n01440764_10026.JPEG`. Of the paths
            in the records only these two last parts count.
        class_names: As of `ImageNetSource`.
        pictures_per_shard: Pictures that make a shard, in the order of their classes and names.
        max_image_px: Larger pictures are rejected by their header, before memory is spent.
    """

    annotations: str
    images: str
    class_names: str | None = None
    pictures_per_shard: int = 10_000
    max_image_px: int = 50_000_000

    name = "mask_imagenet"

    def __post_init__(self) -> None:
        if self.pictures_per_shard < 1:
            raise ValueError(
                f"pictures_per_shard must be at least 1, got {self.pictures_per_shard}"
            )

    def shards(self) -> list[str]:
        """Return a name for each `pictures_per_shard` pictures: `ANNOTATIONS#FIRST`.

        Raises:
            ValueError: If the annotations are no JSON list with records in it, or there is no
                folder of pictures.
        """
        folder = Path(self.images).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"images must be the folder of ImageNet-21k, with n01440764 and others in it; "
                f"{folder} is none"
            )
        try:
            count = len(_places(self.annotations))
        except OSError as error:
            raise ValueError(
                f"{self.annotations} can't be read ({error}); expected MaskImageNet's "
                "M_ImageNet_top_460k.json on this machine"
            ) from error
        return [f"{self.annotations}#{at:09d}" for at in range(0, count, self.pictures_per_shard)]

    def settings(self) -> dict[str, Any]:
        """Return what decides the samples; files count by content, wherever they lie."""
        return {
            **self._classes.settings(),
            "annotations": fingerprint(str(Path(self.annotations).expanduser())),
            "pictures_per_shard": self.pictures_per_shard,
        }

    def read(self, shard: str, index: int) -> Iterator[MaskedPicture | Reject]:
        """Yield the pictures of a shard; see `MaskedSource.read`.

        A picture whose records are all bad is rejected itself, too (`no_regions`). Records that
        name no picture are rejected in the first shard.
        """
        part = _PART.fullmatch(shard)
        if part is None:
            raise BadShardError(f"{shard} is no shard of MaskImageNet; expected ANNOTATIONS#FIRST")
        path, first = part[1], int(part[2])
        seen: set[str] = set()
        with _explained(path):
            places, file = _places(path), Path(path).expanduser().open("rb")
        with file:
            for number in range(first, min(first + self.pictures_per_shard, len(places))):
                with _explained(path):
                    records = list(places.records(number, file))
                yield from self._picture(records, seen)

    def _picture(self, records: list[Any], seen: set[str]) -> Iterator[MaskedPicture | Reject]:
        """Yield a picture with its sound records, after the others' rejects."""
        where = _UNKNOWN
        for record in records:
            try:
                where = picture_of(record)
            except SampleError as error:
                yield Reject("", None, error.reason, error.detail, 1)
        if where == _UNKNOWN:
            return
        wnid, file = where.split("/")
        key = picture_key(wnid, file.rsplit(".", 1)[0])
        try:
            name, data = self._named(wnid), self._load(where)
            size = upright_size(data, self.max_image_px)
            if key in seen:
                raise SampleError("duplicate_key", f"{where} has the number of another picture")
            seen.add(key)
        except SampleError as error:
            yield Reject(key, None, error.reason, error.detail, len(records))
            return
        regions: list[MaskedRegion] = []
        for rid, record in enumerate(records):
            try:
                regions.append(region_of(record, rid, name, size))
            except SampleError as error:
                yield Reject(key, rid, error.reason, error.detail)
        if regions:
            yield MaskedPicture(key, where, data, name, tuple(regions))
        else:
            yield Reject(key, None, "no_regions", f"no record of {where} is left")

    def _named(self, wnid: str) -> str:
        try:
            return self._classes.class_name(wnid)
        except BadShardError as error:
            raise SampleError("no_class_name", str(error)) from error

    def _load(self, where: str) -> bytes:
        path = Path(self.images).expanduser() / where
        try:
            with path.open("rb") as file:
                return file.read(MAX_FILE_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SampleError("missing_image", f"there is no {path}") from error
        except OSError as error:
            raise SampleError("unreadable_file", f"{path}: {error}") from error

    @cached_property
    def _classes(self) -> ImageNetSource:
        return ImageNetSource(self.class_names, self.max_image_px)


@dataclass(frozen=True)
class _Places:
    """Where each picture's records lie in the annotations; pictures are in order.

    Attributes:
        starts: First byte of each record, those of a picture together and in the file's order.
        sizes: Its bytes.
        ends: For each picture, the number of the record behind its last.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def records(self, number: int, file: BinaryIO) -> Iterator[Any]:
        """Yield a picture's records; bytes that are no UTF-8 come as lone surrogates."""
        first = int(self.ends[number - 1]) if number else 0
        for i in range(first, int(self.ends[number])):
            file.seek(int(self.starts[i]))
            data = file.read(int(self.sizes[i]))
            yield json.loads(data.decode("utf-8", "surrogateescape"))


def _places(path: str) -> _Places:
    """Return where the records lie, as the file is now."""
    file = Path(path).expanduser()
    found = file.stat()
    return _find_places(file, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=2)  # of the process, not of the source: that is pickled for each worker
def _find_places(path: Path, size: int, changed_ns: int) -> _Places:
    """Go through the file once; a size and a time of change stand for what it holds."""
    starts, sizes, pictures = array("q"), array("q"), array("q")
    numbers: dict[str, int] = {}
    for start, end, record in scan_list(path):
        starts.append(start)
        sizes.append(end - start)
        pictures.append(numbers.setdefault(_picture_or_unknown(record), len(numbers)))
    if not numbers.keys() - {_UNKNOWN}:
        raise ValueError(
            f"{path} has no record of a picture; expected a JSON list such as MaskImageNet's, "
            "[[.., .., path, mask, box, .., caption], ...]"
        )
    ranks = np.empty(len(numbers), np.int64)
    ranks[[numbers[picture] for picture in sorted(numbers)]] = np.arange(len(numbers))
    ranked = ranks[np.asarray(pictures)]
    order = np.argsort(ranked, kind="stable")
    ends = np.cumsum(np.bincount(ranked))
    return _Places(np.asarray(starts)[order], np.asarray(sizes)[order], ends)


def _picture_or_unknown(record: Any) -> str:
    try:
        return picture_of(record)
    except SampleError:
        return _UNKNOWN


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Tell annotations that are no list, or gone, from storage that fails."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadShardError(f"No such file: {path}") from error
    except OSError as error:
        raise StorageError(f"reading {path} failed: {error}") from error
    except ValueError as error:
        raise BadShardError(str(error)) from error
