"""LoRA weights of the published training script, and what the published layout can hold."""

import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from alpha_clip.layouts import merge_lora, to_published
from alpha_clip.surgery import add_alpha_channel, fold_alpha

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1}


@pytest.mark.parametrize("rank", [1, 4])
def test_a_lora_layer_is_merged(rank: int) -> None:
    weight, x = torch.randn(6, 5), torch.randn(3, 5)
    down, up = torch.randn(rank, 5), torch.randn(6, rank)
    state = {"c_fc.weight": weight, "c_fc.lora_A": down, "c_fc.lora_B": up}
    merged = merge_lora(state, "here")
    assert list(merged) == ["c_fc.weight"]
    torch.testing.assert_close(
        x @ merged["c_fc.weight"].T, x @ weight.T + (x @ down.T) @ up.T / rank
    )
    assert torch.equal(state["c_fc.weight"], weight)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_joint_projection_adapts_query_and_value(rank: int) -> None:
    """`loralib.MergedLinear(enable_lora=[True, False, True])`: two low-rank changes, none for k."""
    dim = 6
    weight, x = torch.randn(3 * dim, dim), torch.randn(2, dim)
    down, up = torch.randn(2 * rank, dim), torch.randn(2 * dim, rank)
    state = {"in_proj.weight": weight, "in_proj.lora_A": down, "in_proj.lora_B": up}
    q, k, v = (x @ merge_lora(state, "here")["in_proj.weight"].T).chunk(3, -1)
    q0, k0, v0 = (x @ weight.T).chunk(3, -1)
    assert torch.equal(k, k0)
    torch.testing.assert_close(q, q0 + x @ (up[:dim] @ down[:rank]).T / rank)
    torch.testing.assert_close(v, v0 + x @ (up[dim:] @ down[rank:]).T / rank)


@pytest.mark.parametrize(
    ("down", "up"), [((4, 5), (6, 3)), ((4, 5), (7, 4)), ((4, 5), (6, 0)), ((0, 5), (6, 0))]
)
def test_lora_of_another_shape_is_refused(down: tuple[int, int], up: tuple[int, int]) -> None:
    state = {"c.weight": torch.zeros(6, 5), "c.lora_A": torch.zeros(down)}
    state["c.lora_B"] = torch.zeros(up)
    with pytest.raises(ValueError, match=r"LoRA weights of c in here do not fit: lora_A"):
        merge_lora(state, "here")


def tower(**change: object) -> nn.Module:
    visual: nn.Module = CLIP(32, {**VIT, **change}, TEXT).visual
    return visual


REFUSED = {
    "no alpha": tower,
    "folded": lambda: fold_alpha(add_alpha_channel(tower())),
    "attention pooling": lambda: add_alpha_channel(tower(attentional_pool=True)),
    "timm": lambda: add_alpha_channel(
        tower(timm_model_name="test_resnet", timm_model_pretrained=False, image_size=64)
    ),
}


@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED.keys())
def test_towers_that_the_published_code_lacks_are_refused(build: object) -> None:
    with pytest.raises(ValueError, match="published layout holds OpenAI's ViT or ModifiedResNet"):
        to_published(build())  # type: ignore[operator]


def test_published_names() -> None:
    state: dict[str, Tensor] = to_published(add_alpha_channel(tower()))
    assert state["conv1_alpha.weight"].shape == (64, 1, 8, 8)
    assert "transformer.resblocks.0.attn.in_proj.weight" in state
    assert "transformer.resblocks.0.attn.in_proj.bias" in state
    assert "transformer.resblocks.0.attn.out_proj.weight" in state
    assert all(not k.endswith(("in_proj_weight", "weight_alpha")) for k in state)
