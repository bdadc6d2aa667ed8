"""What data benchmarks work on: pictures with about the detail of photographs, masks like SAM's."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alpha_clip.regions import RegionAnnotation, RegionSample, encode_rle
from data_pipeline.shards import ShardWriter

HEIGHT, WIDTH, REGIONS = 480, 640, 4


def photo(rng: np.random.Generator) -> bytes:
    """Return a JPEG of 640 x 480 px with about the detail of a photograph."""
    coarse = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


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
