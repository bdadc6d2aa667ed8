"""True masks to hold made ones against: COCO instances JSON, or the scenes' `.masks.jsonl`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpha_clip.regions import RegionAnnotation, RegionSample, region_to_alpha

_SAME_BOX = 0.9  # IoU above which a phrase's box and an annotation's are one


@dataclass(frozen=True)
class TrueMask:
    """A mask that somebody vouches for: its box in pixels, and COCO polygons or RLE."""

    box_xyxy_px: tuple[float, float, float, float]
    segmentation: Any


class TrueMasks:
    """Finds the true mask of a region by its image's id and its box.

    Args:
        by_image: Image id -> its masks.
    """

    def __init__(self, by_image: dict[str, list[TrueMask]]) -> None:
        self.by_image = by_image

    @classmethod
    def read(cls, pattern: str) -> TrueMasks:
        """Read `instances.json` files of COCO, or `NNNNN.masks.jsonl` files of scenes.

        Raises:
            ValueError: If the pattern matches nothing, or a file is neither.
        """
        files = sorted(glob(pattern))
        if not files:
            raise ValueError(
                f"no file matches {pattern!r}; give a COCO JSON or '.../*.masks.jsonl'"
            )
        by_image: dict[str, list[TrueMask]] = {}
        for file in files:
            read = _read_scenes if file.endswith(".jsonl") else _read_coco
            try:
                by_image.update(read(Path(file)))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{file} is neither COCO instances nor true masks of scenes: {error!r}"
                ) from error
        return cls(by_image)

    def find(self, sample: RegionSample, region: RegionAnnotation) -> NDArray[np.bool_] | None:
        """Return the true mask `[H, W]` of a region, or `None` if nobody gave one.

        Raises:
            ValueError: If the mask that is there does not fit the image.
        """
        candidates = self.by_image.get(sample.id, [])
        best = max(candidates, key=lambda m: box_iou(m.box_xyxy_px, region.box), default=None)
        if best is None or box_iou(best.box_xyxy_px, region.box) < _SAME_BOX:
            return None
        return region_to_alpha(best.segmentation, sample.h, sample.w) > 127


def box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return the intersection over union of two boxes `(x1, y1, x2, y2)`."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both) if both else 0.0


def mask_iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Return the intersection over union of two masks of one size."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0


def _read_coco(file: Path) -> dict[str, list[TrueMask]]:
    by_image: dict[str, list[TrueMask]] = {}
    for annotation in json.loads(file.read_text())["annotations"]:
        x, y, width, height = (float(v) for v in annotation["bbox"])
        mask = TrueMask((x, y, x + width, y + height), annotation["segmentation"])
        by_image.setdefault(str(annotation["image_id"]), []).append(mask)
    return by_image


def _read_scenes(file: Path) -> dict[str, list[TrueMask]]:
    by_image = {}
    for line in file.read_text().splitlines():
        record = json.loads(line)
        masks = []
        for mask in record["masks"]:
            height, width = mask["rle"]["size"]
            x1, y1, x2, y2 = mask["box"]
            masks.append(TrueMask((x1 * width, y1 * height, x2 * width, y2 * height), mask["rle"]))
        by_image[str(int(record["key"]))] = masks
    return by_image
