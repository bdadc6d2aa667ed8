"""What a segmenter is: an image and boxes in, one mask a box out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MaskPrediction:
    """A mask `[H, W]` of an image and what its maker thinks of it.

    Attributes:
        mask: True inside the object; may be empty.
        iou: The segmenter's estimate of the IoU with the object, or `None` if it has none.
        stability: The segmenter's stability score, or `None` if it has none.
    """

    mask: NDArray[np.bool_]
    iou: float | None = None
    stability: float | None = None


class Segmenter(ABC):
    """Makes a mask for each box.

    Subclasses are dataclasses: their fields are the settings that the config hash covers, and they
    must be cheap to build and to pickle. Heavy weights are loaded by `load`, once a process.
    """

    def load(self) -> None:  # noqa: B027 - most segmenters have nothing to load
        """Load weights; called before any work.

        Raises:
            ValueError: If they are missing or damaged.
        """

    @abstractmethod
    def segment(
        self, rgb: NDArray[np.uint8], boxes_xyxy_px: NDArray[np.float64]
    ) -> list[MaskPrediction]:
        """Make one mask a box.

        Args:
            rgb: Image `[H, W, 3]`.
            boxes_xyxy_px: Boxes `[N, 4]`, inside the image.

        Returns:
            One prediction a box, in order.
        """
