"""Segment Anything: the masks that the paper's data were made with (ViT-H, one mask a box)."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.segmenters.base import MaskPrediction, Segmenter


@dataclass
class SamSegmenter(Segmenter):
    """Prompts SAM with each box and takes its single mask.

    Attributes:
        checkpoint: SAM's weights, such as `sam_vit_h_4b8939.pth`.
        model_type: The size that the weights are of.
        device: Where to run it; `auto` takes a GPU if there is one.
        boxes_per_batch: Boxes decoded at a time. On a CPU one by one is fastest.
    """

    checkpoint: str
    model_type: Literal["vit_b", "vit_l", "vit_h"] = "vit_h"
    device: str = "auto"
    boxes_per_batch: int = 1
    _predictor: Any = field(default=None, init=False, repr=False, compare=False)

    def load(self) -> None:
        """Load SAM; see `Segmenter.load`."""
        from segment_anything import sam_model_registry

        if not Path(self.checkpoint).is_file():
            raise ValueError(
                f"SAM's checkpoint {self.checkpoint!r} does not exist; download it from the "
                "segment-anything repository"
            )
        try:
            # The package's own loader unpickles; only tensors are let through here.
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            sam = sam_model_registry[self.model_type]()
            sam.load_state_dict(state)
        except (
            RuntimeError,
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            TypeError,
            LookupError,
        ) as error:
            raise ValueError(
                f"{self.checkpoint} does not hold weights of SAM {self.model_type}: "
                f"{str(error)[:300]}"
            ) from error
        self.use(sam)

    def use(self, sam: torch.nn.Module) -> None:
        """Take a SAM that is built already, instead of loading one."""
        from segment_anything import SamPredictor

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._predictor = SamPredictor(sam.to(device).eval())

    def segment(
        self, rgb: NDArray[np.uint8], boxes_xyxy_px: NDArray[np.float64]
    ) -> list[MaskPrediction]:
        """Segment every box; see `Segmenter.segment`."""
        if self._predictor is None:
            self.load()
        predictor = self._predictor
        # A set_image that raises would leave the previous image's embedding in place.
        predictor.reset_image()
        predictor.set_image(rgb)
        boxes = torch.as_tensor(boxes_xyxy_px, dtype=torch.float32, device=predictor.device)
        boxes = predictor.transform.apply_boxes_torch(boxes, rgb.shape[:2])
        predictions = []
        for chunk in boxes.split(self.boxes_per_batch):
            masks, ious, _ = predictor.predict_torch(None, None, chunk, multimask_output=False)
            for mask, iou in zip(masks[:, 0].cpu().numpy(), ious[:, 0].tolist(), strict=True):
                predictions.append(MaskPrediction(mask, iou=float(iou)))
        return predictions
