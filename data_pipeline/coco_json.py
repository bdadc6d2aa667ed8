"""Finished shards as one COCO file, for tools that read nothing else."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from alpha_clip.regions import RegionSample
from data_pipeline.shards import read_manifests


def write_coco(shards: Path, name_of: Callable[[str], str], file: Path) -> int:
    """Write annotations with captions, images and categories; streamed, and whole or not at all.

    Args:
        shards: Folder of finished shards of ImageNet: a sample's key begins with its class.
        name_of: Gives a class, `n01440764`, its name.
        file: What to write.

    Returns:
        The number of annotations.

    Raises:
        OSError: If a shard is damaged, or the file can't be written.
    """
    temporary = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            images = list[dict[str, Any]]()
            numbers = dict[str, int]()
            out.write("{")
            count = _write_list(out, "annotations", _annotations(shards, numbers, images))
            out.write(", ")
            _write_list(out, "images", images)
            out.write(", ")
            categories = (
                {"id": number, "name": name_of(wnid), "synset": wnid}
                for wnid, number in numbers.items()
            )
            _write_list(out, "categories", categories)
            out.write("}\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write_list(out: TextIO, name: str, records: Iterable[dict[str, Any]]) -> int:
    out.write(f'"{name}": [')
    count = 0
    for record in records:
        out.write((",\n" if count else "\n") + json.dumps(record, sort_keys=True))
        count += 1
    out.write("]")
    return count


def _annotations(
    shards: Path, numbers: dict[str, int], images: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield annotations; images and classes are noted, for they are written behind them."""
    number = 0
    for sample in _samples(shards):
        size = {"width": sample.w, "height": sample.h}
        images.append({"id": len(images) + 1, "file_name": sample.id, **size})
        category = numbers.setdefault(f"n{sample.key[:8]}", len(numbers) + 1)
        for region in sample.regions:
            number += 1
            x1, y1, x2, y2 = region.box
            yield {
                "id": number,
                "image_id": len(images),
                "category_id": category,
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
