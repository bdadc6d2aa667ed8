"""GrabCut inside each box: needs no weights, good where an object differs from what surrounds it.

Rother, Kolmogorov and Blake, "GrabCut", SIGGRAPH 2004, as OpenCV implements it. Meant for trying
the pipeline out and for tests; for training data take SAM.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from alpha_clip.regions import Box
from data_pipeline.segmenters.base import MaskPrediction, Segmenter


@dataclass(frozen=True)
class GrabCutSegmenter(Segmenter):
    """Separates each box's content from its surroundings by colour.

    Attributes:
        margin: Surroundings to learn the background from, as a share of the box's sides.
        max_side_px: Larger crops are made smaller for the cut; it bounds the time.
        iterations: GrabCut rounds.
        min_fill: Below this share of the box the cut has failed, and the box is used.
        max_fill: Above this share of the box it has, too.
    """

    margin: float = 0.35
    max_side_px: int = 256
    iterations: int = 4
    min_fill: float = 0.05
    max_fill: float = 0.95

    def segment(
        self, rgb: NDArray[np.uint8], boxes_xyxy_px: NDArray[np.float64]
    ) -> list[MaskPrediction]:
        """Cut the object out of every box; see `Segmenter.segment`."""
        cv2.setNumThreads(1)  # processes share the cores; threads in each would only fight
        return [MaskPrediction(self._cut(rgb, box)) for box in boxes_xyxy_px]

    def _cut(self, rgb: NDArray[np.uint8], box: NDArray[np.float64]) -> NDArray[np.bool_]:
        height, width = rgb.shape[:2]
        x1, y1, x2, y2 = Box(*(float(v) for v in box)).pixels(height, width)
        dx, dy = int(self.margin * (x2 - x1)) + 1, int(self.margin * (y2 - y1)) + 1
        left, top = max(x1 - dx, 0), max(y1 - dy, 0)
        crop = rgb[top : min(y2 + dy, height), left : min(x2 + dx, width)]
        scale = min(1.0, self.max_side_px / max(crop.shape[:2]))
        shape = [max(1, round(side * scale)) for side in (crop.shape[1], crop.shape[0])]
        small = cv2.resize(crop, shape, interpolation=cv2.INTER_AREA)
        hint = np.full(small.shape[:2], cv2.GC_BGD, np.uint8)
        inner = [round(v * scale) for v in (x1 - left, y1 - top, x2 - left, y2 - top)]
        hint[inner[1] : inner[3], inner[0] : inner[2]] = cv2.GC_PR_FGD
        mask = np.zeros((height, width), bool)
        found = self._grabcut(small, hint)
        if found is not None:
            size = (crop.shape[1], crop.shape[0])
            full = cv2.resize(found, size, interpolation=cv2.INTER_LINEAR) > 0.5
            mask[top : top + size[1], left : left + size[0]] = full
            mask[:y1] = mask[y2:] = False
            mask[:, :x1] = mask[:, x2:] = False
        fill = mask.sum() / ((x2 - x1) * (y2 - y1))
        if not self.min_fill <= fill <= self.max_fill:
            mask[y1:y2, x1:x2] = True
        return mask

    def _grabcut(
        self, small: NDArray[np.uint8], hint: NDArray[np.uint8]
    ) -> NDArray[np.float32] | None:
        """Return the foreground as 0/1 floats; `None` where there is nothing to learn from."""
        inside = int((hint == cv2.GC_PR_FGD).sum())
        if inside < 16 or hint.size - inside < 16:
            return None
        cv2.setRNGSeed(0)  # its k-means starts at random
        background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
        mode = cv2.GC_INIT_WITH_MASK
        try:
            cv2.grabCut(small, hint, None, background, foreground, self.iterations, mode)
        except cv2.error:  # a flat colour leaves its Gaussians without a spread
            return None
        return np.isin(hint, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.float32)
