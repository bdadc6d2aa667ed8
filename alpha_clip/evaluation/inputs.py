"""What benchmarks on region–text shards are fed with: pictures in batches, features of texts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TypeAlias

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from alpha_clip.drops import Drops
from alpha_clip.model import AlphaClip
from alpha_clip.reader import Shard, read_samples
from alpha_clip.regions import RegionSample, SampleError, decode_jpeg

Picture: TypeAlias = tuple[RegionSample, Image.Image]
"""A sample and its picture, RGB."""


def samples_of(
    shards: list[Shard], max_images: int | None = None, drops: Drops | None = None
) -> Iterator[RegionSample]:
    """Yield the samples of shards in order; what is dropped is logged as it happens.

    Args:
        shards: The shards.
        max_images: Most samples to read; `None` reads all.
        drops: Where to count what is dropped.
    """
    drops = drops or Drops()
    return islice((s for shard in shards for s in read_samples(shard, drops)), max_images)


def pictures_of(
    shards: list[Shard], size: int, max_images: int | None = None
) -> Iterator[list[Picture]]:
    """Yield samples with their pictures, `size` at a time, with a progress bar.

    Args:
        shards: The shards.
        size: Most samples at a time.
        max_images: Most samples to read; `None` reads all.
    """
    drops = Drops()

    def sound() -> Iterator[Picture]:
        for sample in samples_of(shards, max_images, drops):
            try:
                yield sample, decode_jpeg(sample.jpeg).convert("RGB")
            except SampleError as error:
                drops.add(error.reason, f"{sample.key}: {error.detail}")

    pictures = sound()
    yield from tqdm(iter(lambda: list(islice(pictures, size)), []), desc="evaluate", unit="batch")


def encode_texts(model: AlphaClip, texts: list[str]) -> Float[Tensor, "texts dim"]:
    """Return features of length 1, on the model's device."""
    device = model.logit_scale.device
    tokens = model.tokenizer(texts).split(256)
    return torch.cat([model.encode_text(part.to(device), normalize=True) for part in tokens])
