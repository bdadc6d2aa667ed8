"""SAM 2's automatic masks: everything that a grid of points finds in a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from alpha_clip.regions import SampleError, decode_rle, encode_rle
from data_pipeline.segmenters.base import MaskPrediction
from data_pipeline.segmenters.promptable import Embedding, attempt, stability_score
from data_pipeline.segmenters.sam2 import Sam2Segmenter

_UPSCALED_PX = 2**25  # of masks at the photograph's size held at a time (128 MiB of fp32)


@dataclass
class Sam2Everything(Sam2Segmenter):
    """Prompts SAM 2 with a grid of points and keeps good masks, each once.

    Each point gives three masks, as in segment-anything's automatic mask generator: of a part, of
    its object and of more. Of masks whose boxes are nearly the same, the one with the best expected
    IoU stays. On square pictures the masks are those of transformers' `MaskGenerationPipeline`; on
    others that one (of transformers 5.23) takes the grid for one of SAM, which pads pictures.

    Attributes:
        checkpoint: As of `Sam2Segmenter`.
        device: Where to run it; `auto` takes a GPU if there is one.
        precision: Of the image encoder; `auto` is bf16 on GPUs that have it, else fp32. Points are
            always decoded in fp32.
        images_per_batch: As of `Sam2Segmenter`.
        boxes_per_batch: As of `Sam2Segmenter`.
        compile: Whether to compile the image encoder; pays on long runs.
        points_per_side: Points of the grid on each side; the paper's ImageNet masks took 16.
        points_per_batch: Points decoded at a time.
        min_iou: Only masks of which SAM 2 expects a greater IoU are kept.
        min_stability: Least stability score of a mask.
        max_box_iou: Most IoU of the boxes of two masks; the better one is kept.

    Raises:
        ValueError: If there are no points, or a batch is smaller than 1.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    min_iou: float = 0.88
    min_stability: float = 0.95
    max_box_iou: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("points_per_side", "points_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def segment_everything(self, rgb: NDArray[np.uint8]) -> list[MaskPrediction]:
        """Segment all that there is.

        Args:
            rgb: Image `[H, W, 3]`.

        Returns:
            The masks, the one of the best expected IoU first; none may be good enough.

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
        from torchvision.ops import batched_nms

        size = (rgb.shape[0], rgb.shape[1])
        (embedding,) = self._embed([rgb])
        if isinstance(embedding, SampleError):
            raise embedding
        points = _grid(self.points_per_side, size)
        found = [
            mask
            for start in range(0, len(points), self.points_per_batch)
            for mask in self._find(embedding, points[start : start + self.points_per_batch], size)
        ]
        if not found:
            return []
        boxes = torch.stack([mask.box_xyxy_px for mask in found])
        ious = torch.tensor([mask.iou for mask in found])
        kept = batched_nms(boxes, ious, torch.zeros(len(found)), self.max_box_iou)
        return [found[i].prediction() for i in kept.tolist()]

    def _find(
        self, embedding: Embedding, points_px: NDArray[np.float64], size: tuple[int, int]
    ) -> Iterator[_Found]:
        """Yield the good masks at some points `[N, 2]`, in their order."""
        from torchvision.ops import masks_to_boxes

        logits, ious = self._decode_points(embedding, points_px, size)
        logits, ious = logits[ious > self.min_iou], ious[ious > self.min_iou]
        at_once = max(1, _UPSCALED_PX // (size[0] * size[1]))
        for start in range(0, len(ious), at_once):
            some = slice(start, start + at_once)
            full = self.upscale(logits[some, None], size)[:, 0]
            masks, stability = full > 0, stability_score(full)
            good = (stability >= self.min_stability) & masks.flatten(1).any(1)
            masks = masks[good]
            if len(masks):
                rows = zip(
                    masks.cpu().numpy(),
                    masks_to_boxes(masks).cpu(),  # to the last pixel, not behind it, as SAM's
                    ious[some][good].tolist(),
                    stability[good].tolist(),
                    strict=True,
                )
                yield from (_Found(encode_rle(mask), *rest) for mask, *rest in rows)

    def _decode_points(
        self, embedding: Embedding, points_px: NDArray[np.float64], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "masks low_height low_width"], Float[Tensor, " masks"]]:
        """Predict three masks for each point: small logits, and their IoU."""
        prompts = self._processor(
            input_points=[points_px[:, None].tolist()],
            original_sizes=[list(size)],
            return_tensors="pt",
        )
        found = self._model(
            image_embeddings=list(embedding),
            input_points=prompts["input_points"].to(self._model.device),
            multimask_output=True,
        )
        logits, ious = found.pred_masks[0].flatten(0, 1), found.iou_scores[0].flatten()
        if not (ious.isfinite().all() and logits.isfinite().all()):
            raise SampleError(
                "segmenter_not_finite", "a mask or its IoU holds numbers that are not finite"
            )
        return logits, ious


@dataclass(frozen=True)
class _Found:
    """A mask that is good enough; as RLE, since a grid may find a thousand before any goes."""

    rle: dict[str, Any]
    box_xyxy_px: Tensor
    iou: float
    stability: float

    def prediction(self) -> MaskPrediction:
        return MaskPrediction(decode_rle(self.rle), self.iou, self.stability)


def _grid(per_side: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return the centres `[N, 2]` of equal cells of an image, as x and y, row by row."""
    steps = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(steps * size[1], steps * size[0])
    return np.stack([x, y], -1).reshape(-1, 2)
