"""Evaluation: many regions of a picture, one by one or sharing its decode and resize."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from alpha_clip.demo import config_file
from alpha_clip.drops import Drops
from alpha_clip.evaluation.region_classification import RegionClassification
from alpha_clip.factory import create_model
from alpha_clip.model import AlphaClip
from alpha_clip.reader import find_shards, read_samples
from alpha_clip.regions import decode_jpeg, decode_rle
from benchmarks.pictures import write_shard
from benchmarks.table import report
from benchmarks.timing import Row, compare


def evaluation(
    name: str | None = None,
    samples: int = 12,
    regions: int = 8,
    rounds: int = 7,
    device: str = "cpu",
    output: Path = Path("runs/benchmarks/evaluation.csv"),
) -> list[Row]:
    """Classify the regions of pictures of 640 x 480: one by one, and as `alpha-clip eval` does.

    Args:
        name: An open_clip architecture; `None` is the demo's tiny one.
        samples: Pictures a round.
        regions: Regions of each.
        rounds: How often to measure.
        device: Where the tower is.
        output: CSV file for the table.
    """
    tiny = f"local-dir:{Path(config_file('models/tiny/open_clip_config.json')).parent}"
    model, _, _ = create_model(name or tiny, device=device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_shard(Path(folder), np.random.default_rng(0), samples, regions)
        benchmark = RegionClassification([folder], focus=["alpha"], controls=False)
        benchmark.prepare(model)
        (part,) = benchmark.parts()
        ways: dict[str, Callable[[], object]] = {
            "one by one": lambda: one_by_one(model, folder, device),
            "alpha-clip eval": lambda: benchmark.score(model, part, Drops(), lambda _: None),
        }
        rows = compare(f"{samples} pictures of {regions} regions", ways, rounds, device)
    report(rows, output)
    for row in rows:
        speed = 1000 * samples * regions / row.milliseconds
        sys.stdout.write(f"{row.variant}: {speed:.0f} regions/s\n")
    return rows


def one_by_one(model: AlphaClip, folder: str, device: str) -> list[torch.Tensor]:
    """Open the picture for each of its regions, resize both, and pass them alone."""
    transform = model.transform.replace(geometry="squash")
    return [
        model.encode_image(
            transform(decode_jpeg(sample.jpeg), decode_rle(region.rle))[None].to(device),
            normalize=True,
        )
        for shard in find_shards([folder])
        for sample in read_samples(shard, Drops())
        for region in sample.regions
    ]
