"""CLIP's score: the cosine of a candidate's cut-out, or region, with the class name.

The paper crops, centres and enlarges the foreground and scores it by CLIP (Alpha-CLIP, arXiv
2312.03818, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from alpha_clip.factory import create_model
from data_pipeline.foreground import cut_out
from data_pipeline.scorers.base import Scorer
from data_pipeline.segmenters.fingerprint import fingerprint
from data_pipeline.segmenters.promptable import pick_device

Look = Literal["white", "clip_mean", "image", "alpha"]


@dataclass
class ClipScorer(Scorer):
    """Scores candidates by a CLIP, or by an Alpha-CLIP with the mask as alpha.

    Attributes:
        name: Architecture, in open_clip's spelling; not needed where `checkpoint` says it.
        pretrained: Its weights: a tag of open_clip or a file.
        checkpoint: Alpha weights, or a folder that `alpha-clip fit` wrote.
        look: What the tower sees: the cut-out, enlarged, on white, on CLIP's mean or amid its
            surroundings (`image`); or the whole picture with the mask as alpha.
        templates: Prompts, with `{}` for the class name; their features are averaged.
        batch_size: Candidates encoded at a time.
        device: Where to run it; `auto` takes a GPU if there is one.
        precision: `auto` is bf16 on GPUs that have it, else fp32.
    """

    name: str | None = "ViT-B-16"
    pretrained: str | None = "openai"
    checkpoint: str | None = None
    look: Look = "white"
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    batch_size: int = 64
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    _model: Any = field(default=None, init=False, repr=False, compare=False)
    _texts: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _worker: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.templates or not all(t.count("{}") == 1 for t in self.templates):
            raise ValueError(
                f"expected prompts with one {{}} for the class name, got {self.templates}"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the weights behind: each process loads its own."""
        return {**self.__dict__, "_model": None, "_texts": {}}

    def settings(self) -> dict[str, Any]:
        """Return what decides the scores; weights by their content, where they are files."""
        shown = {k: getattr(self, k) for k in ("name", "look", "templates", "precision")}
        for name in ("pretrained", "checkpoint"):
            given = getattr(self, name)
            shown[name] = None if given is None else fingerprint(given)
        return shown

    def place(self, worker: int) -> None:
        """Take the GPU of this worker's number; see `Scorer.place`."""
        self._worker = worker

    def load(self) -> None:
        """Load the model; see `Scorer.load`."""
        device, precision = pick_device(self.device, self._worker), self.precision
        if precision == "auto":
            fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
            precision = "bf16" if fast else "fp32"
        self._model, _, _ = create_model(
            self.name, self.pretrained, self.checkpoint, precision=precision, device=device
        )

    @torch.inference_mode()
    def score(
        self, rgb: NDArray[np.uint8], masks: list[NDArray[np.bool_]], class_name: str
    ) -> list[float]:
        """Score the candidates of a picture; see `Scorer.score`."""
        if self._model is None:
            self.load()
        text = self._text(class_name)
        scores: list[float] = []
        for start in range(0, len(masks), self.batch_size):
            features = self._encode(rgb, masks[start : start + self.batch_size])
            scores += (features.float() @ text).tolist()
        return scores

    def _encode(self, rgb: NDArray[np.uint8], masks: list[NDArray[np.bool_]]) -> Tensor:
        model, device = self._model, next(self._model.parameters()).device
        if self.look == "alpha":
            picture, alphas = model.transform.many(Image.fromarray(rgb), masks)
            many: Tensor = model.encode_regions(
                picture[None].to(device), alphas[None].to(device), normalize=True
            )
            return many[0]
        cuts = [cut_out(rgb, mask, self.look, model.image_size).rgb for mask in masks]
        batch = torch.stack([model.transform(Image.fromarray(cut)) for cut in cuts])
        features: Tensor = model.encode_image(batch.to(device), normalize=True)
        return features

    def _text(self, class_name: str) -> Tensor:
        if class_name not in self._texts:
            prompts = [template.format(class_name) for template in self.templates]
            device = next(self._model.parameters()).device
            tokens = self._model.tokenizer(prompts).to(device)
            mean = self._model.encode_text(tokens, normalize=True).float().mean(0)
            self._texts[class_name] = mean / mean.norm()
        return self._texts[class_name]
