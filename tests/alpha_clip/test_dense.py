from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_attention import TOWERS, images, own
from test_attention_masking import MASKED, blocks_of

from alpha_clip.dense import dense_features, pool_boxes, pool_masks
from alpha_clip.surgery import add_alpha_channel


@torch.no_grad()
def test_the_value_path_by_hand() -> None:
    """MaskCLIP's last block: the value of each token, projected, instead of the mean of all."""
    visual: Any = own()
    rgb = images(visual)
    seen: list[torch.Tensor] = []
    last = visual.transformer.resblocks[-1]
    hook = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    visual(rgb)
    hook.remove()
    x = seen[0]
    weight, bias = last.attn.in_proj_weight.chunk(3)[2], last.attn.in_proj_bias.chunk(3)[2]
    x = x + last.ls_1(last.attn.out_proj(F.linear(last.ln_1(x), weight, bias)))
    x = x + last.ls_2(last.mlp(last.ln_2(x)))
    expected = F.normalize(visual.ln_post(x[:, 1:]) @ visual.proj, dim=-1)
    dense = dense_features(visual, rgb)
    torch.testing.assert_close(dense.flatten(2).transpose(1, 2), expected)


@pytest.mark.parametrize("name", MASKED)
@torch.no_grad()
def test_in_the_last_block_a_patch_sees_itself_alone(name: str) -> None:
    visual: Any = TOWERS[name][0]()
    rgb = images(visual)
    plain = dense_features(visual, rgb)
    batch, _, rows, columns = plain.shape
    assert batch == len(rgb)
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(batch, rows, columns))

    def disturb(_: Any, args: Any) -> Any:
        """Change the last patch and whatever comes before the patches."""
        x = args[0].clone()
        x[:, [0, -1]] = x[:, [0, -1]].flip(-1)
        return x, *args[1:]

    blocks = blocks_of(visual)
    hook = blocks[len(blocks) - 1].register_forward_pre_hook(disturb)
    disturbed = dense_features(visual, rgb).flatten(2)
    hook.remove()
    torch.testing.assert_close(disturbed[..., :-1], plain.flatten(2)[..., :-1])
    assert not torch.allclose(disturbed[..., -1], plain.flatten(2)[..., -1], atol=1e-3)


@torch.no_grad()
def test_the_tower_is_as_before_and_takes_alpha() -> None:
    visual: Any = own()
    rgb = images(visual)
    before, plain = visual(rgb), dense_features(visual, rgb)
    assert torch.equal(visual(rgb), before)
    rgba = torch.cat([rgb, torch.ones_like(rgb[:, :1])], 1)
    torch.testing.assert_close(dense_features(add_alpha_channel(visual), rgba), plain)


def test_a_tower_without_a_class_token_is_refused() -> None:
    visual: Any = TOWERS["SigLIP"][0]()
    with pytest.raises(ValueError, match="pools in another way"):
        dense_features(visual, images(visual))


def test_pooling_by_hand() -> None:
    dense = torch.zeros(1, 3, 2, 4)
    dense[0, 0, 0, :2] = 1  # upper left
    dense[0, 1, 1] = 1  # below
    dense[0, 2, 0, 2:] = 1  # upper right
    mask = torch.zeros(1, 1, 8, 16)  # patches of 4 px
    mask[..., :4, 4:10] = 1  # one patch of the left, half a patch of the right
    torch.testing.assert_close(
        pool_masks(dense, mask), F.normalize(torch.tensor([[1.0, 0, 0.5]]), dim=-1)
    )
    mask = torch.zeros(1, 1, 8, 16)
    mask[..., 4:, 4:12] = 1
    torch.testing.assert_close(
        pool_boxes(dense, mask), F.normalize(torch.tensor([[0.0, 1, 0]]), dim=-1), atol=0.3, rtol=0
    )
    everything = pool_boxes(dense, torch.zeros(1, 1, 8, 16))
    assert everything.argmax() == 1
