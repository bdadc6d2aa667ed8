"""The data path: encoding masks, and reading shards with one or several regions an image."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alpha_clip.datasets import RegionShards
from alpha_clip.reader import find_shards
from alpha_clip.regions import RegionAnnotation, RegionSample, encode_rle
from alpha_clip.sampling import Sampling
from alpha_clip.streams import ShardSet
from alpha_clip.transforms import RegionAugment
from benchmarks.regions import photo
from benchmarks.timing import Row, compare, report
from data_pipeline.shards import ShardWriter

HEIGHT, WIDTH, REGIONS = 480, 640, 4


def data(
    samples: int = 200,
    size: int = 224,
    rounds: int = 7,
    output: Path = Path("runs/benchmarks/data.csv"),
) -> list[Row]:
    """Encode a mask, and read images of 640 x 480 with four regions on one core.

    The first of each case is 1: Python's groupby, and one region an image.

    Args:
        samples: Images a round.
        size: Side of the tensors, in pixels.
        rounds: How often to measure.
        output: CSV file for the table.
    """
    torch.set_num_threads(1)  # as in a data loader's worker
    rng = np.random.default_rng(0)
    mask = blob(rng)
    assert by_groupby(mask) == encode_uncompressed(mask)
    ways: dict[str, Callable[[], object]] = {
        "Python groupby": lambda: by_groupby(mask),
        "encode_rle": lambda: encode_rle(mask),
    }
    rows = compare("a mask of 640 x 480", ways, rounds, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder), rng, samples)
        shards = ShardSet(tuple(find_shards([folder])))
        reads = {
            f"{k} region{'s' * (k > 1)} an image": reading(shards, k, size, samples)
            for k in (1, REGIONS)
        }
        read = compare(f"reading {samples} images", reads, rounds, "cpu")
    report(rows + read, output)
    for row, k in zip(read, (1, REGIONS), strict=True):
        sys.stdout.write(
            f"{row.variant}: {1000 * samples / row.milliseconds:.0f} images/s a core, "
            f"{k / row.ratio:.2f} x the regions/s of one an image\n"
        )
    return rows + read


def reading(shards: ShardSet, regions: int, size: int, samples: int) -> Callable[[], object]:
    """Return what draws regions of so many images, as in training."""
    sampling = Sampling(regions_per_image=regions)
    stream = RegionShards([shards], RegionAugment(size), sampling, seed=0, shuffle=1)

    def read() -> object:
        return [len(sample.alphas) for sample in islice(stream, samples)]

    return read


def write_shard(
    folder: Path, rng: np.random.Generator, samples: int, regions_each: int = REGIONS
) -> None:
    """Write a shard of pictures with about the detail of photographs, and masks like SAM's."""
    writer = ShardWriter(folder, 0)
    for i in range(samples):
        masks = [blob(rng) for _ in range(regions_each)]
        regions = tuple(
            RegionAnnotation(
                rid=rid,
                text="an object",
                kind="noun_chunk",
                span=None,
                box=(0.0, 0.0, float(WIDTH), float(HEIGHT)),
                rle=encode_rle(mask),
                area=int(mask.sum()),
            )
            for rid, mask in enumerate(masks)
        )
        writer.write(
            RegionSample(str(i), photo(rng), str(i), "benchmark", WIDTH, HEIGHT, "words", regions)
        )
    writer.commit("0" * 16, "benchmark")


def blob(rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return a mask with a wavy outline, somewhere in the picture."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    x, y = x - rng.uniform(200, WIDTH - 200), y - rng.uniform(150, HEIGHT - 150)
    angle = np.arctan2(y, x)
    waves = sum(rng.uniform(0, 20) * np.sin(k * angle + rng.uniform(0, 6)) for k in range(2, 12))
    inside: NDArray[np.bool_] = np.hypot(x, y) < rng.uniform(60, 140) + waves
    return inside


def by_groupby(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Encode a mask by Python's groupby, as the published data script does."""
    counts: list[int] = []
    for i, (value, run) in enumerate(groupby(mask.ravel(order="F"))):
        if i == 0 and value:
            counts.append(0)
        counts.append(len(list(run)))
    return {"counts": counts, "size": list(mask.shape)}


def encode_uncompressed(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Return our encoding's runs, to compare with."""
    from alpha_clip.rle import rle_runs

    return {"counts": rle_runs(encode_rle(mask)).tolist(), "size": list(mask.shape)}
