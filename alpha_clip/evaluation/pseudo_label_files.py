"""Labels of regions as files that detectors are trained and measured with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from alpha_clip.evaluation.annotations import box_of, open_picture
from alpha_clip.evaluation.proposals import image_file, image_size
from alpha_clip.regions import (
    Box,
    Region,
    decode_rle,
    encode_rle,
    region_to_alpha,
    rle_area,
    upright_size,
)
from alpha_clip.visualize import Tile, contact_sheet, overlay_region

_EXAMPLES = 24


def write_labels(
    labels: list[dict[str, Any]],
    images: Mapping[Any, dict[str, Any]],
    categories: list[dict[str, Any]],
    folder: Path,
    file: Path,
) -> None:
    """Write labels as COCO's results and as a data set of COCO's (or LVIS's) format.

    Masks are RLE, as `pycocotools` wants them of results; the data set has the images that have a
    label, with all that the source says of them.

    Args:
        labels: `image_id`, `category_id`, `score`, and `bbox` or `segmentation` or both.
        images: The images by id.
        categories: All names, also those that no region got.
        folder: Of the pictures.
        file: `NAME.json`, for `NAME.detections.json` and `NAME.instances.json`.
    """
    found = [_result(label, images[label["image_id"]], folder) for label in labels]
    file.with_suffix(".detections.json").write_text(json.dumps(found))
    annotations = [
        {"id": number, "iscrowd": 0, **result, "area": _area(result)}
        for number, result in enumerate(found, 1)
    ]
    shown = dict.fromkeys(result["image_id"] for result in found)
    record = {
        "images": [images[key] for key in shown],
        "annotations": annotations,
        "categories": categories,
    }
    file.with_suffix(".instances.json").write_text(json.dumps(record))


def draw_labels(
    labels: list[dict[str, Any]],
    images: Mapping[Any, dict[str, Any]],
    categories: list[dict[str, Any]],
    folder: Path,
    file: Path,
) -> None:
    """Draw some labels, from the surest to the least sure; nothing if there is none.

    Args:
        labels: As of `write_labels`.
        images: As of `write_labels`.
        categories: As of `write_labels`.
        folder: Of the pictures.
        file: `NAME.json`, for `NAME.examples.png`.
    """
    if not labels:
        return
    names = {category["id"]: category["name"] for category in categories}
    order = np.argsort([-label["score"] for label in labels], kind="stable")
    places = np.linspace(0, len(labels) - 1, _EXAMPLES).round().astype(int)
    tiles = []
    for row in dict.fromkeys(order[places].tolist()):
        label = labels[row]
        picture = images[label["image_id"]]
        image = open_picture(image_file(folder, picture), image_size(picture))
        region = label.get("segmentation") or box_of(label["bbox"])
        mask = region_to_alpha(region, image.height, image.width) > 127
        text = f"{names[label['category_id']]} {label['score']:.2f}"
        tiles.append(Tile(overlay_region(image, mask), text))
    contact_sheet(tiles).save(file.with_suffix(".examples.png"))


def _result(label: dict[str, Any], picture: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return an entry of COCO's results, its mask as RLE, its box from it if there is none."""
    result = {name: label[name] for name in ("image_id", "category_id", "score")}
    rle = _rle(label.get("segmentation") or None, picture, folder)
    if rle is None:
        return {**result, "bbox": label["bbox"]}
    box = label.get("bbox") or coco_mask.toBbox(rle).tolist()
    return {**result, "bbox": box, "segmentation": rle}


def _rle(region: Region, picture: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    if region is None:
        return None
    if isinstance(region, Mapping):
        return encode_rle(decode_rle(region))
    size = image_size(picture) or upright_size(image_file(folder, picture).read_bytes())
    width, height = size
    return encode_rle(region_to_alpha(region, height, width) > 127)


def _area(result: dict[str, Any]) -> float:
    if "segmentation" in result:
        return float(rle_area(result["segmentation"]))
    box = box_of(result["bbox"]) or Box(0, 0, 1, 1)
    return (box.x2 - box.x1) * (box.y2 - box.y1)
