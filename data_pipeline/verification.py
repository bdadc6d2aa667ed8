"""Verifying finished shards: everything is read again, and nothing may be missing or left over."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_pipeline.shard_files import file_sha256
from data_pipeline.shards import ShardManifest


@dataclass
class Verification:
    """What a data set holds, and what is wrong with it.

    Attributes:
        shards: Finished shards.
        samples: Images in them.
        regions: Regions in them.
        bytes: Their size.
        rejected_samples: Samples that were lost on the way, with a reason.
        rejected_regions: Regions that were lost on the way, with a reason.
        unfinished: Files that no manifest vouches for; readers do not see them.
        problems: What is wrong, a line each.
    """

    shards: int = 0
    samples: int = 0
    regions: int = 0
    bytes: int = 0
    rejected_samples: int = 0
    rejected_regions: int = 0
    unfinished: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ShardFindings:
    """What reading one shard showed; `keys` are 64-bit digests of its samples' keys."""

    manifest: ShardManifest | None
    keys: NDArray[np.uint64]
    problems: list[str]


def verify_shards(directory: Path, workers: int = 1) -> Verification:
    """Read every finished shard of a data set again and compare it with its manifest.

    Checked are the digest, every tar header, JPEG, JSON and mask, the counts, that what came in is
    what is there plus what was rejected, that no key occurs twice, and that all shards were made
    with the same settings.

    Args:
        directory: The data set's folder.
        workers: Processes; with 1, everything happens in this one.

    Raises:
        ValueError: If there is no finished shard.
    """
    files = sorted(directory.glob("*.done.json"))
    if not files:
        raise ValueError(f"{directory} holds no finished shards (NNNNN.done.json)")
    total, keys, shards = Verification(), [], set[str]()
    configs: dict[str, list[str]] = defaultdict(list)
    for file, found in zip(files, _read_all(files, workers), strict=True):
        total.problems += [f"{file.name}: {problem}" for problem in found.problems]
        keys.append(found.keys)
        if found.manifest is not None:
            _add(total, found.manifest)
            shards.add(found.manifest.file(directory).name)
            configs[found.manifest.config_hash].append(file.name)
    total.problems += _twice(files, keys)
    if len(configs) > 1:
        sizes = ", ".join(f"{len(names)} like {names[0]}" for names in configs.values())
        total.problems.append(f"the shards were made with {len(configs)} settings: {sizes}")
    total.unfinished = _unfinished(directory, files, shards)
    return total


def verify_shard(file: Path) -> ShardFindings:
    """Compare one shard with its manifest, `NNNNN.done.json`."""
    none = np.empty(0, np.uint64)
    try:
        manifest = ShardManifest(**json.loads(file.read_text()))
        shard = manifest.file(file.parent)
        size, digest = shard.stat().st_size, file_sha256(shard)
    except (OSError, TypeError, ValueError) as error:
        return ShardFindings(None, none, [f"the manifest or its shard can't be read: {error}"])
    problems = []
    if (size, digest) != (manifest.bytes, manifest.sha256):
        problems.append(
            f"{shard.name} has {size} bytes with digest {digest[:8]}, the manifest says "
            f"{manifest.bytes} bytes with {manifest.sha256[:8]}"
        )
    keys, regions = [], 0
    try:
        for sample in manifest.read(file.parent):
            keys.append(sample.key)
            regions += len(sample.regions)
    except OSError as error:
        problems.append(str(error))
    if (len(keys), regions) != (manifest.samples, manifest.regions):
        problems.append(
            f"{len(keys)} samples and {regions} regions can be read, the manifest says "
            f"{manifest.samples} and {manifest.regions}"
        )
    problems += _accounts(file, manifest)
    return ShardFindings(manifest, np.array([_key64(k) for k in keys], np.uint64), problems)


def _accounts(file: Path, manifest: ShardManifest) -> Iterator[str]:
    """Say where what came in is not what is there plus what was rejected."""
    for what in ("samples", "regions"):
        kept, lost = getattr(manifest, what), getattr(manifest, f"rejected_{what}")
        came = manifest.input.get(what)
        if came != kept + lost:
            yield f"{came} {what} came in, but {kept} are there and {lost} were rejected"
    rejects = file.with_name(file.name.replace(".done.json", ".rejects.jsonl"))
    try:
        reasons = Counter(json.loads(line)["reason"] for line in rejects.read_text().splitlines())
    except (OSError, ValueError, TypeError, KeyError) as error:
        yield f"{rejects.name} can't be read: {error!r}"
        return
    if dict(reasons) != manifest.rejects:
        yield f"{rejects.name} lists {dict(reasons)}, the manifest says {manifest.rejects}"


def _read_all(files: list[Path], workers: int) -> Iterator[ShardFindings]:
    if workers <= 1 or len(files) == 1:
        yield from map(verify_shard, tqdm(files, desc="verify", unit="shard"))
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = pool.map(verify_shard, files)
        yield from tqdm(found, desc="verify", unit="shard", total=len(files))


def _twice(files: list[Path], keys: list[NDArray[np.uint64]]) -> Iterator[str]:
    """Say which shards hold a key that occurs before, in them or in another shard."""
    joined = np.concatenate(keys)
    _, first = np.unique(joined, return_index=True)
    again = np.ones(len(joined), bool)
    again[first] = False
    owners = np.repeat(np.arange(len(files)), [len(k) for k in keys])
    for owner, count in sorted(Counter(owners[again].tolist()).items()):
        yield f"{files[owner].name}: {count} keys occur before, in it or in another shard"


def _unfinished(directory: Path, manifests: list[Path], shards: set[str]) -> list[str]:
    """Return files that no manifest vouches for."""
    known = shards | {f.name.replace(".done.json", ".rejects.jsonl") for f in manifests}
    kinds = ("*.tar", "*.regions.jsonl", "*.rejects.jsonl")
    found = {path.name for kind in kinds for path in directory.glob(kind)}
    return sorted(found - known)


def _add(total: Verification, manifest: ShardManifest) -> None:
    total.shards += 1
    for name in ("samples", "regions", "bytes", "rejected_samples", "rejected_regions"):
        setattr(total, name, getattr(total, name) + getattr(manifest, name))


def _key64(key: str) -> int:
    """Stand in for a key: twenty million of them fit in memory."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
