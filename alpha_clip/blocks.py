"""The blocks of an image tower: what comes before them, each of them, and what follows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from alpha_clip.surgery import alpha_parameters

# Regular expressions for names of parameters, as timm's trunks give them for themselves.
_RESNET = {"stem": r"conv|bn", "blocks": r"layer(\d+)\.(\d+)"}
_VIT = {
    "stem": r"conv1|class_embedding|positional_embedding|ln_pre",
    "blocks": r"transformer\.resblocks\.(\d+)",
}


@dataclass(frozen=True)
class TowerBlocks:
    """Names of a tower's parameters, in the order in which a picture meets them.

    Attributes:
        stem: Patches, class token, positions, and the norm after them.
        blocks: One list a block. What changes the resolution belongs to the block after it; in most
            towers of timm the last norm belongs to the last block.
        head: Final norm, pooling, projection. Late alpha belongs to none of the three.
    """

    stem: list[str]
    blocks: list[list[str]]
    head: list[str]


def group_by_block(visual: nn.Module) -> TowerBlocks:
    """Sort the parameters of an image tower by block.

    Args:
        visual: An open_clip image tower, or a timm model.

    Raises:
        ValueError: If it is not known where this tower's blocks are.
    """
    from timm.models import group_parameters

    trunk: nn.Module = getattr(visual, "trunk", visual)
    prefix = "" if trunk is visual else "trunk."
    matcher = _matcher(trunk)
    # Asked for the blocks alone, timm puts all that belongs to none of them last, whether anything
    # follows the blocks or not. A name that the stem claims is the stem's.
    *groups, _ = group_parameters(trunk, {"blocks": matcher["blocks"]}).values()
    if not groups:
        raise _unknown(trunk)
    stem = {prefix + n for n, _ in trunk.named_parameters() if re.match(matcher["stem"], n)}
    blocks = [[prefix + n for n in group if prefix + n not in stem] for group in groups]
    inside = {name for block in blocks for name in block}
    alpha = {id(kernel) for kernel in alpha_parameters(visual)}
    names = [name for name, p in visual.named_parameters() if name in stem or id(p) not in alpha]
    return TowerBlocks(
        stem=[name for name in names if name in stem],
        blocks=blocks,
        head=[name for name in names if name not in inside | stem],
    )


def _matcher(trunk: Any) -> dict[str, Any]:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    if isinstance(trunk, VisionTransformer):
        return _VIT
    if isinstance(trunk, ModifiedResNet):
        return _RESNET
    facts = trunk.group_matcher() if hasattr(trunk, "group_matcher") else {}
    if not isinstance(facts.get("stem"), str) or not facts.get("blocks"):
        raise _unknown(trunk)
    return dict(facts)


def _unknown(trunk: nn.Module) -> ValueError:
    return ValueError(
        f"{type(trunk).__name__} does not say where its blocks are (timm's `group_matcher`); train "
        "the whole tower, or alpha alone"
    )
