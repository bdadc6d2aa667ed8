"""Low-rank updates: nothing at first, merged as peft merges, and at home in every mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from test_surgery_towers import FAMILIES, build, features, size_of
from torch import Tensor, nn

from alpha_clip.attention import encode_with_attention
from alpha_clip.lora import LayeredAttention, LoraConfig, add_lora, lora_parameters, merge_lora
from alpha_clip.surgery import add_alpha_channel, alpha_parameters

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
CONFIG = LoraConfig(rank=4, alpha=6.0)
Make = Callable[[], tuple[nn.Module, Tensor]]


def timm_tower(name: str, size: int, **more: Any) -> nn.Module:
    """A small tower of a family, in open_clip's adapter."""
    vision = {"image_size": size, "timm_model_name": name, "timm_model_pretrained": False}
    return CLIP(32, {**vision, "timm_proj": "linear", **more}, TEXT).visual


def eva(q_bias: bool) -> nn.Module:
    """EVA-01 (biases apart from the joint projection) or EVA-02 (three projections, SwiGLU)."""
    from timm.models.eva import Eva

    new = {} if q_bias else {"qkv_fused": False, "swiglu_mlp": True, "use_rot_pos_emb": True}
    tower = Eva(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=8, **new)
    tower.pretrained_cfg = {"first_conv": "patch_embed.proj"}
    assert (tower.blocks[0].attn.q_bias is not None) == q_bias
    return tower


TOWERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ViT": (lambda: CLIP(32, VIT, TEXT).visual, 32),
    "SigLIP": (lambda: timm_tower("test_vit", 160, timm_pool="map", timm_proj="none"), 160),
    "EVA-01": (lambda: eva(True), 32),
    "EVA-02": (lambda: eva(False), 32),
    "ConvNeXt": (lambda: timm_tower("test_convnext", 96, timm_pool="avg"), 96),
}


@pytest.fixture(params=TOWERS.values(), ids=TOWERS.keys())
def make(request: pytest.FixtureRequest) -> Make:
    """Build the same alpha tower again and again, in train mode, and RGBA for it."""
    build_tower, size = request.param

    def run() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        visual = add_alpha_channel(build_tower()).train()
        for parameter in alpha_parameters(visual):
            nn.init.normal_(parameter, std=0.05)
        return visual, torch.randn(2, 4, size, size)

    return run


def trained(visual: nn.Module, config: LoraConfig = CONFIG) -> nn.Module:
    """Add updates that are not zero."""
    add_lora(visual, config)
    for name, parameter in visual.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return visual


def test_nothing_changes_at_first(make: Make) -> None:
    visual, rgba = make()
    expected = visual(rgba)
    assert torch.equal(add_lora(visual, CONFIG)(rgba), expected)
    with torch.no_grad():
        found = visual.eval()(rgba)
        plain = make()[0].eval()(rgba)
    # Frozen attention runs through a fused kernel in eval mode, which rounds in another order.
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_only_the_updates_learn(make: Make) -> None:
    visual, rgba = make()
    trained(visual)(rgba).square().sum().backward()
    updates = {id(p) for p in lora_parameters(visual)}
    assert len(updates) >= 8
    for name, parameter in visual.named_parameters():
        assert parameter.requires_grad == (id(parameter) in updates) == (".lora_" in name)
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.grad is None or parameter.grad.any(), name


def test_alpha_can_learn_with_them(make: Make) -> None:
    visual, rgba = make()
    trained(visual)
    (kernel,) = alpha_parameters(visual)
    kernel.requires_grad_(True)
    visual(rgba).square().sum().backward()
    assert kernel.grad is not None
    assert kernel.grad.abs().max() > 0


def test_merged_weights_load_into_the_plain_tower(make: Make) -> None:
    visual, rgba = make()
    plain, _ = make()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    state = trained(visual).state_dict()
    merged = merge_lora(state, CONFIG)
    assert list(merged) == list(before)
    plain.load_state_dict(merged)
    expected = visual(rgba)
    tolerance = 1e-5 * float(expected.detach().abs().max())
    torch.testing.assert_close(plain(rgba), expected, rtol=1e-4, atol=tolerance)
    changed = {key for key in before if not torch.equal(before[key], merged[key])}
    adapted = {key.split(".lora_A.")[0] for key in state if ".lora_A." in key}
    attention = {a.replace(".in_proj", ".in_proj_weight") for a in adapted if "in_proj" in a}
    assert changed == attention | {f"{a}.weight" for a in adapted if "in_proj" not in a}


