"""Drawn scenes with their true masks, as region–text shards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from alpha_clip.regions import RegionAnnotation, RegionSample, encode_rle
from data_pipeline.shards import ShardWriter
from data_pipeline.sources.scene_drawing import Scene, SceneConfig, draw_scene

_PAIRS = ("seen", "held_out", "all")


def write_scenes(folder: Path, config: SceneConfig) -> None:
    """Draw scenes into a folder of finished shards; what is there already stays.

    Masks are the true ones: the question is how a model looks, not how a mask is found.

    Args:
        folder: Where to write.
        config: What to draw.
    """
    shards = range(-(-config.samples // config.shard_size))
    for shard in tqdm(shards, desc=f"draw {folder.name}", unit="shard"):
        if (folder / f"{shard:05d}.done.json").exists():
            continue
        writer = ShardWriter(folder, shard)
        first = shard * config.shard_size
        for index in range(first, min(first + config.shard_size, config.samples)):
            seed = [config.seed, _PAIRS.index(config.pairs), index]
            writer.write(_sample(draw_scene(np.random.default_rng(seed), config), index))
        writer.commit("0" * 16, "scenes")


def _sample(scene: Scene, index: int) -> RegionSample:
    height, width = scene.rgb.shape[:2]
    buffer = io.BytesIO()
    Image.fromarray(scene.rgb).save(buffer, "JPEG", quality=92, subsampling=0)
    regions = []
    for rid, item in enumerate(scene.objects):
        ys, xs = np.nonzero(item.mask)
        box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
        rle, area = encode_rle(item.mask), int(item.mask.sum())
        regions.append(RegionAnnotation(rid, item.name, "noun_chunk", None, box, rle, area))
    key = f"{index:08d}"
    jpeg = buffer.getvalue()
    return RegionSample(key, jpeg, key, "scenes", width, height, scene.caption, tuple(regions))
