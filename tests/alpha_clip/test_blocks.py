"""Where the blocks of a tower are: every architecture on the meta device, and families by name."""

import open_clip
import pytest
import torch
from test_surgery_towers import build
from torch import nn

from alpha_clip.blocks import group_by_block
from alpha_clip.surgery import add_alpha_channel

# What a name begins with says where it belongs: written down from the towers' sources.
TIMM_VIT = (12, "trunk.blocks.", ("trunk.patch_embed.", "trunk.cls_token", "trunk.pos_embed"))
FAMILIES = {
    "ViT-B-32": (
        *(12, "transformer.resblocks."),
        ("conv1.", "class_embedding", "positional_embedding", "ln_pre."),
        ("ln_post.", "proj"),
    ),
    "coca_ViT-B-32": (
        *(12, "transformer.resblocks."),
        ("conv1.", "class_embedding", "positional_embedding", "ln_pre."),
        ("ln_post.", "proj", "attn_pool."),
    ),
    "ViT-B-16-SigLIP": (*TIMM_VIT, ("trunk.attn_pool.",)),
    "EVA02-B-16": (*TIMM_VIT, ("trunk.head.",)),
    "PE-Core-B-16": (
        *TIMM_VIT[:2],
        (*TIMM_VIT[2], "trunk.norm_pre."),
        ("trunk.attn_pool.", "trunk.head."),
    ),
    "convnext_base": (36, "trunk.stages.", ("trunk.stem.",), ("trunk.head.", "head.")),
    "RN50": (16, "layer", ("conv1.", "conv2.", "conv3.", "bn1.", "bn2.", "bn3."), ("attnpool.",)),
    "swin_base_patch4_window7_224": (24, "trunk.layers.", ("trunk.patch_embed.",), ("head.",)),
}


def meta_tower(name: str) -> nn.Module:
    with torch.device("meta"):
        return build(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tower_falls_into_stem_blocks_and_head(name: str) -> None:
    count, inside, before, after = FAMILIES[name]
    visual = meta_tower(name)
    found = group_by_block(visual)
    assert len(found.blocks) == count
    names = [n for n, _ in visual.named_parameters()]
    # timm lets the last norm learn with the last block.
    flat = {n for block in found.blocks for n in block if not n.startswith("trunk.norm.")}
    assert flat == {n for n in names if n.startswith(inside)}
    assert found.stem == [n for n in names if n.startswith(before)]
    assert found.head == [n for n in names if n.startswith(after)]
    norm = {n for n in names if n.startswith("trunk.norm.")}
    assert norm == {n for n in found.blocks[-1] if n.startswith("trunk.norm.")}


def test_blocks_are_in_the_order_of_the_forward_pass() -> None:
    for name, stem in (("ViT-B-32", "transformer.resblocks"), ("EVA02-B-16", "trunk.blocks")):
        blocks = group_by_block(meta_tower(name)).blocks
        for index, block in enumerate(blocks):
            assert all(n.startswith((f"{stem}.{index}.", "trunk.norm.")) for n in block)
    stages = [3, 3, 27, 3]  # convnext_base
    places = [(stage, block) for stage, depth in enumerate(stages) for block in range(depth)]
    for (stage, index), block in zip(
        places, group_by_block(meta_tower("convnext_base")).blocks, strict=True
    ):
        own = [f"trunk.stages.{stage}.blocks.{index}."]
        own += [f"trunk.stages.{stage}.downsample."] * (index == 0)
        assert all(n.startswith(tuple(own)) for n in block)


def test_a_bare_timm_model_has_blocks() -> None:
    import timm

    found = group_by_block(timm.create_model("test_vit"))
    assert found.blocks[0][0].startswith("blocks.0.")
    assert "pos_embed" in found.stem


@pytest.mark.slow
@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_architecture_falls_into_them(name: str) -> None:
    visual = add_alpha_channel(meta_tower(name))
    found = group_by_block(visual)
    everything = found.stem + [n for block in found.blocks for n in block] + found.head
    assert sorted(everything) == sorted(n for n, _ in visual.named_parameters())
    assert len(found.blocks) >= 10
    assert all(found.blocks)
    alpha = [n for n in everything if n.endswith("weight_alpha")]
    assert alpha
    assert set(alpha) <= set(found.stem)


class Silent(nn.Module):
    def __init__(self, facts: object = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        if facts is not None:
            self.group_matcher = lambda: facts


@pytest.mark.parametrize(
    "facts", [None, {}, {"stem": "conv1"}, {"stem": "conv1", "blocks": r"nothing\.(\d+)"}]
)
def test_a_tower_that_does_not_say_is_refused_by_name(facts: object) -> None:
    with pytest.raises(ValueError, match="Silent does not say where its blocks are"):
        group_by_block(Silent(facts))
