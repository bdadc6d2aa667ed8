"""Ranking: which candidates of each class are kept, decided over the whole set.

The second stage of `alpha-clip-data imagenet`, after Alpha-CLIP (Sun et al., 2024, section 3.1): a
class's candidates are ranked by their score, and the top is kept. Rows and ranks are written
for each shard, then `ranking.json`, last; see `ranking_record`. The same candidates and settings
give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_pipeline.candidates import CandidateFile, read_candidates
from data_pipeline.locks import clear_leftovers, exclusive, hold
from data_pipeline.ranking_record import (
    QUANTILES,
    RANKING_FILE,
    ClassRanking,
    Keep,
    Ranking,
    RankSummary,
    ShardRanking,
    kept_name,
    load_ranking,
)
from data_pipeline.shard_files import file_sha256
from data_pipeline.shards import ShardManifest, read_manifests

__all__ = [
    "Keep",
    "RankSummary",
    "Ranking",
    "best_first",
    "candidate_manifests",
    "load_ranking",
    "rank",
    "read_scores",
]

# What decides about a candidate; classes are numbered in the order in which they are met.
_SCORE = np.dtype([("wnid", "i4"), ("rid", "i4"), ("key", "i8"), ("score", "f8")])


def rank(candidates: Path, output: Path, keep: Keep, progress: bool = True) -> RankSummary:
    """Rank the candidates of all finished shards, unless that is done.

    Every candidate file is read once for its digest, and five of its columns again; some 50 bytes a
    candidate are in memory at the peak.

    Args:
        candidates: Folder of the first stage.
        output: Folder for the ranking; may be the same.
        keep: What is kept. Of equal scores the lower key is better, then the lower `rid`.
        progress: Whether to show bars.

    Raises:
        ValueError: If there are no candidates, or some of other settings than the rest; if a class
            has two names, nothing would be kept, or `output` holds another ranking.
        OSError: If a candidate file is missing or damaged, or `output` can't be written.
    """
    manifests = candidate_manifests(candidates)
    (output / ".tmp").mkdir(parents=True, exist_ok=True)
    with exclusive(output / ".tmp" / "ranking.lock"):
        if (output / RANKING_FILE).exists():
            return _finished(output, keep, manifests).summary()
        clear_leftovers(output)
        for manifest in tqdm(manifests.values(), "check", unit="shard", disable=not progress):
            _check(manifest.file(candidates), manifest.sha256)
        names: dict[str, tuple[int, str]] = {}
        bar = tqdm(manifests.values(), "read", unit="shard", disable=not progress)
        tables = [read_scores(manifest.file(candidates), names) for manifest in bar]
        ends = np.cumsum([len(table) for table in tables])
        scores = np.concatenate(tables)
        tables.clear()
        ranks, classes = _decide(scores, names, keep)
        sizes = np.array([found.competing for found in classes], np.int64)[scores["wnid"]]
        bar = tqdm(manifests.items(), "write", unit="shard", disable=not progress)
        shards = {}
        parts = (np.split(column, ends[:-1]) for column in (ranks, sizes))
        for (index, manifest), *columns in zip(bar, *parts, strict=True):
            shards[f"{index:05d}"] = asdict(_write_kept(output, index, manifest.sha256, *columns))
        named = sorted(zip(names, map(asdict, classes), strict=True))
        record = {"keep": asdict(keep), "shards": shards, "classes": dict(named)}
        _sync(output)  # the names of the files before what vouches for them
        _publish(output / RANKING_FILE, json.dumps(record, indent=1, allow_nan=False).encode())
    return load_ranking(output).summary()


def candidate_manifests(folder: Path) -> dict[int, ShardManifest]:
    """Return the manifests of a folder of candidates, by the shard's number, rising.

    Raises:
        ValueError: If there are none, one is damaged or of something else than candidates, or they
            were made with different settings: their scores would not compare.
    """
    manifests = {int(stem): found for stem, found in read_manifests(folder).items()}
    if not manifests:
        raise ValueError(
            f"{folder} holds no finished shards (NNNNN.done.json); give the folder that the first "
            "stage wrote candidates to"
        )
    for index, manifest in manifests.items():
        expected = f"{index:05d}{CandidateFile.suffix}"
        if manifest.sidecar != expected:
            raise ValueError(
                f"shard {index:05d} of {folder} should be {expected}, but is "
                f"{manifest.file(folder).name}; give the folder that the first stage wrote "
                "candidates to"
            )
    first = next(iter(manifests.values())).config_hash
    for index, manifest in manifests.items():
        if manifest.config_hash != first:
            raise ValueError(
                f"{folder} holds shards of settings {first} and, such as {index:05d}, of "
                f"{manifest.config_hash}, whose scores don't compare; make all with the same"
            )
    return dict(sorted(manifests.items()))


def read_scores(file: Path, names: dict[str, tuple[int, str]]) -> NDArray[np.void]:
    """Return what decides about a shard's candidates.

    Args:
        file: The candidate file.
        names: Class -> its number and its name; classes that are new are added.

    Returns:
        A row a candidate, in order: `wnid`, the class's number; `rid`; `key`; `score`.

    Raises:
        ValueError: If a class has two names, a key is no number or a score is not finite.
        OSError: If the file is damaged.
    """
    import pyarrow

    parts = [np.empty(0, _SCORE)]
    for batch in read_candidates(file, ["wnid", "name", "score", "key", "rid"]):
        part = np.empty(len(batch), _SCORE)
        part["wnid"] = _number_classes(file, batch, names)
        part["rid"], part["score"] = batch.column("rid"), batch.column("score")
        try:
            part["key"] = batch.column("key").cast(pyarrow.int64())
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"{file}: keys must be whole numbers below 2 ** 63, got {error}; make the shard "
                "again with such keys"
            ) from error
        if not np.isfinite(part["score"]).all():
            raise ValueError(f"{file} has a score that is no finite number; make the shard again")
        parts.append(part)
    return np.concatenate(parts)


def best_first(scores: NDArray[np.void], most: int | None) -> NDArray[np.int64]:
    """Return which candidates of a class compete, the best first.

    Args:
        scores: The class's candidates, from `read_scores`.
        most: Most of one picture that compete; by default all do.
    """
    order = np.lexsort((scores["rid"], scores["key"], -scores["score"]))
    if most is None:
        return order
    keys = scores["key"][order]
    by_picture = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[by_picture], prepend=keys[by_picture[:1]] - 1))
    sizes = np.diff(starts, append=len(keys))
    place = np.empty(len(keys), np.int64)  # in the candidate's own picture, the best is 0
    place[by_picture] = np.arange(len(keys)) - np.repeat(starts, sizes)
    return order[place < most]


def _finished(output: Path, keep: Keep, manifests: dict[int, ShardManifest]) -> Ranking:
    """Return the ranking that is there, if it is of these settings and inputs, and sound."""
    found = load_ranking(output)
    ranked = {index: shard.candidates_sha256 for index, shard in found.shards.items()}
    given = {index: manifest.sha256 for index, manifest in manifests.items()}
    other = sorted(i for i in {*ranked, *given} if ranked.get(i) != given.get(i))
    what = f"with {found.keep}, now it is {keep}" if found.keep != keep else ""
    if other:
        what = f"of {len(ranked)} shards, now there are {len(given)}; {other[0]:05d} differs"
    if what:
        raise ValueError(
            f"{output} holds a ranking {what}; rank to another folder, or delete "
            f"{output / RANKING_FILE} and all that was made from it"
        )
    for index in found.shards:
        found.rows(index)
    return found


def _check(file: Path, digest: str) -> None:
    """Refuse a candidate file that is not what its manifest says."""
    if not file.exists() or file_sha256(file) != digest:
        state = "damaged: its digest is not its manifest's" if file.exists() else "missing"
        manifest = file.name.replace(CandidateFile.suffix, ".done.json")
        raise OSError(f"{file} is {state}; delete {manifest} and run the first stage again")


def _number_classes(file: Path, batch: Any, names: dict[str, tuple[int, str]]) -> NDArray[np.int32]:
    """Return the number of each row's class, after comparing the classes' names."""
    wnids, words = (batch.column(n).dictionary.to_pylist() for n in ("wnid", "name"))
    codes, texts = (np.asarray(batch.column(n).indices) for n in ("wnid", "name"))
    for pair in np.unique(codes.astype(np.int64) * len(words) + texts):
        wnid, name = wnids[pair // len(words)], words[pair % len(words)]
        if (known := names.setdefault(wnid, (len(names), name))[1]) != name:
            raise ValueError(
                f"{file} names class {wnid} {name!r}, which is {known!r} before it; make all "
                "shards with the same names"
            )
    # A dictionary may hold what no row has; that number is never taken.
    table = np.array([names.get(wnid, (-1, ""))[0] for wnid in wnids], np.int32)
    numbers: NDArray[np.int32] = table[codes]
    return numbers


def _decide(
    scores: NDArray[np.void], names: dict[str, tuple[int, str]], keep: Keep
) -> tuple[NDArray[np.int64], list[ClassRanking]]:
    """Return each candidate's rank, 0 if it is not kept, and the classes by number."""
    if not len(scores):
        raise ValueError("the shards hold no candidate; look at the rejects of the first stage")
    ranks, classes = np.zeros(len(scores), np.int64), []
    by_class = np.argsort(scores["wnid"], kind="stable")
    ends = np.cumsum(np.bincount(scores["wnid"], minlength=len(names)))
    for (_, name), own in zip(names.values(), np.split(by_class, ends[:-1]), strict=True):
        found = scores[own]
        order = best_first(found, keep.max_per_image)
        ranked = found["score"][order]
        kept = keep.count(ranked)
        ranks[own[order[:kept]]] = np.arange(1, kept + 1)
        quantiles = np.quantile(ranked, list(QUANTILES.values())).tolist()
        classes.append(
            ClassRanking(
                name=name,
                pictures=len(np.unique(found["key"])),
                candidates=len(found),
                competing=len(order),
                kept=kept,
                scores=dict(zip(QUANTILES, quantiles, strict=True)),
                lowest_kept=float(ranked[kept - 1]) if kept else None,
                highest_dropped=float(ranked[kept]) if kept < len(ranked) else None,
            )
        )
    if not ranks.any():
        raise ValueError(
            f"nothing would be kept: min_score is {keep.min_score}, but the best score is "
            f"{scores['score'].max():.4g}; lower it"
        )
    return ranks, classes


def _write_kept(
    output: Path, index: int, digest: str, ranks: NDArray[np.int64], sizes: NDArray[np.int64]
) -> ShardRanking:
    """Write what is kept of a shard, by its candidates' ranks and the sizes of their classes."""
    import pyarrow
    from pyarrow.parquet import write_table

    rows = np.flatnonzero(ranks)
    columns = {"row": rows, "rank": ranks[rows], "class_size": sizes[rows]}
    buffer = io.BytesIO()
    write_table(pyarrow.table(columns), buffer, compression="zstd")
    _publish(output / kept_name(index), buffer.getvalue())
    kept_sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    return ShardRanking(len(ranks), len(rows), digest, kept_sha256)


def _publish(file: Path, data: bytes) -> None:
    """Write a file so that it is never seen in part, not even after a power failure."""
    temporary = file.parent / ".tmp" / f"{file.name}-{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as stream:
            hold(stream)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Bring the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
