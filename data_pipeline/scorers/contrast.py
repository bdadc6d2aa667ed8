"""A score without weights: how much a candidate stands out, and how central it is.

Meant for trying the pipeline out and for tests. It knows nothing of the class: it prefers what
photographs of one thing tend to show in their middle. For training data take CLIP.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.scorers.base import Scorer

_SIDE = 96  # pixels of the longer side that are looked at
_BINS = 8


@dataclass(frozen=True)
class ContrastScorer(Scorer):
    """Compares colours inside with those around; 0..1."""

    def score(
        self, rgb: NDArray[np.uint8], masks: list[NDArray[np.bool_]], class_name: str
    ) -> list[float]:
        """Score the candidates of a picture; see `Scorer.score`."""
        height, width = rgb.shape[:2]
        scale = min(1.0, _SIDE / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
        lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB) // (256 // _BINS)
        colours = (lab[..., 0].astype(int) * _BINS + lab[..., 1]) * _BINS + lab[..., 2]
        y, x = np.mgrid[0 : size[1], 0 : size[0]]
        off_centre = np.hypot((x + 0.5) / size[0] - 0.5, (y + 0.5) / size[1] - 0.5)
        return [self._score(_shrink(mask, size), colours, off_centre) for mask in masks]

    def _score(
        self, mask: NDArray[np.bool_], colours: NDArray[np.int_], off_centre: NDArray[np.float64]
    ) -> float:
        if mask.all():
            return 0.0
        reach = max(2, round(0.15 * np.sqrt(mask.sum())))
        around = cv2.dilate(mask.view(np.uint8), np.ones((2 * reach + 1,) * 2)) > mask
        inside, outside = _histogram(colours[mask]), _histogram(colours[around])
        contrast = float(np.abs(inside - outside).sum() / 2)
        centrality = float(1 - off_centre[mask].mean() / np.hypot(0.5, 0.5))
        return contrast * centrality


def _shrink(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Shrink a mask so that something of it stays."""
    share = cv2.resize(mask * np.uint8(255), size, interpolation=cv2.INTER_AREA)
    kept: NDArray[np.bool_] = share >= min(128, max(int(share.max()), 1))
    return kept


def _histogram(colours: NDArray[np.int_]) -> NDArray[np.float64]:
    counts = np.bincount(colours, minlength=_BINS**3).astype(float)
    shares: NDArray[np.float64] = counts / max(counts.sum(), 1)
    return shares
