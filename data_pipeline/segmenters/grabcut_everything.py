"""Candidates without weights: GrabCut in boxes of several sizes and places.

Meant for trying the pipeline out and for tests. It finds objects that differ in colour from what
surrounds them and fill a good part of the picture; for training data take SAM.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.segmenters.base import MaskPrediction
from data_pipeline.segmenters.grabcut import GrabCutSegmenter

# Shares of the picture's sides: the largest objects, those of half the size, in five places.
_BOXES = (
    (0.04, 0.04, 0.96, 0.96),
    (0.15, 0.15, 0.85, 0.85),
    (0.28, 0.28, 0.72, 0.72),
    (0.02, 0.15, 0.55, 0.85),
    (0.45, 0.15, 0.98, 0.85),
    (0.15, 0.02, 0.85, 0.55),
    (0.15, 0.45, 0.85, 0.98),
)


@dataclass(frozen=True)
class GrabCutEverything(GrabCutSegmenter):
    """Cuts objects out of boxes all over the picture, and keeps each once.

    Attributes:
        margin: As of `GrabCutSegmenter`.
        max_side_px: As of `GrabCutSegmenter`.
        iterations: As of `GrabCutSegmenter`.
        min_fill: Below this share of its box a cut has failed, and is left out.
        max_fill: Above this share of its box it has, too.
        max_mask_iou: Most IoU of two masks; the one that was cut first is kept.
    """

    margin: float = 0.1
    max_side_px: int = 256
    iterations: int = 3
    min_fill: float = 0.1
    max_fill: float = 0.9
    max_mask_iou: float = 0.7

    def segment_everything(self, rgb: NDArray[np.uint8]) -> list[MaskPrediction]:
        """Segment what there is.

        Args:
            rgb: Image `[H, W, 3]`.

        Returns:
            The masks; none, where nothing differs from its surroundings.
        """
        height, width = rgb.shape[:2]
        boxes = np.array(_BOXES) * [width, height, width, height]
        kept: list[MaskPrediction] = []
        for box, found in zip(boxes, self.segment(rgb, boxes), strict=True):
            area = np.count_nonzero(found.mask)
            whole = (box[2] - box[0]) * (box[3] - box[1])
            # What fills its box is the box: GrabCut gives that where it has not found anything.
            if not self.min_fill * whole <= area <= self.max_fill * whole:
                continue
            if all(_iou(found.mask, other.mask) <= self.max_mask_iou for other in kept):
                kept.append(found)
        return kept


def _iou(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    union = int(np.count_nonzero(mask | other))
    return int(np.count_nonzero(mask & other)) / max(union, 1)
