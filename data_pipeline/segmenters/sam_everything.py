"""Segment Anything's automatic masks: everything that a grid of points finds in a picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alpha_clip.regions import SampleError
from data_pipeline.segmenters.base import MaskPrediction
from data_pipeline.segmenters.promptable import STABILITY_OFFSET, attempt
from data_pipeline.segmenters.sam import SamSegmenter


@dataclass
class SamEverything(SamSegmenter):
    """Prompts SAM with a grid of points and keeps good masks, each once.

    The masks are those of segment-anything's `SamAutomaticMaskGenerator`; its defaults are these.

    Attributes:
        checkpoint: SAM's weights, such as `sam_vit_h_4b8939.pth`; .pth or .safetensors.
        model_type: The size that the weights are of; `auto` sees it in them.
        device: Where to run it; `auto` takes a GPU if there is one.
        precision: Of the image encoder; `auto` is bf16 on GPUs that have it, else fp32. Points are
            always decoded in fp32.
        images_per_batch: As of `SamSegmenter`.
        boxes_per_batch: As of `SamSegmenter`.
        compile: Whether to compile the image encoder; pays on long runs.
        points_per_side: Points of the grid on each side; the paper's ImageNet masks took 16.
        points_per_batch: Points decoded at a time.
        min_iou: Least IoU that SAM expects of a mask.
        min_stability: Least stability score of a mask.
        max_box_iou: Most IoU of the boxes of two masks; the better one is kept.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    min_iou: float = 0.88
    min_stability: float = 0.95
    max_box_iou: float = 0.7

    def segment_everything(self, rgb: NDArray[np.uint8]) -> list[MaskPrediction]:
        """Segment all that there is.

        Args:
            rgb: Image `[H, W, 3]`.

        Returns:
            The masks, in no particular order; none may be good enough.

        Raises:
            SampleError: If the image can't be segmented; see `PromptableSegmenter.segment`.
        """
        if self._model is None:
            self.load()
        result = attempt(partial(self._segment_everything, rgb))
        if isinstance(result, SampleError):
            raise result
        return result

    @torch.inference_mode()
    def _segment_everything(self, rgb: NDArray[np.uint8]) -> list[MaskPrediction]:
        from segment_anything import SamAutomaticMaskGenerator, SamPredictor

        segmenter = self

        class Embedded(SamPredictor):  # type: ignore[misc]  # an untyped package's
            """Embeds with this segmenter's precision."""

            def set_image(self, image: NDArray[np.uint8], image_format: str = "RGB") -> None:
                self.reset_image()
                (embedding,) = segmenter._embed([image])
                if isinstance(embedding, SampleError):
                    raise embedding
                (self.features,) = embedding
                self.original_size = image.shape[:2]
                self.input_size = self.transform.get_preprocess_shape(
                    *self.original_size, self.transform.target_length
                )
                self.is_image_set = True

        generator: Any = SamAutomaticMaskGenerator(
            self._model,
            points_per_side=self.points_per_side,
            points_per_batch=self.points_per_batch,
            pred_iou_thresh=self.min_iou,
            stability_score_thresh=self.min_stability,
            stability_score_offset=STABILITY_OFFSET,
            box_nms_thresh=self.max_box_iou,
        )
        generator.predictor = Embedded(self._model)
        found = [
            (f["segmentation"], f["predicted_iou"], f["stability_score"])
            for f in generator.generate(rgb)
        ]
        return [MaskPrediction(mask, float(iou), float(stable)) for mask, iou, stable in found]
