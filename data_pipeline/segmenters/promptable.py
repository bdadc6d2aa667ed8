"""Segmenters prompted with boxes: images are embedded in batches, boxes decoded in chunks.

What SAM and SAM 2 share: an image is embedded once for all its boxes; a failure costs only the
image that caused it; no state is kept from one image to the next, so none can get another's masks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from alpha_clip.regions import SampleError
from data_pipeline.segmenters.base import MaskPrediction, Segmenter, is_device_failure
from data_pipeline.segmenters.fingerprint import fingerprint

Embedding: TypeAlias = tuple[Tensor, ...]
"""What decoding needs of one image: tensors whose first dimension is 1."""

STABILITY_OFFSET = 1.0  # as in segment-anything's automatic mask generator
# Masks are enlarged to the photograph's size this many pixels at a time: 128 MiB of fp32 on a GPU;
# on a CPU 8 MiB, which stay near its cache: 32 masks take 2.5 times as long all together.
_GPU_UPSCALED_PX, _CPU_UPSCALED_PX = 2**25, 2**21
_FAILURES = (RuntimeError, ValueError, ArithmeticError, LookupError, MemoryError)
_Result = TypeVar("_Result")


@dataclass
class PromptableSegmenter(Segmenter):
    """A segmenter with an image encoder, which is dear, and a decoder of boxes, which is cheap.

    Attributes:
        checkpoint: Its weights.
        device: Where to run it; `auto` takes a GPU if there is one.
        precision: Of the encoder; `auto` is `bf16` on GPUs that have it, else `fp32`. Boxes are
            always decoded in fp32.
        images_per_batch: Images encoded at a time; `None` is 8 on a GPU, else 1.
        boxes_per_batch: Boxes of an image decoded at a time; `None` is 32 on a GPU, else 1: a CPU
            is faster one by one.
        compile: Whether to compile the encoder; pays on long runs.

    Raises:
        ValueError: If a batch is smaller than 1.
    """

    checkpoint: str
    _: KW_ONLY
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    images_per_batch: int | None = None
    boxes_per_batch: int | None = None
    compile: bool = False
    _model: Any = field(default=None, init=False, repr=False, compare=False)
    _worker: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("images_per_batch", "boxes_per_batch"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, or None to choose it, got {count}")

    @abstractmethod
    def build(self) -> None:
        """Read the checkpoint and `take` the model.

        Raises:
            ValueError: If the weights are missing, damaged or of something else.
        """

    @abstractmethod
    def encode(self, images: list[NDArray[np.uint8]]) -> Embedding:
        """Embed images `[H, W, 3]`; the first dimension of each tensor is the image."""

    @abstractmethod
    def decode(
        self, embedding: Embedding, boxes_xyxy_px: NDArray[np.float64], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "boxes 1 low_height low_width"], Float[Tensor, " boxes"]]:
        """Predict masks of an image of `size` (height, width): small logits, and their IoU."""

    @abstractmethod
    def upscale(
        self, logits: Float[Tensor, "boxes 1 low_height low_width"], size: tuple[int, int]
    ) -> Float[Tensor, "boxes 1 height width"]:
        """Enlarge logits to an image of `size` (height, width)."""

    def take(self, model: nn.Module, encoder: nn.Module) -> None:
        """Keep a model, on the device and ready to predict; compile its `encoder` if asked."""
        self._model = model.to(self._device()).eval()
        if self.compile:
            encoder.compile()

    def place(self, worker: int) -> None:
        """Take a GPU by the worker's number, if `device` is `auto`; see `Segmenter.place`."""
        self._worker = worker

    def _device(self) -> torch.device:
        return pick_device(self.device, self._worker)

    def load(self) -> None:
        """Load the weights, and compile if asked; see `Segmenter.load`."""
        self._device()  # reading weights for a device that is not there takes long
        self.build()
        if self.compile:
            try:
                self._embed([np.zeros((64, 64, 3), np.uint8)] * self.batch_size())
            except RuntimeError as error:
                raise ValueError(
                    f"the encoder can't be compiled ({str(error)[:300]}); set compile: false"
                ) from error

    def settings(self) -> dict[str, Any]:
        """Return what decides the masks; see `Segmenter.settings`.

        Weights count by content and the device not at all: a run may go on after either moved.
        """
        shown = super().settings()
        del shown["device"]
        return {**shown, "checkpoint": fingerprint(self.checkpoint)}

    def batch_size(self) -> int:
        """Return how many images are encoded at a time."""
        on_cpu = self._device().type == "cpu"
        return self.images_per_batch or (1 if on_cpu else 8)

    def segment(
        self, rgb: NDArray[np.uint8], boxes_xyxy_px: NDArray[np.float64]
    ) -> list[MaskPrediction]:
        """Segment every box; see `Segmenter.segment`.

        Raises:
            SampleError: If the image can't be segmented (`segmenter_failed`,
                `segmenter_out_of_memory`, `segmenter_not_finite`).
        """
        (result,) = self.segment_batch([rgb], [boxes_xyxy_px])
        if isinstance(result, SampleError):
            raise result
        return result

    def segment_batch(
        self, images: list[NDArray[np.uint8]], boxes_xyxy_px: list[NDArray[np.float64]]
    ) -> list[list[MaskPrediction] | SampleError]:
        """Segment several images; see `Segmenter.segment_batch`.

        A batch that fails is encoded again one by one, so that only the image at fault is lost.
        Besides `segmenter_failed`, reasons are `segmenter_out_of_memory` and
        `segmenter_not_finite`.
        """
        if self._model is None:
            self.load()
        results: list[list[MaskPrediction] | SampleError] = []
        size = self.batch_size()
        for start in range(0, len(images), size):
            some = slice(start, start + size)
            embeddings = self._embed_each(images[some])
            for rgb, boxes, embedding in zip(
                images[some], boxes_xyxy_px[some], embeddings, strict=True
            ):
                if isinstance(embedding, SampleError):
                    results.append(embedding)
                else:
                    results.append(attempt(partial(self._predict, rgb, boxes, embedding)))
        return results

    def _embed_each(self, images: list[NDArray[np.uint8]]) -> list[Embedding | SampleError]:
        together = attempt(partial(self._embed, images))
        if not isinstance(together, SampleError):
            return together
        if len(images) == 1:
            return [together]
        if together.reason == "segmenter_out_of_memory":
            torch.cuda.empty_cache()  # does nothing where there is no GPU
        return [result for rgb in images for result in self._embed_each([rgb])]

    @torch.inference_mode()
    def _embed(self, images: list[NDArray[np.uint8]]) -> list[Embedding | SampleError]:
        count, full = len(images), self.batch_size()
        if self.compile and 1 < count < full:  # every other size would be compiled again
            images = [*images, *[images[-1]] * (full - count)]
        with self._autocast():
            batch = self.encode(images)
        embeddings: list[Embedding | SampleError] = []
        for index in range(count):
            embedding = tuple(part[index : index + 1].float() for part in batch)
            finite = all(bool(part.isfinite().all()) for part in embedding)
            embeddings.append(embedding if finite else _not_finite("the embedding"))
        return embeddings

    @torch.inference_mode()
    def _predict(
        self, rgb: NDArray[np.uint8], boxes_xyxy_px: NDArray[np.float64], embedding: Embedding
    ) -> list[MaskPrediction]:
        size = (rgb.shape[0], rgb.shape[1])
        on_cpu = embedding[0].device.type == "cpu"
        chunk = self.boxes_per_batch or (1 if on_cpu else 32)
        at_once = max(1, (_CPU_UPSCALED_PX if on_cpu else _GPU_UPSCALED_PX) // (size[0] * size[1]))
        predictions = []
        for start in range(0, len(boxes_xyxy_px), chunk):
            logits, ious = self.decode(embedding, boxes_xyxy_px[start : start + chunk], size)
            if not (ious.isfinite().all() and logits.isfinite().all()):
                raise _not_finite("a mask or its IoU")
            for low, iou in zip(logits.split(at_once), ious.split(at_once), strict=True):
                full = self.upscale(low, size)[:, 0]
                masks = (full > 0).cpu().numpy()
                rows = zip(masks, iou.tolist(), stability_score(full).tolist(), strict=True)
                predictions += [MaskPrediction(*row) for row in rows]
        return predictions

    def _autocast(self) -> torch.autocast:
        device = self._device()
        bf16 = self.precision == "bf16"
        if self.precision == "auto" and device.type == "cuda":
            bf16 = torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def stability_score(
    logits: Float[Tensor, "boxes height width"], offset: float = STABILITY_OFFSET
) -> Float[Tensor, " boxes"]:
    """Return the IoU of each mask cut at `offset` with itself cut at `-offset`.

    As segment-anything's `calculate_stability_score`; 0 where both are empty.
    """
    inner = (logits > offset).sum((-2, -1))
    outer = (logits > -offset).sum((-2, -1))
    return inner / outer.clamp(min=1)


def pick_device(name: str, worker: int = 0) -> torch.device:
    """Return the device of a name; `auto` is a GPU if there is one, else the CPU.

    Args:
        name: `auto`, or a name of torch's.
        worker: Number of the worker that asks; `auto` deals the GPUs out by it.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", worker % torch.cuda.device_count())
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name} was asked for, but torch sees {torch.cuda.device_count()} GPUs here; "
            "use device: auto or cpu"
        )
    return device


def attempt(work: Callable[[], _Result]) -> _Result | SampleError:
    """Do work for some images and return what went wrong with it, unless the device is broken."""
    try:
        return work()
    except SampleError as error:
        return error.with_traceback(None)  # its frames would keep tensors alive
    except _FAILURES as error:
        if is_device_failure(error):
            raise
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        memory = memory or "can't allocate memory" in str(error)  # torch, on a CPU
        reason = "segmenter_out_of_memory" if memory else "segmenter_failed"
        return SampleError(reason, f"{type(error).__name__}: {error}")


def _not_finite(what: str) -> SampleError:
    return SampleError("segmenter_not_finite", f"{what} holds numbers that are not finite")