def test_merging_equals_pefts_own(make: Make) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    visual = trained(make()[0])
    ours = merge_lora({k: v.clone() for k, v in visual.state_dict().items()}, CONFIG)
    theirs = {}
    for name, layer in visual.named_modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            weight = layer.get_base_layer().weight
            theirs[f"{name}.weight".replace(".in_proj.weight", ".in_proj_weight")] = weight
    assert theirs
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=1e-6)


def test_pefts_layer_for_multihead_attention_computes_the_same() -> None:
    """Of the joint projection: its update of `out_proj` counts twice (peft's pull request 3774)."""
    from peft import LoraConfig as PeftConfig
    from peft import LoraModel

    make_tower = TOWERS["ViT"][0]
    torch.manual_seed(0)
    visual, other = make_tower(), make_tower()
    other.load_state_dict(visual.state_dict())
    trained(visual, LoraConfig(rank=4, alpha=6.0, targets=["in_proj"]))
    peft = LoraModel(other, PeftConfig(r=4, lora_alpha=6, target_modules=["attn"]), "default")
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            if ".lora_" in name:
                theirs[name.replace(".in_proj.", ".")].copy_(parameter)
    rgb = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(visual(rgb), other(rgb))
    merged = merge_lora(visual.state_dict(), CONFIG)
    expected = peft.merge_and_unload().state_dict()
    assert set(merged) == set(expected)
    for key, value in merged.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)


def test_a_whole_clip_is_merged_with_its_prefix() -> None:
    torch.manual_seed(0)
    clip = CLIP(32, VIT, TEXT)
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    trained(clip.visual)
    outer = {f"model.clip.{key}": value for key, value in clip.state_dict().items()}
    merged = merge_lora(outer, CONFIG)
    assert list(merged) == [f"model.clip.{key}" for key in before]
    text = [key for key in before if not key.startswith("visual.")]
    assert all(torch.equal(merged[f"model.clip.{key}"], before[key]) for key in text)


def test_a_state_without_updates_comes_back_unchanged() -> None:
    state = {"model.attn.in_proj.weight": torch.ones(2), "conv1_alpha.weight": torch.ones(1)}
    assert merge_lora(state, CONFIG) is state


def test_the_state_itself_is_left_alone() -> None:
    visual = trained(TOWERS["ViT"][0]())
    state = {key: value.clone() for key, value in visual.state_dict().items()}
    merge_lora(state, CONFIG)
    for key, value in visual.state_dict().items():
        assert torch.equal(state[key], value)


def test_half_precision_is_merged_in_single() -> None:
    visual = trained(TOWERS["ViT"][0]())
    expected = merge_lora({k: v.bfloat16().float() for k, v in visual.state_dict().items()}, CONFIG)
    merged = merge_lora({k: v.bfloat16() for k, v in visual.state_dict().items()}, CONFIG)
    assert all(torch.equal(merged[key], expected[key].bfloat16()) for key in merged)


def test_parts_that_do_not_fit_are_refused() -> None:
    state = trained(TOWERS["ViT"][0]()).state_dict()
    with pytest.raises(ValueError, match="updates of rank 2, got weight, A and B of"):
        merge_lora(state, LoraConfig(rank=2))
    half = {key: value for key, value in state.items() if ".lora_B." not in key}
    with pytest.raises(ValueError, match=r"in_proj to have .* None\]; merge with"):
        merge_lora(half, CONFIG)


# Which layers.


def adapted(visual: nn.Module) -> set[str]:
    names = {name for name, _ in visual.named_parameters() if ".lora_A." in name}
    return {name.split(".lora_A.")[0] for name in names}


def test_every_linear_layer_of_the_blocks_is_adapted() -> None:
    visual = add_lora(TOWERS["ViT"][0](), CONFIG)
    kinds = ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    assert adapted(visual) == {f"transformer.resblocks.{i}.{k}" for i in (0, 1) for k in kinds}
    visual = add_lora(TOWERS["SigLIP"][0](), CONFIG)
    assert {name.split(".", 3)[3] for name in adapted(visual)} == {
        *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert not any("attn_pool" in name for name in adapted(visual))


def test_layers_can_be_named() -> None:
    visual = add_lora(TOWERS["ViT"][0](), LoraConfig(targets=["c_fc", "1.attn.out_proj"]))
    assert adapted(visual) == {
        *("transformer.resblocks.0.mlp.c_fc", "transformer.resblocks.1.mlp.c_fc"),
        "transformer.resblocks.1.attn.out_proj",
    }
    kinds = [type(block.attn) for block in visual.transformer.resblocks]
    assert kinds == [nn.MultiheadAttention, LayeredAttention]
    merged = merge_lora(visual.state_dict(), LoraConfig(targets=["c_fc"]))
    assert list(merged) == list(TOWERS["ViT"][0]().state_dict())


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no linear layer called qkv, fc; .* c_fc, c_proj, in_p"):
        add_lora(TOWERS["ViT"][0](), LoraConfig(targets=["qkv", "c_fc", "fc"]))


def test_a_tower_without_linear_layers_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"ModifiedResNet have no linear layer .* alpha alone"):
        add_lora(CLIP(32, RESNET, TEXT).visual, CONFIG)


