"""A tower of tokens in pieces: what makes them, each block, and what turns them into features.

A tower's own `forward` runs from the first layer to the last. Here it can stop in front of any
block and go on from there, with the same operations in the same order, so that the two halves give
what the whole gives, to the last bit. It is known of open_clip's own ViT and of timm's ViT (SigLIP,
MobileCLIP-B, ViTamin), EVA (Perception Encoder) and ViT with relative positions: of open_clip 3.3's
144 configs these are the image towers of 116.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alpha_clip.attention import find_blocks

Tokens = Float[Tensor, "batch tokens width"]
Grid = tuple[int, int]


def check_pieces(visual: nn.Module) -> None:
    """Refuse a tower that can't be run in pieces.

    Args:
        visual: An open_clip image tower.

    Raises:
        ValueError: If it has no blocks of tokens, nobody knows what its `forward` does around them,
            or it leaves out patches while it trains; the message names its class.
    """
    if hasattr(visual, "pretrained_cfg"):
        raise ValueError(
            f"{type(visual).__name__} is a model of timm's on its own, which is known by the block "
            "only inside open_clip's tower (open_clip.timm_model.TimmModel); give it that, or let "
            "alpha enter at the first layer (block 0)"
        )
    try:
        find_blocks(visual)
    except ValueError as error:
        raise ValueError(f"{error}; let alpha enter at the first layer (block 0)") from error
    trunk = getattr(visual, "trunk", visual)
    kinds = _kinds(visual)
    known = [k for k in kinds if isinstance(trunk, k)]
    own = "forward_features" if hasattr(visual, "trunk") else "_embeds"
    if not known or getattr(type(trunk), own) is not getattr(known[0], own):
        names = ", ".join(sorted({f"{k.__module__.split('.')[0]}'s {k.__name__}" for k in kinds}))
        raise ValueError(
            f"{type(trunk).__name__} can't be run block by block: it is known how {names} do it; "
            "let alpha enter at the first layer (block 0)"
        )
    if not getattr(getattr(visual, "transformer", None), "batch_first", True):
        raise ValueError("expected a tower with batch_first, as open_clip builds them")
    dropped = [getattr(trunk, name, None) for name in ("patch_drop", "patch_dropout")]
    if any(part is not None and not isinstance(part, nn.Identity) for part in dropped):
        raise ValueError(
            f"this {type(trunk).__name__} leaves out patches while it trains, so that alpha would "
            "not find its own; set patch_dropout (open_clip) or patch_drop (timm) to 0"
        )


def _kinds(visual: nn.Module) -> list[Any]:
    if not hasattr(visual, "trunk"):
        from open_clip.transformer import VisionTransformer as OpenClipViT

        return [OpenClipViT]
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    return [VisionTransformer, Eva, VisionTransformerRelPos]


def embed(visual: Any, images: Float[Tensor, "batch channels height width"]) -> Tokens:
    """Return the tokens that go into the first block."""
    if not hasattr(visual, "trunk"):
        tokens: Tensor = visual._embeds(images)
        return tokens
    trunk = visual.trunk
    x = trunk.patch_embed(images)
    if not hasattr(trunk, "_pos_embed"):  # relative positions
        prefix = [] if trunk.cls_token is None else [trunk.cls_token.expand(len(x), -1, -1)]
        return torch.cat([*prefix, x], 1)
    x = trunk._pos_embed(x)
    tokens = trunk.norm_pre(x[0] if isinstance(x, tuple) else x)
    return tokens


def run(visual: Any, tokens: Tokens, grid: Grid, blocks: Iterable[int]) -> Tokens:
    """Send tokens through some of the blocks.

    Args:
        visual: An open_clip image tower.
        tokens: What goes into the first of them.
        grid: Rows and columns of the patches.
        blocks: Numbers of the blocks.
    """
    home, modules = find_blocks(visual)
    arguments = _arguments(getattr(visual, "trunk", None), grid)
    for number in blocks:
        block, given = modules[number], arguments(number)
        if home.grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, use_reentrant=False, **given)
        else:
            tokens = block(tokens, **given)
    return tokens


def _arguments(trunk: Any, grid: Grid) -> Callable[[int], dict[str, Any]]:
    """Say what a block is given beside its tokens: where they are, in some towers."""
    bias = getattr(trunk, "shared_rel_pos", None)
    if bias is not None:
        shared = bias.get_bias()
        return lambda number: {"shared_rel_pos": shared}
    rope = getattr(trunk, "rope", None)
    if rope is None:
        return lambda number: {}
    if trunk.dynamic_img_size:
        turns = rope.get_embed(shape=grid)
    elif hasattr(rope, "feat_shape"):
        turns = rope.get_embed()
    else:
        turns = rope.get_embed(shape=trunk.patch_embed.grid_size)
    if getattr(trunk, "rope_mixed", False):
        return lambda number: {"rope": turns[number]}
    return lambda number: {"rope": turns}


def grid_of(visual: Any, size: tuple[int, int]) -> Grid:
    """Return rows and columns of the patches of an image.

    Args:
        visual: An open_clip image tower.
        size: Height and width of the image in pixels.
    """
    if not hasattr(visual, "trunk"):
        return size[0] // visual.patch_size[0], size[1] // visual.patch_size[1]
    rows, columns = visual.trunk.patch_embed.dynamic_feat_size(size)
    return int(rows), int(columns)


def finish(visual: Any, tokens: Tokens) -> Any:
    """Return what the tower returns, from the tokens that come out of its last block."""
    if hasattr(visual, "trunk"):
        return visual.head(visual.trunk.forward_head(visual.trunk.norm(tokens)))
    pooled, others = visual._pool(tokens)
    if visual.proj is not None:
        pooled = pooled @ visual.proj
    return (pooled, others) if visual.output_tokens else pooled  # CoCa's


def features_in(returned: Any) -> Float[Tensor, "batch dim"]:
    """Return the features among what a tower returns: CoCa's returns its tokens, too."""
    features: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return features


def can_end_short(visual: Any) -> bool:
    """Say whether `end_short` may take the place of a tower's last block and what follows.

    It may in open_clip's own ViTs that pool the class token, as long as nobody watches: not with
    hooks on the last layers, gradient checkpointing, or a compiled, wrapped or adapted tower.
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        return False
    body, last = visual.transformer, visual.transformer.resblocks[-1]
    return (
        visual.pool_type == "tok"
        and visual.proj is not None
        and body.batch_first
        and not body.grad_checkpointing
        and type(last) is ResidualAttentionBlock
        and type(last.attn) is nn.MultiheadAttention
        and not any(
            map(is_watched, (visual, visual.ln_post, body, body.resblocks, *last.modules()))
        )
    )


def end_short(visual: Any, tokens: Tokens) -> Float[Tensor, "batch dim"]:
    """Return the features of the tokens in front of the last block, asking for the class alone."""
    last = visual.transformer.resblocks[-1]
    normed = last.ln_1(tokens)
    seen = last.attn(normed[:, :1], normed, normed, need_weights=False)[0]
    x = tokens[:, :1] + last.ls_1(seen)
    x = x + last.ls_2(last.mlp(last.ln_2(x)))
    features: Tensor = visual._pool(x)[0] @ visual.proj
    return features


def is_watched(module: Any) -> bool:
    """Say whether calling a module does more, or other things, than its `forward`."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    compiled = module._compiled_call_impl is not None
    return compiled or any(hooks) or bool(module._backward_pre_hooks)
