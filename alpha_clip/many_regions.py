"""Many regions of each image, in chunks: what comes before alpha is done once an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alpha_clip.late_alpha import LateAlpha
from alpha_clip.pooled import pooled_features
from alpha_clip.surgery import has_alpha, sharing_rgb
from alpha_clip.token_tower import features_in

# What a pass should hold on the CPU: with more, a ViT-B/16 falls out of the cache (a batch of 32
# takes 1.15 times as long as four of 8), with less, small towers do not fill the cores.
_CPU_PIXELS = 8 * 224 * 224


def usual_chunk(rgb: Float[Tensor, "images 3 height width"]) -> int:
    """Return how many regions should go through a tower at a time."""
    return 64 if rgb.device.type != "cpu" else max(1, _CPU_PIXELS // rgb.shape[-2:].numel())


def encode_many(
    visual: nn.Module,
    rgb: Float[Tensor, "images 3 height width"],
    alphas: Float[Tensor, "images regions 1 height width"],
    chunk: int,
    recompute: bool = False,
    join: bool = False,
) -> Float[Tensor, "images regions dim"]:
    """Return the features of many regions of each image.

    Args:
        visual: An open_clip image tower with alpha, folded or not.
        rgb: Normalised images.
        alphas: Normalised alphas of their regions.
        chunk: Most images, or regions, that go through the tower at a time.
        recompute: For training: whether to keep no activations, and to compute them again for the
            gradient (of late alpha, all but those between its two halves).
        join: Whether alpha at the first layer goes in with a copy of its image, and the first
            convolution is not shared; compiled towers need it, and so does `recompute`.
    """
    images, regions = alphas.shape[:2]
    parts: list[Tensor]
    if isinstance(visual, LateAlpha):
        parts = list(_after_shared_blocks(visual, rgb, alphas, chunk, recompute))
    else:
        owner = torch.arange(images, device=rgb.device).repeat_interleave(regions)
        chunks = list(zip(owner.split(chunk), alphas.flatten(0, 1).split(chunk), strict=True))
        if join or recompute or not has_alpha(visual):  # the last: folded
            joined = partial(_joined, visual, rgb)
            parts = [_call(recompute, joined, image, alpha) for image, alpha in chunks]
        else:
            parts = _after_shared_stem(visual, rgb, chunks)
    features: Tensor = torch.cat(parts).unflatten(0, (images, regions))
    return features


def encode_views(
    visual: LateAlpha, rgba: Float[Tensor, "views 4 height width"]
) -> Float[Tensor, "views dim"]:
    """Return the features of views, each with its own copy of its image.

    Args:
        visual: A tower with late alpha: what comes before alpha is done once for views of one image
            that follow each other.
        rgba: Normalised images and alphas.
    """
    new, image = same_images(rgba[:, :3])
    return _owned(visual, visual.image_tokens(rgba[new, :3]), image, rgba[:, 3:])


def same_images(
    rgb: Float[Tensor, "views 3 height width"],
) -> tuple[list[bool], Int[Tensor, " views"]]:
    """Say which views begin another image than the view before, and the image of each view."""
    new = [i == 0 or not torch.equal(rgb[i], rgb[i - 1]) for i in range(len(rgb))]
    return new, torch.tensor(new, device=rgb.device).cumsum(0) - 1


def _call(recompute: bool, piece: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    result: Tensor = (
        checkpoint(piece, *inputs, use_reentrant=False) if recompute else piece(*inputs)
    )
    return result


def _joined(visual: nn.Module, rgb: Tensor, owner: Tensor, alpha: Tensor) -> Tensor:
    return pooled_features(visual, torch.cat([rgb[owner], alpha.to(rgb.dtype)], 1))


def _after_shared_stem(
    visual: nn.Module, rgb: Tensor, chunks: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    parts = []
    with sharing_rgb(rgb) as shared:
        for owner, alpha in chunks:
            shared.owner = owner if len(rgb) > 1 else None
            parts.append(pooled_features(visual, alpha))
    return parts


def _owned(visual: LateAlpha, tokens: Tensor, owner: Tensor, alpha: Tensor) -> Tensor:
    return features_in(visual.region_features(tokens[owner], alpha))


def _after_shared_blocks(
    visual: LateAlpha, rgb: Tensor, alphas: Tensor, chunk: int, recompute: bool
) -> Iterator[Tensor]:
    head = partial(_owned, visual)
    for images, marks in zip(rgb.split(chunk), alphas.split(chunk), strict=True):
        tokens = _call(recompute, visual.image_tokens, images)
        owner = torch.arange(len(images), device=rgb.device).repeat_interleave(marks.shape[1])
        for image, alpha in zip(owner.split(chunk), marks.flatten(0, 1).split(chunk), strict=True):
            yield _call(recompute, head, tokens, image, alpha)
