"""Features by the short way: a tower's last attention only for the token that features come from.

CLIP's feature is one token of the last block, so that block has to attend, and to run its MLP, for
that token alone: of a 12-block ViT it saves 7 %, of a 24-block one 3 %. The attention pooling of
OpenAI's ResNets asks once as well (as OpenAI's own code did), instead of once for each place: 7 %.
The features are the same but for rounding (5e-7 of the largest).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from alpha_clip.late_alpha import LateAlpha
from alpha_clip.token_tower import (
    can_end_short,
    embed,
    end_short,
    features_in,
    grid_of,
    is_watched,
    run,
)


def pooled_features(
    visual: nn.Module, inputs: Float[Tensor, "batch channels height width"], exactly: bool = False
) -> Float[Tensor, "batch dim"]:
    """Return the features of a tower, by the short way if there is one.

    Args:
        visual: An open_clip image tower.
        inputs: What it takes.
        exactly: Take the tower's own pass: the same to the last bit.
    """
    short = None if exactly else short_way(visual)
    if short is not None:
        return short(inputs)
    return features_in(visual(inputs))


def short_way(visual: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the short way through a tower, or `None` if its own pass has to be taken.

    It is for open_clip's own ViTs that pool the class token, and its ResNets, as long as nobody
    watches: hooks on the last layers, gradient checkpointing, a compiled, wrapped or adapted tower
    get the tower's own pass. A subclass with a `forward` of its own says that its features are the
    same by `takes_short_way = True`.

    Args:
        visual: An open_clip image tower.
    """
    if isinstance(visual, LateAlpha):
        return None if is_watched(visual) else partial(_with_late_alpha, visual)
    if _is_plain_vit(visual):
        return partial(_class_token, visual)
    return partial(_asked_once, visual) if _is_resnet(visual) else None


def _is_plain_vit(visual: Any) -> bool:
    from open_clip.transformer import VisionTransformer

    return _runs_as(visual, VisionTransformer) and can_end_short(visual)


def _is_resnet(visual: Any) -> bool:
    from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet

    return (
        _runs_as(visual, ModifiedResNet)
        and type(visual.attnpool) is AttentionPool2d
        and not any(map(is_watched, (visual, *visual.attnpool.modules())))
    )


def _runs_as(visual: Any, kind: Any) -> bool:
    if not isinstance(visual, kind):
        return False
    own = type(visual).forward is not kind.forward
    return not own or getattr(visual, "takes_short_way", False)


def _class_token(visual: Any, inputs: Tensor) -> Tensor:
    grid = grid_of(visual, (inputs.shape[-2], inputs.shape[-1]))
    blocks = range(len(visual.transformer.resblocks) - 1)
    return end_short(visual, run(visual, embed(visual, inputs), grid, blocks))


def _with_late_alpha(visual: Any, rgba: Tensor) -> Tensor:
    return features_in(visual.region_features(visual.image_tokens(rgba[:, :3]), rgba[:, 3:]))


def _asked_once(visual: Any, inputs: Tensor) -> Tensor:
    if inputs.device.type == "cpu" and not torch.compiler.is_compiling():
        # A batch of 8 takes a fifth less time so.
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    x = visual.stem(inputs)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = layer(x)
    pool = visual.attnpool
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding.to(x.dtype)

    def heads(tokens: Tensor) -> Tensor:
        return tokens.view(*tokens.shape[:2], pool.num_heads, -1).transpose(1, 2)

    query, key, value = pool.q_proj(x[:, :1]), pool.k_proj(x), pool.v_proj(x)
    seen = F.scaled_dot_product_attention(heads(query), heads(key), heads(value))
    features: Tensor = pool.c_proj(seen.transpose(1, 2).flatten(2))[:, 0]
    return features
