"""Reading finished shards.

Shards are taken from the `NNNNN.done.json` manifests, never from a glob: what has no manifest is
not finished, and the manifest's counts are the only thing that notices a truncated tar.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import webdataset as wds

from alpha_clip.regions import RegionSample, SampleError, parse_sample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A finished shard: its tar and how many samples its manifest promises."""

    tar: Path
    samples: int


def find_shards(directories: list[str]) -> list[Shard]:
    """Return the finished shards of data sets made by `alpha-clip-data`, in order.

    Raises:
        ValueError: If a folder holds none, or a manifest or its tar is missing or damaged.
    """
    shards = []
    for directory in directories:
        manifests = sorted(Path(directory).glob("*.done.json"))
        if not manifests:
            raise ValueError(
                f"{directory} holds no finished shards (NNNNN.done.json); make them with "
                "`alpha-clip-data grit`"
            )
        for file in manifests:
            try:
                manifest = json.loads(file.read_text())
                shard = Shard(file.parent / manifest["tar"], int(manifest["samples"]))
                size = int(manifest["bytes"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{file} is no manifest of a shard: {error}") from error
            if not shard.tar.is_file() or shard.tar.stat().st_size != size:
                raise ValueError(f"{shard.tar} is missing or not {size} bytes long, as {file} says")
            shards.append(shard)
    return shards


def read_samples(shard: Shard, drops: Counter[str]) -> Iterator[RegionSample]:
    """Yield the sound samples of a shard; what is dropped is counted in `drops` by reason."""
    seen = 0

    def note(error: Exception) -> bool:
        drops["damaged_tar"] += 1
        log.warning("%s: %s", shard.tar, error)
        return True

    # A shard is read by one process at a time, so the samples come in order.
    for raw in wds.tarfile_to_samples(handler=note)([{"url": str(shard.tar)}]):
        try:
            if not raw.keys() >= {"jpg", "json"}:
                raise SampleError("incomplete", f"{raw['__key__']} lacks its jpg or its json")
            seen += 1
            yield parse_sample(raw["__key__"], raw["jpg"], raw["json"])
        except SampleError as error:
            drops[error.reason] += 1
            log.warning("%s: %s", shard.tar, error)
    if seen < shard.samples:
        drops["lost_in_tar"] += shard.samples - seen
        log.warning(
            "%s: %d samples of %d are missing", shard.tar, shard.samples - seen, shard.samples
        )
