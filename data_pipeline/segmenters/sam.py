"""Segment Anything: the masks that the paper's data were made with (ViT-H, one mask a box)."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.segmenters.promptable import Embedding, PromptableSegmenter
from data_pipeline.segmenters.sam_attention import use_fused_attention

_PATCHES = "image_encoder.patch_embed.proj.weight"
_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_DAMAGED = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, OSError, SafetensorError),
    *(ValueError, AttributeError, TypeError, LookupError),
)


@dataclass
class SamSegmenter(PromptableSegmenter):
    """Prompts SAM with each box and takes its single mask, as the paper did.

    The numbers are those of segment-anything's own `SamPredictor`, without its state.

    Attributes:
        checkpoint: SAM's weights, such as `sam_vit_h_4b8939.pth`; .pth or .safetensors.
        model_type: The size that the weights are of; `auto` sees it in them.
        device: Where to run it; `auto` takes a GPU if there is one.
        precision: Of the image encoder; `auto` is bf16 on GPUs that have it, else fp32. Boxes are
            always decoded in fp32.
        images_per_batch: Images encoded at a time; None is 8 on a GPU, else 1.
        boxes_per_batch: Boxes of an image decoded at a time; None is 32 on a GPU, else 1: a CPU
            is faster one by one.
        compile: Whether to compile the image encoder; pays on long runs.
    """

    model_type: Literal["auto", "vit_b", "vit_l", "vit_h"] = "auto"
    _resize: Any = field(default=None, init=False, repr=False, compare=False)

    def build(self) -> None:
        """Read SAM's checkpoint; see `PromptableSegmenter.build`."""
        try:
            from segment_anything import sam_model_registry
        except ImportError as error:
            raise ValueError("SAM needs its package: pip install 'alpha-clip[data]'") from error

        weights = _read_tensors(self.checkpoint)
        model_type = self._recognise(weights)
        sam = sam_model_registry[model_type]()
        try:
            sam.load_state_dict(weights)
        except RuntimeError as error:
            raise _no_sam(self.checkpoint, f"as {model_type}, {error}") from error
        self.use(sam)

    def use(self, sam: nn.Module) -> None:
        """Take a SAM that is built already, instead of loading one.

        Args:
            sam: segment-anything's `Sam`. It is changed: moved to the device, set to evaluation,
                and the attention of its image encoder replaced by an equal, faster one.
        """
        from segment_anything.utils.transforms import ResizeLongestSide

        encoder: Any = sam.image_encoder
        use_fused_attention(encoder)
        self._resize = ResizeLongestSide(encoder.img_size)
        self.take(sam, encoder)

    def encode(self, images: list[NDArray[np.uint8]]) -> Embedding:
        """Embed images; see `PromptableSegmenter.encode`."""
        sam = self._model
        inputs = []
        for rgb in images:
            pixels = torch.as_tensor(self._resize.apply_image(rgb), device=sam.device)
            inputs.append(sam.preprocess(pixels.permute(2, 0, 1).contiguous()))
        return (sam.image_encoder(torch.stack(inputs)),)

    def decode(
        self, embedding: Embedding, boxes_xyxy_px: NDArray[np.float64], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "boxes 1 low_height low_width"], Float[Tensor, " boxes"]]:
        """Predict a mask for each box; see `PromptableSegmenter.decode`."""
        sam = self._model
        boxes = torch.as_tensor(
            self._resize.apply_boxes(boxes_xyxy_px, size), dtype=torch.float32, device=sam.device
        )
        sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
        logits, ious = sam.mask_decoder(
            image_embeddings=embedding[0],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return logits, ious[:, 0]

    def upscale(
        self, logits: Float[Tensor, "boxes 1 low_height low_width"], size: tuple[int, int]
    ) -> Float[Tensor, "boxes 1 height width"]:
        """Enlarge logits and cut off what was padded; see `PromptableSegmenter.upscale`."""
        resized = self._resize.get_preprocess_shape(*size, self._resize.target_length)
        enlarged: Tensor = self._model.postprocess_masks(logits, resized, size)
        return enlarged

    def _recognise(self, weights: dict[str, Tensor]) -> str:
        """Return the model type of weights, which must be the one stated."""
        if _PATCHES not in weights:
            raise _no_sam(self.checkpoint, f"{_PATCHES} is missing")
        width = weights[_PATCHES].shape[0]
        found = _WIDTHS.get(width)
        if found is None and self.model_type == "auto":
            raise _no_sam(self.checkpoint, f"the encoder's width is {width}, not one of {_WIDTHS}")
        if found is not None and self.model_type not in ("auto", found):
            raise ValueError(
                f"{self.checkpoint} holds weights of SAM {found}, but model_type is "
                f"{self.model_type}; leave it out, or give the other checkpoint"
            )
        return found or self.model_type


def _read_tensors(path: str) -> dict[str, Tensor]:
    """Read a file of tensors, .pth or .safetensors; nothing else is unpickled."""
    if not Path(path).is_file():
        raise ValueError(
            f"SAM's checkpoint {path!r} does not exist; download it from the segment-anything "
            "repository"
        )
    try:
        with open(path, "rb") as stream:
            head = stream.read(9)
        if head[8:] == b"{":  # safetensors: the length of a JSON header, then the header
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise _no_sam(path, f"{type(error).__name__}: {error}") from error
    if not (isinstance(weights, dict) and all(isinstance(w, Tensor) for w in weights.values())):
        raise _no_sam(path, f"expected a dict of tensors, got {type(weights).__name__}")
    return weights


def _no_sam(path: str, why: str) -> ValueError:
    return ValueError(
        f"{path} does not hold weights of SAM ({why[:300]}); download them from the "
        "segment-anything repository, and compare the size with the original"
    )
