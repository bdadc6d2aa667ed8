"""SAM's encoder with fused attention: same parameters, same features."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention

from data_pipeline.segmenters import sam_attention
from data_pipeline.segmenters.sam_attention import FusedAttention, use_fused_attention


def build_encoder(use_rel_pos=True):
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=128,
        patch_size=8,
        depth=4,
        embed_dim=48,
        num_heads=3,
        mlp_ratio=2,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=use_rel_pos,
        global_attn_indexes=[1, 3],
        window_size=7,  # 16 patches a side: windows reach over the edge
        out_chans=32,
    ).eval()
    with torch.no_grad():
        for block in encoder.blocks:
            if use_rel_pos:  # zeros at first
                block.attn.rel_pos_h.normal_()
                block.attn.rel_pos_w.normal_()
    return encoder


@pytest.mark.parametrize(
    ("shape", "size"),
    [((2, 16, 16), (16, 16)), ((5, 7, 7), (7, 7)), ((1, 6, 9), (6, 9))],
    ids=["global", "windows", "oblong"],
)
@pytest.mark.parametrize("limit", [2**24, 2000, 1], ids=["at once", "some rows", "row by row"])
@pytest.mark.parametrize("use_rel_pos", [True, False])
def test_attention_equals_the_original(shape, size, limit, use_rel_pos, monkeypatch):
    monkeypatch.setattr(sam_attention, "_CPU_BIAS", limit)
    torch.manual_seed(1)
    attention = Attention(48, 3, use_rel_pos=use_rel_pos, input_size=size)
    if use_rel_pos:
        torch.nn.init.normal_(attention.rel_pos_h)
        torch.nn.init.normal_(attention.rel_pos_w)
    x = 3 * torch.randn(*shape, 48)
    with torch.no_grad():
        torch.testing.assert_close(FusedAttention(attention)(x), attention(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("use_rel_pos", [True, False])
def test_encoder_gives_the_same_features(use_rel_pos, dtype, atol):
    encoder = build_encoder(use_rel_pos).to(dtype)
    fused = deepcopy(encoder)
    use_fused_attention(fused)
    x = torch.randn(2, 3, 128, 128, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), encoder(x), atol=atol, rtol=0)


def test_positions_count():
    fused = build_encoder()
    use_fused_attention(fused)
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        before = fused(x)
        for block in fused.blocks:
            block.attn.rel_pos_w.zero_()
        assert (fused(x) - before).abs().max() > 0.01


def test_parameters_are_the_same_under_the_same_names():
    encoder = build_encoder()
    before = dict(encoder.named_parameters())
    use_fused_attention(encoder)
    after = dict(encoder.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    replaced = [block.attn for block in encoder.blocks]
    assert all(isinstance(attention, FusedAttention) for attention in replaced)
    use_fused_attention(encoder)
    assert [block.attn for block in encoder.blocks] == replaced


def test_bias_of_the_whole_image_never_exists(monkeypatch):
    monkeypatch.setattr(sam_attention, "_CPU_BIAS", 3 * 16 * 256 * 4)  # four rows
    attention = FusedAttention(build_encoder().blocks[1].attn)
    masks, original = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, attn_mask):
        masks.append(tuple(attn_mask.shape))
        return original(*arguments, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        attention(torch.randn(1, 16, 16, 48))
    assert masks == [(1, 3, 64, 256)] * 4


def test_gradients_flow_as_in_the_original():
    attention = build_encoder().blocks[1].attn
    x = torch.randn(1, 16, 16, 48)
    gradients = []
    for module in (attention, FusedAttention(attention)):
        module.zero_grad()
        module(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
