"""Late alpha: alpha enters in front of a later block, so what lies before it runs once an image.

The paper adds alpha to the first layer's output (arXiv 2312.03818, section 3.2), and every region
costs a whole pass. Here the blocks before block k see the picture alone, all its regions share what
they found, and the rest runs once a region. Everything that is added begins at zero: the tower
starts exactly as the CLIP it came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from alpha_clip.attention import find_blocks
from alpha_clip.attention_masking import patch_size
from alpha_clip.token_tower import (
    Tokens,
    can_end_short,
    check_pieces,
    embed,
    end_short,
    finish,
    grid_of,
    run,
)

# What every patch counts in a summary, so that an alpha that is the same everywhere means the whole
# image; a patch that lies inside a region counts some 15.
_LEAST_SHARE = 1e-4


@dataclass(frozen=True)
class AlphaEntry:
    """Where alpha enters a tower, and how.

    Attributes:
        block: In front of which block. Block 0 with neither of the following is the paper's place:
            the first layer.
        repeat: Whether alpha is added again in front of every later block, each time by a kernel of
            its own.
        summary: Whether the class token (in towers without one, every patch) is also given the mean
            of the patches under alpha, through a matrix of its own, wherever alpha is added.

    Raises:
        ValueError: If the block is no number, or negative; if the others are not true or false.
    """

    block: int = 0
    repeat: bool = True
    summary: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 0:
            raise ValueError(
                f"expected alpha_block to be the number of a block, 0 or more, got {self.block!r}"
            )
        if not isinstance(self.repeat, bool) or not isinstance(self.summary, bool):
            raise ValueError(
                f"expected repeat and summary to be true or false, got {self.repeat!r} and "
                f"{self.summary!r}"
            )

    @classmethod
    def of(cls, block: int | AlphaEntry) -> AlphaEntry:
        """Return what a block's number stands for: with all that helps, and for 0 the paper's."""
        if isinstance(block, AlphaEntry):
            return block
        return cls(block, repeat=block != 0, summary=block != 0)

    @property
    def is_first_layer(self) -> bool:
        """Whether alpha enters where the paper has it."""
        return self == FIRST_LAYER


FIRST_LAYER = AlphaEntry(0, repeat=False, summary=False)


class AlphaPatches(nn.Module):
    """Alpha as something to add to the patches: a zero-initialised convolution, patch by patch.

    Args:
        width: Width of the tokens.
        patch: Height and width of a patch in pixels.
        summary: Whether the region's mean patch is handed on as well; see `AlphaEntry`.
    """

    def __init__(self, width: int, patch: tuple[int, int], summary: bool) -> None:
        super().__init__()
        self.weight_alpha = nn.Parameter(torch.zeros(width, 1, *patch))
        self.summary = AlphaSummary(width) if summary else None

    def forward(self, tokens: Tokens, alpha: Float[Tensor, "batch 1 height width"]) -> Tokens:
        """Add alpha to tokens: class and register tokens first, then the patches."""
        patch = self.weight_alpha.shape[-2:]
        added = F.conv2d(alpha, self.weight_alpha, stride=patch).flatten(2).transpose(1, 2)
        prefix = tokens.shape[1] - added.shape[1]
        others, patches = tokens.split([prefix, added.shape[1]], 1)
        if self.summary is not None:
            seen = self.summary(patches, F.avg_pool2d(alpha - alpha.amin((2, 3), True), patch))
            others, added = (others + seen, added) if prefix else (others, added + seen)
        return torch.cat([others, patches + added], 1)


class AlphaSummary(nn.Module):
    """What lies in a region: the mean of the patches under alpha, normed, through a zero matrix.

    Args:
        width: Width of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_alpha = nn.Parameter(torch.zeros(width, width))

    def forward(
        self, patches: Tokens, inside: Float[Tensor, "batch 1 rows columns"]
    ) -> Float[Tensor, "batch 1 width"]:
        """Return the region's summary.

        It is a mean over the region's pixels. Each shows the patch that it is in, and counts by
        how much of that patch is inside: patches at the edge show as much of what lies outside.

        Args:
            patches: Tokens of the patches.
            inside: Mean alpha in each, above the least of the image.
        """
        share = inside.flatten(2).square() + _LEAST_SHARE
        share = share / share.sum(-1, keepdim=True)
        mean = share @ F.layer_norm(patches, patches.shape[-1:])
        # Scaled, so that the rate that suits alpha's convolutions suits this matrix, too.
        seen: Tensor = F.linear(mean, self.weight_alpha) * mean.shape[-1] ** -0.5
        return seen


