"""The file that holds a shard's samples: a tar with the pictures, or a sidecar beside theirs."""

from __future__ import annotations

import hashlib
import io
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import IO, ClassVar, Generic, Literal, Protocol, TypeVar

from alpha_clip.regions import (
    IMAGE_EXTENSIONS,
    RegionSample,
    SampleError,
    join_sidecar,
    pack_entry,
    pack_sample,
    parse_entry,
    parse_sample,
)
from data_pipeline.locks import hold
from data_pipeline.sources.base import BadShardError, StorageError
from data_pipeline.sources.tars import read_groups

Layout = Literal["tar", "sidecar"]


class HasRegions(Protocol):
    """A sample of whatever kind."""

    @property
    def regions(self) -> Sized:
        """Its regions."""


SampleT = TypeVar("SampleT", bound=HasRegions)
_BLOCK = 1 << 20


class ShardFile(ABC, Generic[SampleT]):
    """A file that is being written.

    Args:
        path: Where.

    Attributes:
        suffix: What its name ends in.
        pictures: Whether it holds the pictures, too.
    """

    suffix: ClassVar[str]
    pictures: ClassVar[bool] = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] = path.open("wb")
        hold(self.file)

    @abstractmethod
    def write(self, sample: SampleT, picture: bytes) -> None:
        """Add a sample.

        Args:
            sample: The sample.
            picture: Its picture's bytes as they lie in the input, if those are not what it stores.

        Raises:
            SampleError: If the sample is not sound; the file stays as it was.
        """

    def close(self) -> None:
        """Write what is left to write."""
        self.file.close()

    @classmethod
    @abstractmethod
    def read_back(cls, path: Path) -> tuple[int, int]:
        """Read a finished file strictly; return its number of samples and of regions.

        Raises:
            OSError: If anything in it is not as it should be.
        """


class TarShardFile(ShardFile[RegionSample]):
    """`KEY.jpg`, `KEY.json` in turn, in a USTAR archive whose bytes depend on nothing else."""

    suffix: ClassVar[str] = ".tar"
    pictures: ClassVar[bool] = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)

    def write(self, sample: RegionSample, picture: bytes) -> None:
        """Add the stored picture and the record; see `ShardFile.write`."""
        jpeg, text = pack_sample(sample)
        for suffix, data in (("jpg", jpeg), ("json", text)):
            member = tarfile.TarInfo(f"{sample.key}.{suffix}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self._tar.members = []  # type: ignore[attr-defined]  # it would remember every member

    def close(self) -> None:
        """Write the end mark."""
        try:
            self._tar.close()
        finally:
            super().close()

    @classmethod
    def read_back(cls, path: Path) -> tuple[int, int]:
        """Count; see `ShardFile.read_back`."""
        return _count(read_shard(path))


class SidecarShardFile(ShardFile[RegionSample]):
    """A line of JSON a sample; the pictures stay in the input."""

    suffix: ClassVar[str] = ".regions.jsonl"

    def write(self, sample: RegionSample, picture: bytes) -> None:
        """Add a line; see `ShardFile.write`."""
        self.file.write(pack_entry(sample, picture or sample.jpeg))

    @classmethod
    def read_back(cls, path: Path) -> tuple[int, int]:
        """Count; see `ShardFile.read_back`."""
        return _count(read_sidecar(path))


SHARD_FILES: dict[Layout, type[ShardFile[RegionSample]]] = {
    "tar": TarShardFile,
    "sidecar": SidecarShardFile,
}


def read_shard(path: Path) -> Iterator[RegionSample]:
    """Yield the samples of a tar, refusing whatever is not exactly as it should be.

    Raises:
        OSError: If a member is damaged, missing or out of place.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = iter(tar)
            for jpg in members:
                text = next(members, None)
                key = jpg.name.removesuffix(".jpg")
                if text is None or (jpg.name, text.name) != (f"{key}.jpg", f"{key}.json"):
                    raise OSError(f"{path}: expected KEY.jpg and KEY.json in turn, got {jpg.name}")
                image, record = tar.extractfile(jpg), tar.extractfile(text)
                if image is None or record is None:
                    raise OSError(f"{path}: {key} is not a plain file")
                yield parse_sample(key, image.read(), record.read())
    except (tarfile.TarError, SampleError) as error:
        raise OSError(f"{path} is damaged: {error}") from error


def read_sidecar(path: Path) -> Iterator[RegionSample]:
    """Yield the samples of a sidecar, without their pictures.

    Raises:
        OSError: If a line is not exactly as it should be.
    """
    try:
        with path.open("rb") as lines:
            for line in lines:
                yield parse_entry(line).sample
    except SampleError as error:
        raise OSError(f"{path} is damaged: {error}") from error


def read_sidecar_with_pictures(path: Path, tar: str) -> Iterator[RegionSample]:
    """Yield the samples of a sidecar with their pictures.

    Args:
        path: The sidecar.
        tar: Path or URL of the input.

    Raises:
        OSError: If a line is damaged, or its picture is missing, damaged or another.
    """
    pictures = (
        (group.key, group.members[extension])
        for group in read_groups(tar)
        for extension in IMAGE_EXTENSIONS
        if extension in group.members
    )
    try:
        with path.open("rb") as lines:
            for sample in join_sidecar(lines, pictures):
                if isinstance(sample, SampleError):
                    raise OSError(f"{path} with {tar}: {sample}")
                yield sample
    except (BadShardError, StorageError) as error:
        raise OSError(f"the pictures of {path} are not to be had: {error}") from error


def file_sha256(path: Path) -> str:
    """Return a file's digest, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _count(samples: Iterator[RegionSample]) -> tuple[int, int]:
    counts = [len(sample.regions) for sample in samples]
    return len(counts), sum(counts)
