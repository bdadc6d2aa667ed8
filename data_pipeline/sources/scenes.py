"""Procedural scenes as data: tars in exactly the layout that img2dataset gives GRIT.

The rest of the pipeline can't tell them from the real thing. The true masks lie in a file beside
each tar and serve for scoring only.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from alpha_clip.regions import encode_rle
from data_pipeline.sources.scene_drawing import (
    HELD_OUT_NAMES,
    NAMES,
    Scene,
    SceneConfig,
    draw_scene,
)


def _records(scene: Scene, key: str) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """Return the JPEG, GRIT's json and the line of true masks of a scene."""
    height, width = scene.rgb.shape[:2]
    buffer = io.BytesIO()
    Image.fromarray(scene.rgb).save(buffer, "JPEG", quality=92, subsampling=0)
    chunks, expressions, truth, cursor = [], [], [], 0
    for item in scene.objects:
        start = scene.caption.index(item.phrase, cursor)
        cursor = end = start + len(item.phrase)
        ys, xs = np.nonzero(item.mask)
        box = (xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height)
        place = [round(float(v), 6) for v in box]
        chunks.append([end - len(item.name), end, *place, 1.0])
        expressions.append([start, end, *place, 1.0])
        truth.append({"text": item.name, "box": place, "rle": encode_rle(item.mask)})
    grit = {
        "key": key,
        "caption": scene.caption,
        "url": "",
        "status": "success",
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "clip_similarity_vitb32": 1.0,
        "id": int(key),
        "noun_chunks": chunks,
        "ref_exps": expressions,
    }
    return buffer.getvalue(), grit, {"key": key, "masks": truth}


def _write_shard(folder: Path, shard: int, config: SceneConfig) -> int:
    """Draw one tar with its masks and statistics; the statistics come last and mark it done."""
    first = shard * config.shard_size
    count = min(config.shard_size, config.samples - first)
    stem = folder / f"{shard:05d}"
    truth = []
    with tarfile.open(stem.with_suffix(".tar.tmp"), "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(count):
            pairs = ("seen", "held_out", "all").index(config.pairs)
            rng = np.random.default_rng([config.seed, pairs, first + i])
            key = f"{shard:05d}{i:04d}"
            scene = draw_scene(rng, config)
            jpeg, grit, masks = _records(scene, key)
            truth.append(json.dumps(masks, separators=(",", ":")))
            for suffix, data in (
                ("jpg", jpeg),
                ("txt", scene.caption.encode()),
                ("json", json.dumps(grit).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    Path(f"{stem}.masks.jsonl").write_text("\n".join(truth) + "\n")
    os.replace(stem.with_suffix(".tar.tmp"), stem.with_suffix(".tar"))
    stats = {"count": count, "successes": count, "config": asdict(config)}
    Path(f"{stem}_stats.json").write_text(json.dumps(stats))
    return count


def _missing_shards(folder: Path, config: SceneConfig) -> Iterator[int]:
    for shard in range(-(-config.samples // config.shard_size)):
        stats = folder / f"{shard:05d}_stats.json"
        if not stats.exists():
            yield shard
        elif json.loads(stats.read_text())["config"] != asdict(config):
            raise ValueError(
                f"{stats} was drawn with other settings; draw into another folder, or delete it"
            )


def write_scenes(output: str, config: SceneConfig, workers: int = 2) -> None:
    """Draw scenes into `output` as GRIT tars, with `names.json` and true masks beside them.

    Tars that are already there are kept, so that an interrupted run goes on where it was.

    Args:
        output: Folder to write to.
        config: What to draw.
        workers: Number of processes.

    Raises:
        ValueError: If the folder holds pictures drawn with other settings.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"names": NAMES, "held_out": HELD_OUT_NAMES}
    (folder / "names.json").write_text(json.dumps(names, indent=1))
    missing = list(_missing_shards(folder, config))
    total = sum(min(config.shard_size, config.samples - s * config.shard_size) for s in missing)
    with (
        ProcessPoolExecutor(workers, get_context("spawn")) as pool,
        tqdm(total=total, desc="scenes", unit="picture") as progress,
    ):
        for future in as_completed(pool.submit(_write_shard, folder, s, config) for s in missing):
            progress.update(future.result())
