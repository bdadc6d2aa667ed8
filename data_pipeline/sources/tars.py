"""Tars as they come: neighbours with one key are a sample, and an early end is noticed."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from posixpath import basename, splitext
from tarfile import (  # type: ignore[attr-defined]
    BLOCKSIZE,
    EOFHeaderError,
    HeaderError,
    InvalidHeaderError,
    ReadError,
)
from typing import Literal

from alpha_clip.regions import IMAGE_EXTENSIONS
from data_pipeline.sources.base import BadShardError
from data_pipeline.sources.storage import MAX_FILE_BYTES, open_input

Members = dict[str, bytes]

# What tarfile raises of damage: OSError of gzip, bz2 and xz, TypeError of a gzip of three bytes.
_DAMAGE = (tarfile.TarError, EOFError, OSError, TypeError, ValueError, OverflowError)
_PADDING = 1 << 16  # bytes after the end mark; most tools fill up to 10,240, some by other blocks


@dataclass
class Group:
    """Neighbouring members of one name.

    Attributes:
        key: Their name, without folder and extension.
        members: Extension -> content. Empty if this only says that something is lost.
        fault: `damaged_tar` if a header near them could not be read, so that what they lack may be
            lost with it; `truncated_tar` where the tar ends early, once and last.
    """

    key: str
    members: Members
    fault: Literal["damaged_tar", "truncated_tar"] | None = None

    @property
    def complete(self) -> bool:
        """Whether a record and a picture are there."""
        return "json" in self.members and not self.members.keys().isdisjoint(IMAGE_EXTENSIONS)


@dataclass
class _Open:
    """A group that is being read, and what could not be read around it."""

    name: str
    group: Group
    lost_before: bool = False
    hurt: bool = False

    def end(self, hurt_behind: bool) -> list[Group]:
        """Return the group, after word of a sample that is lost before it, if one is."""
        if not self.group.complete:
            if self.lost_before or self.hurt or hurt_behind:
                self.group.fault = "damaged_tar"
            return [self.group]
        return [Group("", {}, "damaged_tar"), self.group] if self.lost_before else [self.group]


def read_groups(shard: str) -> Iterator[Group]:
    """Yield neighbouring members with one key.

    Behind a header that can't be read, reading goes on with the next one that can.

    Args:
        shard: Path or URL of a tar, compressed or not.

    Raises:
        BadShardError: If not even the first member can be read.
        StorageError: If the storage fails.
    """
    current: _Open | None = None
    with open_input(shard) as file:
        try:
            with _StrictTar.open(fileobj=file, mode="r|*") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would remember every one
                    if not member.isfile():
                        continue
                    hurt, tar.hurt = tar.hurt, False
                    stem, suffix = splitext(member.name)
                    extension = suffix[1:].lower()
                    if (
                        current is None
                        or stem != current.name
                        or extension in current.group.members
                    ):
                        lost = hurt and (current is None or current.group.complete)
                        if current is not None:
                            yield from current.end(hurt)
                        current = _Open(stem, Group(basename(stem), {}), lost_before=lost)
                    current.hurt |= hurt
                    current.group.members[extension] = _read(tar, member)
                _check_rest(tar)
                hurt = tar.hurt
        except _DAMAGE as error:
            if current is None:
                raise BadShardError(f"{shard} is no readable tar: {error}") from error
            if current.group.complete:
                yield from current.end(False)
            yield Group("", {}, "truncated_tar")
            return
    if current is not None:
        yield from current.end(hurt)
        if hurt and current.group.complete:
            yield Group("", {}, "damaged_tar")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    size = min(member.size, MAX_FILE_BYTES)  # what is cut here is no sound picture or json
    data = file.read(size) if file else b""
    if len(data) != size:  # it may be negative, too
        raise ReadError("unexpected end of data")
    return data


def _check_rest(tar: tarfile.TarFile) -> None:
    """Raise if more follows the end mark than padding: other data, or a tail of zeros.

    The latter is what a download leaves that reserved its place first.
    """
    rest = tar.fileobj.read(_PADDING + 1) if tar.fileobj else b""
    if len(rest) > _PADDING or any(rest):
        raise ReadError("there is more after the end mark")


class _StrictTar(tarfile.TarFile):
    """A tar that is read past headers that are damaged, and says so in `hurt`."""

    hurt = False


class _StrictTarInfo(tarfile.TarInfo):
    """Raises where a tar stops without its end mark, which `tarfile` takes for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _StrictTarInfo:
        while True:
            try:
                return super().fromtarfile(tarfile)
            except EOFHeaderError:  # the end mark
                raise
            except InvalidHeaderError as error:
                if tarfile.offset == 0:  # no tar at all
                    raise ReadError(f"no sound header: {error}") from error
                tarfile.offset += BLOCKSIZE  # content, then: the next header lies ahead
                tarfile.hurt = True  # type: ignore[attr-defined]
            except HeaderError as error:
                raise ReadError(f"no sound header: {error}") from error


_StrictTar.tarinfo = _StrictTarInfo