class LateAlpha:
    """What a tower with late alpha can do beside what its own class can; see `add_late_alpha`.

    Attributes:
        alpha_entry: Where alpha enters, and how.
        alpha_patches: What adds it, for each block in front of which it is added.
    """

    alpha_entry: AlphaEntry
    alpha_patches: nn.ModuleList

    def image_tokens(self, rgb: Float[Tensor, "images 3 height width"]) -> Tokens:
        """Return what the blocks before alpha make of normalised images: once an image."""
        grid = grid_of(self, (rgb.shape[-2], rgb.shape[-1]))
        return run(self, embed(self, rgb), grid, range(self.alpha_entry.block))

    def region_features(
        self,
        tokens: Tokens,
        alpha: Float[Tensor, "regions 1 height width"],
        exactly: bool = False,
    ) -> Any:
        """Return the features of regions: once a region.

        Args:
            tokens: `image_tokens` of each region's image.
            alpha: Normalised alphas.
            exactly: Whether to take the whole last block, as the tower's own pass does; otherwise
                only what its features need, where that is known.
        """
        grid = grid_of(self, (alpha.shape[-2], alpha.shape[-1]))
        first, last = self.alpha_entry.block, len(find_blocks(self)[1]) - 1  # type: ignore[arg-type]
        for block in range(first, last + 1):
            if block - first < len(self.alpha_patches):
                tokens = self.alpha_patches[block - first](tokens, alpha)
            if block == last and not exactly and can_end_short(self):
                return end_short(self, tokens)
            tokens = run(self, tokens, grid, [block])
        return finish(self, tokens)

    def forward(self, rgba: Float[Tensor, "batch 4 height width"]) -> Any:
        """Return what the tower's own class returns, for images with alpha.

        Raises:
            ValueError: If the input does not have four channels.
        """
        if rgba.shape[-3] != 4:
            raise ValueError(
                "an alpha tower takes 4 channels (RGB + alpha), got an input of shape "
                f"{list(rgba.shape)}; build it with RegionTransform, or call "
                "AlphaClip.encode_image, which looks at the whole image when alpha is missing"
            )
        # The class's own, since FSDP wraps those of the object, and must not be entered twice.
        tokens = LateAlpha.image_tokens(self, rgba[:, :3])
        return LateAlpha.region_features(self, tokens, rgba[:, 3:], exactly=True)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each block, so that both halves profit; see `nn.Module.compile`."""
        for block in find_blocks(self)[1]:  # type: ignore[arg-type]
            block.compile(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time; pickle finds only what a module holds.
        kind = next(k for k in type(self).__mro__ if LateAlpha not in k.__mro__)
        return _empty, (kind,), self.__getstate__()  # type: ignore[attr-defined]


@cache
def _late(kind: Any) -> Any:
    return type(f"LateAlpha{kind.__name__}", (LateAlpha, kind), {"__doc__": LateAlpha.__doc__})


def _empty(kind: Any) -> Any:
    return object.__new__(_late(kind))


def add_late_alpha(visual: nn.Module, entry: AlphaEntry) -> nn.Module:
    """Let alpha enter a tower in front of a block, in place, without changing what it computes.

    Args:
        visual: An open_clip image tower of tokens: open_clip's own ViT; timm's ViT (SigLIP), EVA
            and Perception Encoder, ViT with relative positions.
        entry: Where, if not at the first layer.

    Returns:
        The same tower; it now takes `[batch, 4, height, width]`.

    Raises:
        ValueError: If the tower has no blocks of tokens, or not this one, or nobody knows how to
            run it in pieces; the message names its class.
    """
    check_pieces(visual)
    count, patch = len(find_blocks(visual)[1]), patch_size(visual)
    tower: Any = visual
    trunk = getattr(tower, "trunk", tower)
    if entry.block >= count:
        raise ValueError(
            f"{type(trunk).__name__} has {count} blocks: expected alpha_block in 0..{count - 1}, "
            f"got {entry.block}"
        )
    width: int = trunk.class_embedding.shape[-1] if trunk is tower else trunk.embed_dim
    places = count - entry.block if entry.repeat else 1
    parts = nn.ModuleList(AlphaPatches(width, patch, entry.summary) for _ in range(places))
    like = next(visual.parameters())
    tower.alpha_entry, tower.alpha_patches = entry, parts.to(like.device, like.dtype)
    kind: Any = type(visual)
    tower.__class__ = _late(kind)  # the same object: every parameter and key stays
    return visual
