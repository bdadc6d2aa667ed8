"""What a segmenter is: an image and boxes in, one mask a box out."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alpha_clip.regions import SampleError
from data_pipeline.plugin import Plugin


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


class Segmenter(Plugin):
    """Makes a mask for each box. See `Plugin` for what subclasses are."""

    def batch_size(self) -> int:
        """Return how many images `segment_batch` should be given at a time."""
        return 1

    @abstractmethod
    def segment(
        self, rgb: NDArray[np.uint8], boxes_xyxy_px: NDArray[np.float64]
    ) -> list[MaskPrediction]:
        """Make one mask a box.

        Args:
            rgb: Image `[H, W, 3]`.
            boxes_xyxy_px: Boxes `[N, 4]`, inside the image, at least one.

        Returns:
            One prediction a box, in order.
        """

    def segment_batch(
        self, images: list[NDArray[np.uint8]], boxes_xyxy_px: list[NDArray[np.float64]]
    ) -> list[list[MaskPrediction] | SampleError]:
        """Segment several images; those that fail do not touch the others.

        Args:
            images: Images `[H, W, 3]`, of any sizes.
            boxes_xyxy_px: Boxes `[N, 4]` of each of them.

        Returns:
            For each image its predictions, or why there are none (`segmenter_failed`).

        Raises:
            RuntimeError: If the device itself is broken; nothing after that could be trusted.
        """
        results: list[list[MaskPrediction] | SampleError] = []
        for rgb, boxes in zip(images, boxes_xyxy_px, strict=True):
            try:
                results.append(self.segment(rgb, boxes))
            except SampleError as error:
                results.append(error)
            except (RuntimeError, ValueError, ArithmeticError, LookupError) as error:
                if is_device_failure(error):
                    raise
                results.append(SampleError("segmenter_failed", f"{type(error).__name__}: {error}"))
        return results


def is_device_failure(error: Exception) -> bool:
    """Whether an error means that the device is broken, rather than that one image is bad.

    Out of memory is no such failure: the next image may fit.
    """
    kind = type(error).__name__
    return kind == "AcceleratorError" or "CUDA error" in str(error) or "cuDNN error" in str(error)
