"""SAM 2, as transformers has it; the paper's own data were made with SAM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from data_pipeline.segmenters.promptable import Embedding, PromptableSegmenter

_DAMAGED = (
    *(OSError, RuntimeError, SafetensorError),
    *(ValueError, AttributeError, TypeError, LookupError, ArithmeticError),
)


@dataclass
class Sam2Segmenter(PromptableSegmenter):
    """Prompts SAM 2 with each box and takes its single mask.

    Where SAM 2 finds that mask unstable, it takes the best of its three others instead.

    Attributes:
        checkpoint: A folder, or a name on the Hugging Face hub such as
            `facebook/sam2.1-hiera-large`; safetensors only.
        device: Where to run it; `auto` takes a GPU if there is one.
        precision: Of the image encoder; `auto` is bf16 on GPUs that have it, else fp32. Boxes are
            always decoded in fp32.
        images_per_batch: Images encoded at a time; None is 8 on a GPU, else 1.
        boxes_per_batch: Boxes of an image decoded at a time; None is 32 on a GPU, else 1.
        compile: Whether to compile the image encoder; pays on long runs.
    """

    _processor: Any = field(default=None, init=False, repr=False, compare=False)

    def build(self) -> None:
        """Read SAM 2's checkpoint; see `PromptableSegmenter.build`."""
        try:
            from huggingface_hub.errors import StrictDataclassError
            from transformers import Sam2Model, Sam2Processor
        except ImportError as error:
            raise ValueError(
                "SAM 2 needs transformers 4.57 or newer: pip install 'alpha-clip[export]'"
            ) from error

        try:
            processor = Sam2Processor.from_pretrained(self.checkpoint)
            model, found = Sam2Model.from_pretrained(
                self.checkpoint,
                use_safetensors=True,  # never a pickle
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (*_DAMAGED, StrictDataclassError) as error:
            raise self._no_sam2(f"{type(error).__name__}: {error}") from error
        # transformers fills these with random numbers and goes on.
        if absent := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
            raise self._no_sam2(f"{len(absent)} of its weights are missing, such as {absent[0]}")
        self.use(model, processor)

    def use(self, model: nn.Module, processor: Any) -> None:
        """Take a SAM 2 that is built already, instead of loading one.

        Args:
            model: A `transformers.Sam2Model`; it is moved to the device and set to evaluation.
            processor: Its `transformers.Sam2Processor`.
        """
        self._processor = processor
        encoder: Any = model.vision_encoder
        self.take(model, encoder)

    def encode(self, images: list[NDArray[np.uint8]]) -> Embedding:
        """Embed images, at three sizes; see `PromptableSegmenter.encode`."""
        inputs = self._processor.image_processor(
            images=[rgb if rgb.flags.writeable else rgb.copy() for rgb in images],  # torch warns
            input_data_format="channels_last",
            return_tensors="pt",
        )
        pixels = inputs["pixel_values"].to(self._model.device)
        return tuple(self._model.get_image_embeddings(pixels))

    def decode(
        self, embedding: Embedding, boxes_xyxy_px: NDArray[np.float64], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "boxes 1 low_height low_width"], Float[Tensor, " boxes"]]:
        """Predict a mask for each box; see `PromptableSegmenter.decode`."""
        prompts = self._processor(
            input_boxes=[boxes_xyxy_px.tolist()], original_sizes=[list(size)], return_tensors="pt"
        )
        found = self._model(
            image_embeddings=list(embedding),
            input_boxes=prompts["input_boxes"].to(self._model.device),
            multimask_output=False,
        )
        return found.pred_masks[0], found.iou_scores[0, :, 0]

    def upscale(
        self, logits: Float[Tensor, "boxes 1 low_height low_width"], size: tuple[int, int]
    ) -> Float[Tensor, "boxes 1 height width"]:
        """Enlarge logits; see `PromptableSegmenter.upscale`."""
        enlarged: list[Tensor] = self._processor.post_process_masks(
            [logits], [size], binarize=False
        )
        return enlarged[0]

    def _no_sam2(self, why: str) -> ValueError:
        return ValueError(
            f"{self.checkpoint} does not hold SAM 2 for transformers ({why[:300]}); give a folder "
            "with its config and safetensors, or a name such as facebook/sam2.1-hiera-large"
        )
