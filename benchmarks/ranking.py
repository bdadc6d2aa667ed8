"""Ranking candidates: time and memory, beside reading the digests alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from alpha_clip.regions import encode_rle
from benchmarks.table import report
from benchmarks.timing import Row, compare
from data_pipeline.candidates import Candidate, CandidateFile, CandidateSample
from data_pipeline.shard_files import file_sha256
from data_pipeline.shards import ShardManifest

PER_IMAGE, COUNTS, GROUP = 10, 300, 4096  # candidates a picture, characters, rows a group
_CODE = np.frombuffer(bytes(range(48, 112)), np.uint8)  # COCO's alphabet for masks
# Each in a process of its own; the peak is of that program alone, not of what started it.
_MEASURE = """
import json, sys, time
from pathlib import Path
from data_pipeline.ranking import Keep, candidate_manifests, rank
from data_pipeline.shard_files import file_sha256
way, candidates, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
start = time.perf_counter()
if way == "rank":
    kept = rank(candidates, output, Keep(top_share=0.1, max_per_image=3), progress=False).kept
else:
    kept = 0
    for manifest in candidate_manifests(candidates).values():
        assert file_sha256(manifest.file(candidates)) == manifest.sha256
seconds = time.perf_counter() - start
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "mb": peak / 1024, "kept": kept}))
"""


def ranking(
    candidates: int = 2_000_000,
    classes: int = 1000,
    shards: int = 200,
    rounds: int = 3,
    output: Path = Path("runs/benchmarks/ranking.csv"),
) -> list[Row]:
    """Rank drawn candidates, from their files to the ranking; reading the digests alone is 1.

    Peak memory is that of a process of its own; it is read from /proc, so this wants Linux.

    The masks are random characters, which no compression makes smaller than six bits each.

    Args:
        candidates: Candidates in all.
        classes: Classes, of which one is drawn for each picture.
        shards: Shards that they are spread over.
        rounds: How often to measure.
        output: CSV file for the table.
    """
    peaks: dict[str, list[dict[str, float]]] = {"digests": [], "rank": []}
    with tempfile.TemporaryDirectory() as folder:
        write_candidates(Path(folder), candidates, classes, shards)
        ways: dict[str, Callable[[], object]] = {
            way: _way(way, Path(folder), found) for way, found in peaks.items()
        }
        case = f"{candidates} candidates in {shards} shards"
        rows = compare(case, ways, rounds, "cpu", warmup=1)
        size = sum(f.stat().st_size for f in Path(folder).iterdir() if f.is_file())
    report(rows, output)
    for row in rows:
        most = max(found["mb"] for found in peaks[row.variant])
        sys.stdout.write(
            f"{row.variant}: {row.milliseconds / 1000:.1f} s, {most:.0f} MB at the peak, "
            f"{size / 2**20:.0f} MB of files, {peaks[row.variant][0]['kept']:.0f} kept\n"
        )
    return rows


def write_candidates(folder: Path, candidates: int, classes: int, shards: int) -> None:
    """Write candidate files with their manifests; what stands for masks are no masks."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    rng, schema = np.random.default_rng(0), _schema(folder / "one.parquet")
    sizes = np.diff(np.arange(shards + 1) * candidates // shards).tolist()
    first = 0
    for index, size in enumerate(tqdm(sizes, desc="draw", unit="shard", leave=False)):
        path = folder / f"{index:05d}{CandidateFile.suffix}"
        columns = _columns(rng, first, size, classes)
        table = pyarrow.table([pyarrow.array(columns[n]) for n in schema.names], schema.names)
        with ParquetWriter(path, schema, compression="zstd") as writer:
            for start in range(0, size, GROUP):
                writer.write_table(table.slice(start, GROUP).cast(schema))
        pictures = -(-size // PER_IMAGE)
        manifest = ShardManifest(
            tar=f"{index:05d}.tar",
            samples=pictures,
            regions=size,
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
            rejects={},
            rejected_samples=0,
            rejected_regions=0,
            config_hash="0" * 16,
            input={"path": f"{index:05d}.tar", "samples": pictures, "regions": size},
            sidecar=path.name,
        )
        (folder / f"{index:05d}.done.json").write_text(json.dumps(asdict(manifest)))
        first += pictures


def _columns(rng: np.random.Generator, first: int, size: int, classes: int) -> dict[str, Any]:
    """Draw candidates of pictures from number `first` on, each picture of one class."""
    import pyarrow

    pictures = np.arange(size) // PER_IMAGE
    keys = 1_000_000_000 + first + pictures
    wnid = rng.integers(0, classes, pictures[-1] + 1)[pictures]
    numbers = pyarrow.array([f"n{i:08d}" for i in range(classes)])
    words = pyarrow.array([f"thing number {i}" for i in range(classes)])
    corner = rng.integers(0, 200, (size, 2)).astype(np.float64)
    boxes = np.concatenate([corner, corner + rng.integers(1, 200, (size, 2))], 1)
    counts = _CODE[rng.integers(0, 64, size * COUNTS, np.uint8)]
    ends = np.arange(size + 1, dtype=np.int32) * COUNTS
    text = pyarrow.StringArray.from_buffers(
        size, pyarrow.py_buffer(ends), pyarrow.py_buffer(np.ascontiguousarray(counts))
    )
    return {
        "key": pyarrow.array(keys).cast(pyarrow.string()),
        "id": pyarrow.array(keys).cast(pyarrow.string()),
        "image": pyarrow.array(keys).cast(pyarrow.string()),
        "wnid": pyarrow.DictionaryArray.from_arrays(wnid.astype(np.int32), numbers),
        "name": pyarrow.DictionaryArray.from_arrays(wnid.astype(np.int32), words),
        "w": np.full(size, 500, np.int32),
        "h": np.full(size, 375, np.int32),
        "rid": (np.arange(size) % PER_IMAGE).astype(np.int32),
        "box_xyxy_px": pyarrow.FixedSizeListArray.from_arrays(boxes.ravel(), 4),
        "counts": text,
        "area": rng.integers(1, 40_000, size),
        "sam_iou": rng.uniform(0.8, 1, size),
        "stability": rng.uniform(0.9, 1, size),
        "score": rng.normal(0.22, 0.04, size),
    }


def _schema(path: Path) -> Any:
    """Return the columns of a candidate file, from one with a candidate."""
    from pyarrow.parquet import read_schema

    mask = encode_rle(np.ones((1, 1), bool))["counts"]
    box = (0.0, 0.0, 1.0, 1.0)
    one = Candidate("0", "0", "0", "n0", "thing", 1, 1, 0, box, mask, 1, None, None, 0.0)
    file = CandidateFile(path)
    file.write(CandidateSample("0", (one,)), b"")
    file.close()
    schema = read_schema(path)
    path.unlink()
    return schema


def _way(way: str, folder: Path, found: list[dict[str, float]]) -> Callable[[], float]:
    """Return what measures a way in a process of its own; `found` gets its figures."""

    def measure() -> float:
        with tempfile.TemporaryDirectory() as output:
            command = [sys.executable, "-c", _MEASURE, way, str(folder), output]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
        figures: dict[str, float] = json.loads(run.stdout)
        found.append(figures)
        return figures["seconds"]

    return measure