def test_updates_are_added_once() -> None:
    visual = add_lora(TOWERS["ViT"][0](), CONFIG)
    with pytest.raises(ValueError, match="VisionTransformer has low-rank updates already"):
        add_lora(visual, CONFIG)


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}, {"targets": []}]
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected LoRA of rank >= 1"):
        LoraConfig(**values)


@pytest.mark.parametrize(
    "options", [{"batch_first": False}, {"dropout": 0.1}, {"kdim": 8}, {"add_zero_attn": True}]
)
def test_attention_of_another_kind_is_refused(options: dict[str, Any]) -> None:
    attention = nn.MultiheadAttention(16, 2, **{"batch_first": True, **options})
    with pytest.raises(ValueError, match="LoRA needs attention over"):
        LayeredAttention(attention)


# Modes.


def test_frozen_weights_stay_as_they_are_to_the_bit(make: Make) -> None:
    visual, rgba = make()
    frozen = {n: p for n, p in trained(visual).named_parameters() if not p.requires_grad}
    before = {name: parameter.clone() for name, parameter in frozen.items()}
    for _ in range(3):
        visual(rgba).square().sum().backward()
    after = dict(visual.named_parameters())
    assert all(after[name] is parameter for name, parameter in frozen.items())
    assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())


def test_dropout_is_of_the_updates_alone() -> None:
    visual = add_lora(TOWERS["ViT"][0]().train(), LoraConfig(rank=4, dropout=0.5))
    rgb = torch.randn(2, 3, 32, 32)
    assert torch.equal(visual(rgb), visual(rgb))
    for parameter in lora_parameters(visual):
        nn.init.normal_(parameter)
    assert not torch.equal(visual(rgb), visual(rgb))
    assert torch.equal(visual.eval()(rgb), visual(rgb))


def gradients(visual: nn.Module, call: Callable[[Tensor], Tensor], rgba: Tensor) -> list[Tensor]:
    visual.zero_grad()
    call(rgba).float().square().sum().backward()
    return [p.grad.clone() for p in lora_parameters(visual) if p.grad is not None]


def test_autocast(make: Make) -> None:
    visual, rgba = make()
    plain, _ = make()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(rgba)
        found = add_lora(visual, CONFIG)(rgba)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    trained_again(visual)
    with torch.autocast("cpu", torch.bfloat16):
        for gradient in gradients(visual, visual, rgba):
            assert gradient.dtype == torch.float32
            assert gradient.any()


def trained_again(visual: nn.Module) -> nn.Module:
    for parameter in lora_parameters(visual):
        nn.init.normal_(parameter, std=0.1)
    return visual


def test_compile(make: Make) -> None:
    visual, rgba = make()
    trained(visual)
    expected, wanted = visual(rgba), gradients(visual, visual, rgba)
    torch._dynamo.reset()
    compiled = torch.compile(visual, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rgba), expected)
    for found, gradient in zip(gradients(visual, compiled, rgba), wanted, strict=True):
        torch.testing.assert_close(found, gradient)


def test_gradient_checkpointing(make: Make) -> None:
    visual, rgba = make()
    wanted = gradients(trained(visual), visual, rgba)
    visual.set_grad_checkpointing(True)
    for found, gradient in zip(gradients(visual, visual, rgba), wanted, strict=True):
        torch.testing.assert_close(found, gradient)


def test_attention_maps_of_layered_attention_are_refused_by_name() -> None:
    visual = add_lora(add_alpha_channel(TOWERS["ViT"][0]()), CONFIG)
    with pytest.raises(ValueError, match="can't read the attention of LayeredAttention"):
        encode_with_attention(visual, torch.randn(1, 4, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "RN50"])
def test_a_real_tower_of_each_family(name: str) -> None:
    visual = add_alpha_channel(build(name)).train(False)
    keys = list(visual.state_dict())
    rgba = torch.randn(1, 4, size_of(visual), size_of(visual))
    expected = features(visual, rgba)
    assert torch.equal(features(add_lora(visual, CONFIG), rgba), expected)
    features(trained_again(visual), rgba).square().sum().backward()
    assert all(p.grad is not None for p in lora_parameters(visual))
    assert list(merge_lora(visual.state_dict(), CONFIG)) == keys
