"""Reading finished shards.

Shards are taken from the `NNNNN.done.json` manifests, never from a glob: what has no manifest is
not finished, and the manifest's counts are the only thing that notices a truncated tar.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import webdataset as wds

from alpha_clip.drops import Drops
from alpha_clip.regions import (
    IMAGE_EXTENSIONS,
    RegionSample,
    SampleError,
    join_sidecar,
    parse_sample,
)


@dataclass(frozen=True)
class Shard:
    """A finished shard.

    Attributes:
        file: The tar with pictures and masks, or the sidecar with the masks alone.
        samples: How many samples its manifest promises.
        pictures: Of a sidecar, path or URL of the tar that holds the pictures.
    """

    file: Path
    samples: int
    pictures: str | None = None


def find_shards(directories: list[str], originals: str | None = None) -> list[Shard]:
    """Return the finished shards of data sets made by `alpha-clip-data`, in order.

    Args:
        directories: Folders of the data sets.
        originals: Of data sets whose masks lie beside the pictures: folder or URL where the
            original tars are now, if they have moved since.

    Raises:
        ValueError: If a folder holds none, or a manifest or what it vouches for is missing or
            damaged.
    """
    shards = []
    for directory in directories:
        manifests = sorted(Path(directory).glob("*.done.json"), key=lambda file: file.name)
        if not manifests:
            raise ValueError(
                f"{directory} holds no finished shards (NNNNN.done.json); make them with "
                "`alpha-clip-data grit`"
            )
        shards += [_shard(file, originals) for file in manifests]
    return shards


def _shard(file: Path, originals: str | None) -> Shard:
    try:
        manifest = json.loads(file.read_text())
        tar, sidecar = manifest["tar"], manifest.get("sidecar")
        path = file.parent / (sidecar or tar)
        samples, size = int(manifest["samples"]), int(manifest["bytes"])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file} is no manifest of a shard: {error}") from error
    if not path.is_file() or path.stat().st_size != size:
        raise ValueError(f"{path} is missing or not {size} bytes long, as {file} says")
    if not sidecar:
        return Shard(path, samples)
    pictures = f"{originals.rstrip('/')}/{PurePosixPath(tar).name}" if originals else str(tar)
    if "://" not in pictures and not Path(pictures).is_file():
        raise ValueError(
            f"{path} needs the pictures in {pictures}, which is missing; say where the original "
            "tars are now (originals)"
        )
    return Shard(path, samples, pictures)


def read_samples(
    shard: Shard, drops: Drops, part: int = 0, parts: int = 1
) -> Iterator[RegionSample]:
    """Yield the sound samples of a shard; every one that is not there is counted.

    Args:
        shard: The shard.
        drops: Where to count.
        part: Which part to read, where several readers share a shard: samples number `part`,
            `part + parts`, ...
        parts: How many parts there are.
    """
    seen = 0
    for sample in (_from_sidecar if shard.pictures else _from_tar)(shard, drops, part, parts):
        seen += 1
        if isinstance(sample, SampleError):
            drops.add(sample.reason, f"{shard.file}: {sample.detail}")
        else:
            yield sample
    promised = len(range(part, shard.samples, parts))
    if seen < promised:
        detail = f"{shard.file}: {promised - seen} samples of {promised} are not there"
        drops.add("lost_in_tar", detail, promised - seen)


def _from_tar(
    shard: Shard, drops: Drops, part: int, parts: int
) -> Iterator[RegionSample | SampleError]:
    # A shard is read from start to end, so the samples come in order.
    note = _noted(shard, drops, part)
    raws = wds.tarfile_to_samples(handler=note)([{"url": str(shard.file)}])
    seen: set[str] = set()
    for number, raw in enumerate(chain(raws, _behind_damage(shard, seen))):
        seen.add(raw["__key__"])
        if number % parts != part:
            continue
        try:
            if not raw.keys() >= {"jpg", "json"}:
                raise SampleError("incomplete", f"{raw['__key__']} lacks its jpg or its json")
            yield parse_sample(raw["__key__"], raw["jpg"], raw["json"])
        except SampleError as error:
            yield error


def _behind_damage(shard: Shard, seen: set[str]) -> Iterator[dict[str, Any]]:
    """Yield what webdataset did not reach: it takes a damaged header for the end of a tar."""
    if len(seen) >= shard.samples:
        return
    raw: dict[str, Any] = {}
    with (
        suppress(tarfile.TarError, OSError),  # noted before, and what is lost is counted
        tarfile.open(shard.file, ignore_zeros=True) as tar,  # skips what is no header
    ):
        for member in tar:
            name = PurePosixPath(member.name)
            if name.stem in seen or not member.isfile():
                continue
            if raw and raw["__key__"] != name.stem:
                yield raw
                raw = {}
            file = tar.extractfile(member)
            raw |= {"__key__": name.stem, name.suffix[1:]: file.read() if file else b""}
    if raw:
        yield raw


def _from_sidecar(
    shard: Shard, drops: Drops, part: int, parts: int
) -> Iterator[RegionSample | SampleError]:
    with shard.file.open("rb") as lines:
        yield from join_sidecar(islice(lines, part, None, parts), _pictures(shard, drops, part))


def _pictures(shard: Shard, drops: Drops, part: int) -> Iterator[tuple[str, bytes]]:
    """Yield key and bytes of the pictures in the original tar, as far as it can be read."""
    try:
        with (
            fsspec.open(shard.pictures, "rb") as file,
            tarfile.open(fileobj=file, mode="r|*", ignore_zeros=True) as tar,  # skips damage
        ):
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would remember every one
                name = PurePosixPath(member.name)
                content = tar.extractfile(member) if member.isfile() else None
                if content and name.suffix[1:].lower() in IMAGE_EXTENSIONS:
                    yield name.stem, content.read()
    except Exception as error:  # noqa: BLE001 - a storage library may raise anything
        _noted(shard, drops, part)(error)


def _noted(shard: Shard, drops: Drops, part: int) -> Callable[[Exception], bool]:
    """Return webdataset's handler of errors; the first of a shard's readers counts them."""

    def note(error: Exception) -> bool:
        if part == 0:
            drops.add("damaged_tar", f"{shard.pictures or shard.file}: {error}")
        return True

    return note
