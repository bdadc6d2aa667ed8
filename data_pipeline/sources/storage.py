"""Inputs wherever they lie: local files, and every storage that fsspec knows (s3, gs, hf, ...)."""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from glob import glob, has_magic
from os.path import expanduser
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from braceexpand import braceexpand
from fsspec.registry import known_implementations

from data_pipeline.sources.base import BadShardError, StorageError

MAX_FILE_BYTES = 1 << 28  # of one file inside a shard, or one picture beside it
_AT_ONCE = 32  # names asked for together; a list of thousands would take minutes one by one


def find_inputs(patterns: str | list[str]) -> list[str]:
    """Return the files that patterns match, in order, each once.

    A name without wildcards, such as `{00000..00099}` gives, is returned even where its file is
    missing, if others of its pattern are there: the shards that follow keep their numbers, and the
    missing one is reported when it is read.

    Args:
        patterns: Paths or URLs with `*`, `?`, `[...]` or `{00000..00099}` in them, one or several.

    Raises:
        ValueError: If a pattern matches nothing, or its storage can't be reached.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        parts = [expanduser(part) for part in braceexpand(pattern)]
        names = [part for part in parts if not _has_wildcards(part)]
        matches = [name for part in parts if _has_wildcards(part) for name in _glob(part)]
        if not matches and not _any_is_file(names):
            raise ValueError(
                f"no file matches {pattern!r}; give a pattern of inputs such as '/data/grit/*.tar' "
                "or 's3://bucket/grit/{00000..00099}.tar', in quotes"
            )
        found += sorted(matches + names)
    return list(dict.fromkeys(found))


@contextmanager
def open_input(url: str) -> Iterator[BinaryIO]:
    """Open a file for reading from start to end.

    Whatever the storage raises while it is read comes as `StorageError`, so that a failing network
    is never taken for a file that ends early.

    Raises:
        BadShardError: If there is no such file.
        StorageError: If the file can't be opened for another reason, or reading fails.
        ValueError: If no storage of that name is known, or its package is missing.
    """
    storage, path = _storage(url) if "://" in url else (None, url)
    try:
        file: Any = storage.open(path, "rb") if storage else open(expanduser(path), "rb")
    except Exception as error:
        if _is_missing(error):
            raise BadShardError(f"No such file: {url}") from error
        raise StorageError(f"{url} can't be opened: {_said(error)}") from error
    with file:
        yield _Guarded(file, url)  # type: ignore[misc]


class _Guarded:
    """A file whose failures are told apart from what it holds."""

    def __init__(self, file: BinaryIO, url: str) -> None:
        self._file = file
        self._url = url

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._file.read(size)
            if 0 <= size <= len(data):
                return data
            end, whole = self._file.tell(), getattr(self._file, "size", None)
        except Exception as error:
            raise StorageError(f"reading {self._url} failed: {_said(error)}") from error
        if isinstance(whole, int) and end < whole:  # a server that has had enough may say nothing
            raise StorageError(f"reading {self._url} failed: nothing after byte {end} of {whole}")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)  # seek, tell, closed: what parquet needs beside


def _has_wildcards(url: str) -> bool:
    return has_magic(url.split("?")[0] if url.startswith(("http://", "https://")) else url)


def _glob(pattern: str) -> list[str]:
    if "://" not in pattern:
        return [p for p in [pattern, *glob(pattern, recursive=True)] if Path(p).is_file()]
    with _explained(pattern):
        storage, path = _storage(pattern)
        found = storage.glob(path, detail=True)
        if not found:  # fsspec also finds nothing where it may not look
            _check_folder(storage, re.split(r"[*?[]", path)[0].rpartition("/")[0])
    names = [name for name, info in found.items() if info["type"] != "directory"]
    if path in pattern:  # keeps host and user of sftp://me@host/..., and what is chained by "::"
        return [pattern.replace(path, name, 1) for name in names]
    return [storage.unstrip_protocol(name) for name in names]


def _check_folder(storage: Any, path: str) -> None:
    """Raise what the storage says of a folder, unless it is that there is none."""
    try:
        storage.ls(path)
    except Exception as error:
        if not _is_missing(error):
            raise


def _any_is_file(names: list[str]) -> bool:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        starts = range(0, len(names), _AT_ONCE)
        return any(any(pool.map(_is_file, names[i : i + _AT_ONCE])) for i in starts)


def _is_file(name: str) -> bool:
    if "://" not in name:
        return Path(name).is_file()
    with _explained(name):
        storage, path = _storage(name)
        try:
            return bool(storage.info(path)["type"] != "directory")
        except Exception as error:
            if _is_missing(error):
                return False
            raise


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn whatever a storage raises when it is asked what it holds into a `ValueError`."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{url} can't be looked up: {_said(error)}") from error


def _storage(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and what the file is called there."""
    protocol = url.split("::")[-1].split("://")[0]
    try:
        storage, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = str(known_implementations.get(protocol, {}).get("class", protocol)).split(".")[0]
        package = f"fsspec[{protocol}]" if package == "fsspec" else package
        raise ValueError(
            f"{url} needs another package: pip install '{package}' ({error})"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{url} is in no storage that is known ({error}); give a path, or a URL that begins "
            "with s3://, gs://, hf:// or https://"
        ) from error
    except Exception as error:
        raise StorageError(f"{url} can't be reached: {_said(error)}") from error
    return storage, path


def _is_missing(error: Exception) -> bool:
    """Whether the storage says that there is no such file, rather than that it does not know."""
    cause = error.__cause__
    if type(cause).__module__.startswith("aiohttp") or isinstance(cause, asyncio.TimeoutError):
        # fsspec's HTTP calls every failure "not found", that of a server that is down included.
        return getattr(cause, "status", None) in (404, 410)
    missing = FileNotFoundError | IsADirectoryError | NotADirectoryError
    return isinstance(error, missing) or getattr(error, "errno", None) == errno.ENAMETOOLONG


def _said(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}"
