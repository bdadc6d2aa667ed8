"""Finished shards as one COCO file, for tools that read nothing else."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from alpha_clip.regions import RegionSample
from data_pipeline.shards import read_manifests


def write_coco(shards: Path, classes: Mapping[str, str], file: Path) -> int:
    """Write images, annotations with captions, and categories; streamed, and whole or not at all.

    Args:
        shards: Folder of finished shards of ImageNet: a sample's key begins with its class.
        classes: Class, `n01440764` -> its name.
        file: What to write.

    Returns:
        The number of annotations.

    Raises:
        OSError: If a shard is damaged, or the file can't be written.
    """
    numbers = {wnid: number for number, wnid in enumerate(sorted(classes), 1)}
    categories = [{"id": numbers[w], "name": classes[w], "synset": w} for w in sorted(classes)]
    temporary = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            out.write('{"categories": ' + json.dumps(categories))
            images = list[dict[str, Any]]()
            count = _write_list(out, "annotations", _annotations(shards, numbers, images))
            _write_list(out, "images", iter(images))
            out.write("}\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write_list(out: TextIO, name: str, records: Iterator[dict[str, Any]]) -> int:
    out.write(f', "{name}": [')
    count = 0
    for record in records:
        out.write((",\n" if count else "\n") + json.dumps(record, sort_keys=True))
        count += 1
    out.write("]")
    return count


def _annotations(
    shards: Path, numbers: dict[str, int], images: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield annotations; their images are noted, for they are written behind them."""
    number = 0
    for sample in _samples(shards):
        size = {"width": sample.w, "height": sample.h}
        images.append({"id": len(images) + 1, "file_name": sample.id, **size})
        for region in sample.regions:
            number += 1
            x1, y1, x2, y2 = region.box
            yield {
                "id": number,
                "image_id": len(images),
                "category_id": numbers[f"n{sample.key[:8]}"],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": region.area,
                "segmentation": dict(region.rle),
                "iscrowd": 0,
                "caption": region.text,
                "score": region.score,
            }


def _samples(shards: Path) -> Iterator[RegionSample]:
    for _, manifest in sorted(read_manifests(shards).items()):
        yield from manifest.read(shards)
