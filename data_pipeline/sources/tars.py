"""Tars as they come: neighbours with one key are a sample, and an early end is noticed."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from posixpath import basename, splitext
from tarfile import EOFHeaderError, HeaderError, ReadError  # type: ignore[attr-defined]

from alpha_clip.regions import IMAGE_EXTENSIONS
from data_pipeline.sources.base import BadShardError
from data_pipeline.sources.storage import MAX_FILE_BYTES, open_input

Members = dict[str, bytes]

# What tarfile raises of damage: OSError of gzip, bz2 and xz, TypeError of a gzip of three bytes.
_DAMAGE = (tarfile.TarError, EOFError, OSError, TypeError, ValueError, OverflowError)
_PADDING = 1 << 16  # bytes after the end mark; most tools fill up to 10,240, some by other blocks


def read_groups(shard: str) -> Iterator[tuple[str | None, Members]]:
    """Yield neighbouring members with one key, as `key, {extension: bytes}`.

    The key is `None`, once and last, where the tar ends early or is damaged; an unfinished sample
    goes with it.

    Args:
        shard: Path or URL of a tar, compressed or not.

    Raises:
        BadShardError: If not even the first member can be read.
        StorageError: If the storage fails.
    """
    name, members = "", Members()
    with open_input(shard) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictTarInfo) as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would remember every one
                    if not member.isfile():
                        continue
                    stem, suffix = splitext(member.name)
                    extension = suffix[1:].lower()
                    if stem != name or extension in members:
                        if members:
                            yield basename(name), members
                        name, members = stem, {}
                    members[extension] = _read(tar, member)
                _check_rest(tar)
        except _DAMAGE as error:
            if not name:
                raise BadShardError(f"{shard} is no readable tar: {error}") from error
            if "json" in members and not members.keys().isdisjoint(IMAGE_EXTENSIONS):
                yield basename(name), members
            yield None, {}
            return
    if members:
        yield basename(name), members


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


class _StrictTarInfo(tarfile.TarInfo):
    """Raises where a tar stops without its end mark, which `tarfile` takes for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:  # the end mark
            raise
        except HeaderError as error:
            raise ReadError(f"no sound header: {error}") from error
