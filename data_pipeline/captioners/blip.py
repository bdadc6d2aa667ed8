"""BLIP and BLIP-2, as transformers has them; the paper captioned its cut-outs with BLIP-2."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from alpha_clip.regions import SampleError
from data_pipeline.captioners.base import Captioner, filled
from data_pipeline.captioners.blip_checkpoint import fit_processor, read_blip
from data_pipeline.foreground import Foreground
from data_pipeline.segmenters.fingerprint import fingerprint
from data_pipeline.segmenters.promptable import attempt, pick_device

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_Pair: TypeAlias = tuple[Foreground, str]


@dataclass
class BlipCaptioner(Captioner):
    """Describes cut-outs with BLIP or BLIP-2, whichever the checkpoint is; never at random.

    Attributes:
        checkpoint: A folder, or a name on the Hugging Face hub such as `Salesforce/blip2-opt-2.7b`
            (BLIP-2); safetensors only.
        prompt: Words that BLIP continues, or a question to BLIP-2 in which `{}` is the class name.
            Where a model repeats it, it is no part of the caption.
        device: Where to run it; `auto` takes a GPU if there is one.
        precision: Of the weights; `auto` is `bf16` on GPUs that have it, `fp16` on others and
            `fp32` on a CPU.
        images_per_batch: Cut-outs described at a time; `None` is 16 on a GPU, else 1.
        max_new_tokens: Where a caption is cut off.
        num_beams: Beams to search with; 1 takes the likeliest word each time.
        compile: Whether to compile the vision tower; pays on long runs.

    Raises:
        ValueError: If a number is smaller than 1, or the prompt is blank.
    """

    checkpoint: str = "Salesforce/blip-image-captioning-large"
    _: KW_ONLY
    prompt: str | None = None
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    images_per_batch: int | None = None
    max_new_tokens: int = 30
    num_beams: int = 3
    compile: bool = False
    _model: Any = field(default=None, init=False, repr=False, compare=False)
    _processor: Any = field(default=None, init=False, repr=False, compare=False)
    _worker: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("images_per_batch", "max_new_tokens", "num_beams"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError(f"prompt must have a word, or be None, got {self.prompt!r}")

    def place(self, worker: int) -> None:
        """Take a GPU by the worker's number, if `device` is `auto`; see `Captioner.place`."""
        self._worker = worker

    def settings(self) -> dict[str, Any]:
        """Return what decides the captions; see `Captioner.settings`.

        Weights count by content and the device not at all: a run may go on after either moved.
        """
        shown = super().settings()
        del shown["device"]
        return {**shown, "checkpoint": fingerprint(self.checkpoint)}

    def batch_size(self) -> int:
        """Return how many cut-outs are described at a time."""
        on_cpu = self._device().type == "cpu"
        return self.images_per_batch or (1 if on_cpu else 16)

    def load(self) -> None:
        """Load the weights, and compile if asked; see `Captioner.load`.

        Raises:
            ValueError: If transformers or the weights are missing, or the weights are damaged, of
                something else, or pickled, or the prompt is not for them.
        """
        self._device()  # reading weights for a device that is not there takes long
        self.use(*read_blip(self.checkpoint, self._dtype()))

    def use(self, model: nn.Module, processor: Any) -> None:
        """Take a model that is built already, instead of loading one.

        Args:
            model: A `transformers.BlipForConditionalGeneration` or `Blip2ForConditionalGeneration`;
                it is moved to the device and set to evaluation.
            processor: Its processor; for BLIP-2 it is changed: told how many tokens a picture
                takes, and on which side to pad.

        Raises:
            ValueError: If the two do not fit together, the prompt is not for this kind of model,
                or the vision tower can't be compiled.
        """
        kind: Any = model.config
        if kind.model_type == "blip-2":
            fit_processor(processor, kind)
        elif self.prompt is not None and "{}" in self.prompt:
            # Prompts of several lengths would have to be padded, for which BLIP has no mask.
            raise ValueError("BLIP takes the same prompt for all pictures: leave out {}")
        self._processor = processor
        self._model = model.to(self._device()).eval()
        if self.compile:
            self._compile()

    def caption(self, foreground: Foreground, class_name: str) -> str:
        """Describe one cut-out; see `Captioner.caption`.

        Raises:
            SampleError: If there is no caption; see `caption_batch`.
        """
        (result,) = self.caption_batch([foreground], [class_name])
        if isinstance(result, SampleError):
            raise result
        return result

    def caption_batch(
        self, foregrounds: list[Foreground], class_names: list[str]
    ) -> list[str | SampleError]:
        """Describe several cut-outs; see `Captioner.caption_batch`.

        A batch that fails is halved until only the cut-out at fault is lost, or until it fits into
        memory. Besides `captioner_failed` and `empty_caption`, reasons are
        `captioner_out_of_memory` and `captioner_not_finite`.
        """
        pairs = list(zip(foregrounds, class_names, strict=True))
        if self._model is None:
            self.load()
        size = self.batch_size()
        if self.compile and pairs:  # every other size would be compiled again
            pairs += [pairs[-1]] * (-len(pairs) % size)
        batches = (pairs[start : start + size] for start in range(0, len(pairs), size))
        results = [result for batch in batches for result in self._halve(batch)]
        return results[: len(foregrounds)]

    def _halve(self, pairs: list[_Pair]) -> list[str | SampleError]:
        together = attempt(partial(self._describe, pairs))
        if not isinstance(together, SampleError):
            return together
        reason = together.reason.replace("segmenter", "captioner")  # `attempt` is theirs
        if len(pairs) == 1:
            return [SampleError(reason, together.detail)]
        if reason == "captioner_out_of_memory":
            torch.cuda.empty_cache()  # does nothing where there is no GPU
        middle = len(pairs) // 2
        return self._halve(pairs[:middle]) + self._halve(pairs[middle:])

    @torch.inference_mode()
    def _describe(self, pairs: list[_Pair]) -> list[str | SampleError]:
        texts = None if self.prompt is None else [self.prompt.replace("{}", n) for _, n in pairs]
        inputs = self._processor(
            images=[np.array(f.rgb) for f, _ in pairs],  # torch warns of read-only ones
            input_data_format="channels_last",
            return_tensors="pt",
            **({} if texts is None else {"text": texts, "padding": True}),
        ).to(self._device())
        watch = _Watch()
        written = self._model.generate(
            **inputs,
            do_sample=False,
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
            logits_processor=[watch],
        )
        rows = zip(self._read_out(written, texts), watch.finite(len(pairs)), strict=True)
        return [filled(caption) if finite else _not_finite() for caption, finite in rows]

    def _read_out(self, written: Tensor, texts: list[str] | None) -> list[str]:
        """Turn tokens into words, without the prompt."""
        tokenizer = self._processor.tokenizer
        captions = tokenizer.batch_decode(written, skip_special_tokens=True)
        if texts is None:
            return list(captions)
        # As the model would repeat them: an uncased vocabulary has no capitals.
        prompts = tokenizer.batch_decode(tokenizer(texts)["input_ids"], skip_special_tokens=True)
        pairs = zip(captions, prompts, strict=True)
        return [caption.strip().removeprefix(prompt.strip()) for caption, prompt in pairs]

    def _device(self) -> torch.device:
        return pick_device(self.device, self._worker)

    def _dtype(self) -> torch.dtype:
        if self.precision != "auto":
            return _DTYPES[self.precision]
        device = self._device()
        if device.type != "cuda":
            return torch.float32
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it
        return torch.bfloat16 if has_bf16 else torch.float16

    def _compile(self) -> None:
        """Compile the vision tower, at the size of a batch."""
        self._model.vision_model.compile()
        blank = Foreground(np.zeros((64, 64, 3), np.uint8), np.ones((64, 64), bool))
        try:
            self._describe([(blank, "thing")] * self.batch_size())
        except RuntimeError as error:
            raise ValueError(
                f"the vision tower can't be compiled ({str(error)[:300]}); set compile: false"
            ) from error


class _Watch:
    """Sees all scores while words are chosen, and remembers which were no numbers."""

    def __init__(self) -> None:
        self._damaged: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        damaged = scores.isnan().any(-1)
        self._damaged = damaged if self._damaged is None else self._damaged | damaged
        return scores

    def finite(self, count: int) -> list[bool]:
        """Return for each of `count` pictures, whose beams follow one another, if all were."""
        if self._damaged is None:
            return [True] * count
        return [not bad for bad in self._damaged.view(count, -1).any(1).tolist()]


def _not_finite() -> SampleError:
    return SampleError("captioner_not_finite", "the score of a word is no number")
