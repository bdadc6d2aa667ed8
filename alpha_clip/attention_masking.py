"""Attention masking: a plain CLIP pointed at a region by what its class token may look at.

MaskCLIP (Ding et al., arXiv 2208.08984, "mask class tokens") needs neither alpha nor training. A
copy of the class token goes in front of all tokens and is pooled in its place. The copy sees the
class token and the patches inside the mask; nothing sees the copy, so that class token and patches
are those of the plain pass. With a mask of the whole image the features are therefore CLIP's own.

Of open_clip 3.3's 144 configs 58 have such a class token: OpenAI's, LAION's and MobileCLIP's ViTs,
EVA-01 and EVA-02. SigLIP, CLIPA, ViTamin, Perception Encoder and most CoCa pool in other ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from alpha_clip.attention import TokenLayout, find_attention, find_blocks, setting


@contextmanager
def attending_to(
    visual: nn.Module,
    masks: Float[Tensor, "batch 1 height width"],
    blocks: Sequence[int] | None = None,
) -> Iterator[None]:
    """Confine the class token to regions, in the passes of a tower inside this context.

    Use it around `AlphaClip.encode_image` of as many images, in the same order.

    Args:
        visual: An open_clip image tower whose features come from its class token: open_clip's own
            ViT, and from timm ViT and EVA.
        masks: A region for each image, in the pixels that the tower is given; 0..1, not normalised.
            A patch is inside if one of its pixels is (0.5 or more), as in ODISE's version of
            MaskCLIP; if none is, the patch with most of the region is. With a mask of zeros the
            copy sees the class token alone.
        blocks: In which blocks; negative numbers count from the end. By default in all, as
            MaskCLIP has it: a block that sees everything brings in what the later ones may not see.

    Raises:
        ValueError: If the tower pools in another way or its attention takes no mask (the message
            names the class), there is no such block, or the masks do not fit the images.
        RuntimeError: At the end, if no pass was masked: compiled towers run without hooks.
    """
    attends, layout = find_attentions(visual)
    chosen = set(range(len(attends))) if blocks is None else {_place(visual, b) for b in blocks}
    guide = _Guide(layout, _inside(masks, patch_size(visual)))
    home, modules = find_blocks(visual)
    with ExitStack() as stack:
        # Checkpointing would run the blocks again during backward, when the hooks are gone.
        stack.enter_context(setting(home, "grad_checkpointing", False))
        first, last = modules[0], modules[len(modules) - 1]
        stack.enter_context(first.register_forward_pre_hook(guide.prepend))
        stack.enter_context(last.register_forward_hook(guide.replace))
        for number, attend in enumerate(attends):
            if hasattr(attend, "num_prefix_tokens"):  # those before the patches, which EVA-02 turns
                prefix = layout.prefix + 1
                stack.enter_context(setting(attend, "num_prefix_tokens", prefix))
            hook = guide.confine if number in chosen else guide.hide
            stack.enter_context(attend.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    if not guide.passes:
        raise RuntimeError(
            f"expected a pass of {layout.tower} inside the context, saw none; a compiled tower "
            "skips hooks: pass the tower it was compiled from"
        )


def check_tower(visual: nn.Module) -> None:
    """Refuse a tower that `attending_to` can't mask.

    Raises:
        ValueError: As `attending_to` does.
    """
    find_attentions(visual)


@dataclass
class _Guide:
    """What the hooks of a tower do.

    Attributes:
        layout: The tower's tokens.
        inside: Which patches each copy may see.
        hidden: In the pass under way, which tokens (columns) each token (rows) does not see: where
            the copy is confined, and where it is merely not seen.
        passes: How many passes there were.
    """

    layout: TokenLayout
    inside: Bool[Tensor, "batch patches"]
    hidden: list[Tensor] = field(default_factory=list)
    passes: int = 0

    def prepend(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Put the copy in front."""
        x = args[0]
        expected = (len(self.inside), self.layout.prefix + self.inside.shape[1])
        if x.shape[:2] != expected:
            raise ValueError(
                f"the masks are for {expected[0]} images of {expected[1]} tokens, but "
                f"{self.layout.tower} was given {x.shape[0]} images of {x.shape[1]}; give each "
                "image a mask, and the tower images of its own size (patch dropout off)"
            )
        tokens = x.shape[1] + 1
        unseen = torch.zeros(len(x), tokens, tokens, dtype=torch.bool, device=x.device)
        unseen[:, :, 0] = True
        confined = unseen.clone()
        confined[:, 0, 1 + self.layout.prefix :] = ~self.inside.to(x.device)
        self.hidden[:] = [confined, unseen]
        self.passes += 1
        return torch.cat([x[:, :1], x], 1), *args[1:]

    def confine(self, attend: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Show the copy its region alone."""
        return args, {**kwargs, "attn_mask": mask_as_taken(attend, self.hidden[0], args[0])}

    def hide(self, attend: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Show the copy everything, and nobody the copy."""
        return args, {**kwargs, "attn_mask": mask_as_taken(attend, self.hidden[1], args[0])}

    def replace(self, _: nn.Module, args: Any, x: Tensor) -> Tensor:
        """Put the copy in the place of the class token."""
        return torch.cat([x[:, :1], x[:, 2:]], 1)


def find_attentions(visual: nn.Module) -> tuple[list[nn.Module], TokenLayout]:
    """Return the attention of each block, and the layout of the tokens.

    Raises:
        ValueError: If the features do not come from the class token, or the attention takes no
            mask; the message names the class.
    """
    from open_clip.transformer import Attention
    from timm.models.eva import EvaAttention
    from timm.models.vision_transformer import Attention as ViTAttention

    layout = TokenLayout.of(visual)
    if not layout.pools_class:
        raise ValueError(
            "attention masking needs a tower whose features come from its class token; "
            f"{layout.tower} pools in another way"
        )
    attends = [find_attention(visual, block) for block in range(len(find_blocks(visual)[1]))]
    for attend in attends:
        taken = isinstance(attend, nn.MultiheadAttention | Attention | EvaAttention | ViTAttention)
        if not taken or getattr(attend, "logit_scale", None) is not None:  # broken in open_clip 3.3
            raise ValueError(
                f"can't mask the attention of {type(attend).__name__}; expected "
                "nn.MultiheadAttention, open_clip's Attention without scaled cosine, or the "
                "attention of timm's ViT or EVA"
            )
    return attends, layout


def _place(visual: nn.Module, block: int) -> int:
    find_attention(visual, block)
    return block % len(find_blocks(visual)[1])


def patch_size(visual: Any) -> tuple[int, int]:
    """Return height and width of a patch, in pixels."""
    if not hasattr(visual, "trunk"):
        height, width = visual.patch_size
    else:  # not `patch_size`: a convolutional stem may come before (MobileCLIP-B)
        height, width = visual.trunk.patch_embed.feat_ratio(as_scalar=False)
    return height, width


def _inside(
    masks: Float[Tensor, "batch 1 height width"], patch: tuple[int, int]
) -> Bool[Tensor, "batch patches"]:
    """Say which patches a region reaches."""
    if masks.ndim != 4 or masks.shape[1] != 1 or min(masks.shape[2:]) < max(patch):
        raise ValueError(
            "expected masks [batch, 1, height, width] in the pixels of the tower's input, got "
            f"{list(masks.shape)}"
        )
    masks = masks.float()
    if not bool(((masks >= 0) & (masks <= 1)).all()):
        raise ValueError(
            f"masks must lie in 0..1, got {float(masks.min()):g}..{float(masks.max()):g}; of a "
            "normalised alpha take Normalisation.inverse"
        )
    largest, mean = F.max_pool2d(masks, patch).flatten(1), F.avg_pool2d(masks, patch).flatten(1)
    most, place = mean.max(1, keepdim=True)
    none = (largest < 0.5).all(1, keepdim=True) & (most > 0)
    return (largest >= 0.5) | none & torch.zeros_like(mean, dtype=torch.bool).scatter(
        1, place, True
    )


def mask_as_taken(attend: Any, hidden: Tensor, x: Tensor) -> Tensor:
    """Return a mask in the form that a kind of attention takes."""
    from timm.models.eva import EvaAttention
    from timm.models.vision_transformer import Attention

    if isinstance(attend, EvaAttention | Attention):
        added = torch.zeros_like(hidden[:, None], dtype=x.dtype)
        return added.masked_fill_(hidden[:, None], -torch.inf)
    return hidden.repeat_interleave(attend.num_heads, 0)
