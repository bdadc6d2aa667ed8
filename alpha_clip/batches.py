"""What training and validation steps are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alpha_clip.streams import Place
from alpha_clip.text import Tokenizer


@dataclass
class RegionBatch:
    """A batch of images, each with the same number of regions.

    Attributes:
        rgb: Normalised images.
        alphas: Normalised alphas of their regions.
        tokens: Tokens of the phrases that occur in the batch, each once.
        phrase: Which of them is the region's.
        phrase_ids: A number for each region's phrase, equal for equal tokens, on every process.
        image_ids: A number for each image, on every process.
        whole: Which regions are the whole image, with its caption.
        text: Features of `tokens`, where they were computed beforehand.
        reader: Which of the data loader's workers made the batch.
        place: How far that worker is in its stream.
    """

    rgb: Float[Tensor, "batch 3 height width"]
    alphas: Float[Tensor, "batch regions 1 height width"]
    tokens: Int[Tensor, "phrases context"]
    phrase: Int[Tensor, "batch regions"]
    phrase_ids: Int[Tensor, "batch regions"]
    image_ids: Int[Tensor, " batch"]
    whole: Bool[Tensor, "batch regions"]
    text: Float[Tensor, "phrases dim"] | None = None
    reader: int = 0
    place: Place = field(default_factory=Place)

    def to(self, *args: Any, **kwargs: Any) -> RegionBatch:
        """Return the batch on another device; Lightning calls it."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> RegionBatch:
        """Return the batch in memory that a GPU copies from; data loaders call it."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Any) -> RegionBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in values.items() if isinstance(v, Tensor)})


@dataclass
class LoadedSample:
    """One image with the regions drawn of it, before it is batched; see `RegionBatch`."""

    rgb: Float[Tensor, "3 height width"]
    alphas: Float[Tensor, "regions 1 height width"]
    texts: list[str]
    whole: list[bool]
    image_id: int = 0
    reader: int = 0
    place: Place = field(default_factory=Place)


@dataclass
class Collate:
    """Stacks samples into a `RegionBatch`.

    Attributes:
        tokenizer: The model's.
        features: Looks up text features by phrase numbers, where there are any.
    """

    tokenizer: Tokenizer
    features: Callable[[Tensor], Tensor] | None = None

    def __call__(self, samples: list[LoadedSample]) -> RegionBatch:
        """Stack images and alphas and tokenize the phrases."""
        texts = [text for sample in samples for text in sample.texts]
        tokens, phrase = torch.unique(self.tokenizer(texts), dim=0, return_inverse=True)
        phrase = phrase.view(len(samples), -1)
        ids = phrase_ids(tokens)
        return RegionBatch(
            rgb=torch.stack([sample.rgb for sample in samples]),
            alphas=torch.stack([sample.alphas for sample in samples]),
            tokens=tokens,
            phrase=phrase,
            phrase_ids=ids[phrase],
            image_ids=torch.tensor([sample.image_id for sample in samples]),
            whole=torch.tensor([sample.whole for sample in samples]),
            text=self.features(ids) if self.features else None,
            reader=samples[-1].reader,
            place=samples[-1].place,
        )


def phrase_ids(tokens: Int[Tensor, "phrases context"]) -> Int[Tensor, " phrases"]:
    """Return a number for each phrase: 64 bits of a hash of its tokens."""
    rows = tokens.to(torch.int64).numpy()
    digests = (blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return torch.tensor([int.from_bytes(d, "big", signed=True) for d in digests])
