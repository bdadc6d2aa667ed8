"""What benchmarks are fed with: samples of shards, features of texts and of classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from alpha_clip.drops import Drops
from alpha_clip.model import AlphaClip
from alpha_clip.reader import Shard, read_samples
from alpha_clip.regions import RegionSample

_AT_A_TIME = 256
_CLASSES = "classes.npy"


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


def encode_texts(model: AlphaClip, texts: list[str]) -> Float[Tensor, "texts dim"]:
    """Return features of length 1, on the model's device."""
    device = model.logit_scale.device
    tokens = model.tokenizer(texts).split(_AT_A_TIME)
    return torch.cat([model.encode_text(part.to(device), normalize=True) for part in tokens])


def encode_classes(
    model: AlphaClip, names: list[str], templates: list[str], folder: Path | None = None
) -> Float[Tensor, "names dim"]:
    """Return the features of classes, of length 1: the mean over prompts (CLIP's ensemble).

    Args:
        model: Encodes them.
        names: What the classes are called.
        templates: Prompts; `{}` stands for the name.
        folder: Of this model, these names and templates alone: they are kept there, and found.

    Raises:
        ValueError: If there is no template, or one without `{}`.
    """
    if not templates or not all("{}" in template for template in templates):
        raise ValueError(f"expected templates with {{}} for the name, got {templates}")
    device = model.logit_scale.device
    if folder is not None and (kept := _kept(folder / _CLASSES, len(names))) is not None:
        return torch.from_numpy(kept).to(device)
    prompts = [template.replace("{}", name) for name in names for template in templates]
    each = encode_texts(model, prompts).float().view(len(names), len(templates), -1)
    found = each[:, 0]
    if len(templates) > 1:
        found = torch.nn.functional.normalize(each.mean(1), dim=-1)
    if folder is not None:
        half = folder / f"{_CLASSES}.{os.getpid()}.tmp"
        with half.open("wb") as stream:
            np.save(stream, found.cpu().numpy())
        half.replace(folder / _CLASSES)
    return found


def _kept(file: Path, count: int) -> NDArray[np.float32] | None:
    """Return the features in a file; `None` if there is none or it is damaged."""
    try:
        found: NDArray[np.float32] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.ndim == 2 and len(found) == count else None
