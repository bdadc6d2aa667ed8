"""The box itself as a mask: the baseline that any segmenter has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alpha_clip.regions import Box
from data_pipeline.segmenters.base import MaskPrediction, Segmenter


@dataclass(frozen=True)
class BoxSegmenter(Segmenter):
    """Fills every box."""

    def segment(
        self, rgb: NDArray[np.uint8], boxes_xyxy_px: NDArray[np.float64]
    ) -> list[MaskPrediction]:
        """Fill every box; see `Segmenter.segment`."""
        predictions = []
        for box in boxes_xyxy_px:
            mask = np.zeros(rgb.shape[:2], bool)
            x1, y1, x2, y2 = Box(*(float(v) for v in box)).pixels(*rgb.shape[:2])
            mask[y1:y2, x1:x2] = True
            predictions.append(MaskPrediction(mask))
        return predictions
