"""What training and validation steps are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alpha_clip.text import Tokenizer


@dataclass
class RegionBatch:
    """A batch of images, each with the same number of regions.

    Attributes:
        rgb: Normalised images.
        alphas: Normalised alphas of their regions.
        tokens: Tokens of the regions' phrases.
        whole: Which regions are the whole image, with its caption.
    """

    rgb: Float[Tensor, "batch 3 height width"]
    alphas: Float[Tensor, "batch regions 1 height width"]
    tokens: Int[Tensor, "batch regions context"]
    whole: Bool[Tensor, "batch regions"]

    def to(self, *args: Any, **kwargs: Any) -> RegionBatch:
        """Return the batch on another device; Lightning calls it."""
        return RegionBatch(
            self.rgb.to(*args, **kwargs),
            self.alphas.to(*args, **kwargs),
            self.tokens.to(*args, **kwargs),
            self.whole.to(*args, **kwargs),
        )


@dataclass(frozen=True)
class LoadedSample:
    """One image with the regions drawn of it, before it is batched; see `RegionBatch`."""

    rgb: Float[Tensor, "3 height width"]
    alphas: Float[Tensor, "regions 1 height width"]
    texts: list[str]
    whole: list[bool]


@dataclass
class Collate:
    """Stacks samples into a `RegionBatch`."""

    tokenizer: Tokenizer

    def __call__(self, samples: list[LoadedSample]) -> RegionBatch:
        """Stack images and alphas and tokenize the phrases."""
        tokens = self.tokenizer([text for sample in samples for text in sample.texts])
        return RegionBatch(
            rgb=torch.stack([sample.rgb for sample in samples]),
            alphas=torch.stack([sample.alphas for sample in samples]),
            tokens=tokens.unflatten(0, (len(samples), -1)),
            whole=torch.tensor([sample.whole for sample in samples]),
        )
