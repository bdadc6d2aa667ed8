"""What learns and what does not, parameter by parameter, and the modes of both."""

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from test_surgery_towers import build
from torch import nn

import alpha_clip
from alpha_clip.lora import LoraConfig
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import AlphaConv2d, add_alpha_channel, alpha_parameters
from alpha_clip.trainable import TrainableConfig

Learner = Callable[..., AlphaClip]
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
RESNET = {"image_size": 32, "layers": [1, 2, 1, 1], "width": 16, "head_width": 16}
TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "token"}


def around(clip: nn.Module) -> AlphaClip:
    return AlphaClip(clip, "test", {}, None)  # type: ignore[arg-type]


@pytest.fixture
def learner(tiny_name: str) -> Learner:
    """Return the tiny model, with what a config says applied."""

    def make(**config: Any) -> AlphaClip:
        model = alpha_clip.create_model(tiny_name)[0]
        TrainableConfig(**config).apply(model)
        return model

    return make


def resnet() -> AlphaClip:
    model = open_clip.model.CLIP(32, RESNET, TEXT)
    add_alpha_channel(model.visual)
    return around(model)


def siglip() -> AlphaClip:
    """A CLIP with a timm tower, a text tower of its own, and a bias beside the temperature."""
    vision = {**TIMM, "image_size": 160, "timm_proj": "linear"}
    model = open_clip.model.CustomTextCLIP(32, vision, TEXT, init_logit_bias=-10.0)
    add_alpha_channel(model.visual)
    return around(model)


def learning(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def parts(names: set[str]) -> set[str]:
    def part(name: str) -> str:
        if name.endswith("weight_alpha"):
            return "alpha"
        if ".lora_" in name:
            return "lora"
        if name.startswith("clip.visual."):
            return "image"
        return name.removeprefix("clip.") if name.startswith("clip.logit_") else "text"

    return {part(name) for name in names}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"alpha", "image"}),
        ({"visual": False}, {"alpha"}),
        ({"alpha": False, "text": True}, {"image", "text"}),
        ({"visual": False, "logit_scale": True}, {"alpha", "logit_scale"}),
        ({"lora": LoraConfig(rank=2)}, {"alpha", "lora"}),
        ({"lora": LoraConfig(rank=2), "alpha": False}, {"lora"}),
        ({"last_blocks": 1, "alpha": False}, {"image"}),
        ({"alpha": False, "visual": False}, set()),
    ],
)
def test_parts_learn_as_they_are_told(
    learner: Learner, config: dict[str, Any], expected: set[str]
) -> None:
    model = learner(**config)
    names = {name for name, _ in model.named_parameters()}
    assert parts(learning(model)) == expected
    if "last_blocks" not in config and "lora" not in config:  # then parts learn as a whole
        assert learning(model) == {n for n in names if parts({n}) <= expected}


def test_the_bias_of_siglip_learns_with_its_temperature() -> None:
    model = siglip()
    TrainableConfig(logit_scale=True, visual=False, alpha=False).apply(model)
    assert learning(model) == {"clip.logit_scale", "clip.logit_bias"}
    TrainableConfig(text=True, visual=False, alpha=False).apply(model)
    text = {n for n, _ in model.named_parameters() if n.startswith("clip.text.")}
    assert learning(model) == text


def test_cocas_decoder_never_learns() -> None:
    from open_clip.coca_model import CoCa

    decoder = {**TEXT, "mlp_ratio": 2, "attn_pooler_heads": 2}
    tower = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    model = around(CoCa(32, decoder, text, {**tower, "output_tokens": True}))
    add_alpha_channel(model.visual)
    TrainableConfig(text=True).apply(model)
    assert any(n.startswith("clip.text.") for n in learning(model))
    assert not any(n.startswith("clip.text_decoder.") for n in learning(model))
    assert not model.clip.text_decoder.training


# Exactly these of the image tower learn with the last two blocks, by the beginning of their names.
LAST_TWO = {
    "ViT-B-32": ("transformer.resblocks.10.", "transformer.resblocks.11.", "ln_post.", "proj"),
    "coca_ViT-B-32": (
        *("transformer.resblocks.10.", "transformer.resblocks.11."),
        *("ln_post.", "proj", "attn_pool."),
    ),
    "ViT-B-16-SigLIP": (
        *("trunk.blocks.10.", "trunk.blocks.11."),
        *("trunk.norm.", "trunk.attn_pool."),
    ),
    "EVA02-B-16": ("trunk.blocks.10.", "trunk.blocks.11.", "trunk.norm.", "trunk.head."),
    "PE-Core-B-16": (
        *("trunk.blocks.10.", "trunk.blocks.11."),
        *("trunk.norm.", "trunk.attn_pool.", "trunk.head."),
    ),
    "convnext_base": (
        *("trunk.stages.3.blocks.1.", "trunk.stages.3.blocks.2."),
        *("trunk.head.", "head."),
    ),
    "RN50": ("layer4.1.", "layer4.2.", "attnpool."),
}


@pytest.mark.parametrize("alpha", [True, False], ids=["alpha", "no alpha"])
@pytest.mark.parametrize("name", LAST_TWO)
def test_exactly_the_last_blocks_and_what_follows_them_learn(name: str, alpha: bool) -> None:
    clip = nn.Module()
    with torch.device("meta"):
        clip.visual = add_alpha_channel(build(name))
    clip.logit_scale = nn.Parameter(torch.ones([]))
    model = around(clip)
    TrainableConfig(alpha=alpha, last_blocks=2).apply(model)
    names = {n for n, _ in model.visual.named_parameters()}
    stems = {n for n in names if n.endswith("weight_alpha")} if alpha else set()
    assert len(stems) == alpha
    last = {n for n in names if n.startswith(LAST_TWO[name])}
    assert all(any(n.startswith(begin) for n in names) for begin in LAST_TWO[name])
    assert learning(model.visual) == last | stems


def test_what_changes_the_resolution_learns_with_the_block_after_it() -> None:
    clip = nn.Module()
    with torch.device("meta"):
        clip.visual = add_alpha_channel(build("convnext_base"))
    for count, learns in ((2, False), (3, True)):
        TrainableConfig(last_blocks=count).apply(around(clip))
        assert clip.visual.trunk.stages[3].downsample[1].weight.requires_grad == learns


def test_more_blocks_than_there_are_are_refused(learner: Learner) -> None:
    model = learner(last_blocks=4)
    assert "clip.visual.conv1.weight" not in learning(model)
    assert "clip.visual.transformer.resblocks.0.ln_1.weight" in learning(model)
    with pytest.raises(ValueError, match=r"VisionTransformer has 4 blocks, fewer than .* = 5"):
        learner(last_blocks=5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"last_blocks": 0}, "expected last_blocks to be 1 or more, got 0"),
        ({"last_blocks": -1}, "expected last_blocks to be 1 or more, got -1"),
        ({"last_blocks": 2, "lora": LoraConfig()}, "last_blocks = 2 trains .* lora freezes"),
        ({"last_blocks": 2, "visual": False}, "visual = false .* last_blocks says"),
        ({"lora": LoraConfig(), "visual": False}, "visual = false .* lora says"),
    ],
)
def test_contradictions_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainableConfig(**config)


# Modes.


def test_a_frozen_tower_is_in_eval_mode(learner: Learner) -> None:
    model = learner(visual=False)
    assert not any(m.training for m in model.modules())
    model = learner(text=True, visual=False)
    assert not any(m.training for m in model.visual.modules())
    assert all(m.training for m in model.clip.transformer.modules())
    model = learner()
    assert all(m.training for m in model.visual.modules())
    assert not any(m.training for m in model.clip.transformer.modules())
    assert not model.clip.token_embedding.training


def test_a_text_tower_of_its_own_has_its_own_mode() -> None:
    model = siglip()
    TrainableConfig(text=True).apply(model)
    assert all(m.training for m in model.modules())
    TrainableConfig().apply(model)
    assert not any(m.training for m in model.clip.text.modules())
    assert all(m.training for m in model.visual.modules())


def test_frozen_blocks_are_in_eval_mode_and_the_last_in_train_mode(learner: Learner) -> None:
    blocks = learner(last_blocks=1).visual.transformer.resblocks
    assert all(m.training for m in blocks[-1].modules())
    assert not any(m.training for block in blocks[:-1] for m in block.modules())


def test_the_dropout_of_low_rank_updates_is_on_in_training(learner: Learner) -> None:
    model = learner(lora=LoraConfig(rank=2, dropout=0.5))
    dropouts = [m for m in model.visual.modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) == 4 * 4
    assert all(m.training for m in dropouts)
    for name, parameter in model.visual.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter)
    rgba = torch.randn(1, 4, model.image_size, model.image_size)
    assert not torch.equal(model.encode_image(rgba), model.encode_image(rgba))
    model.eval()
    assert torch.equal(model.encode_image(rgba), model.encode_image(rgba))


def statistics(model: AlphaClip) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.visual.named_buffers() if n.endswith("running_mean")}


@pytest.mark.parametrize(
    ("config", "moving"),
    [
        ({}, ("bn1", "bn2", "bn3", "layer1", "layer2.0", "layer2.1", "layer3", "layer4")),
        ({"visual": False}, ()),
        ({"last_blocks": 1}, ("layer4",)),
        ({"last_blocks": 3}, ("layer2.1", "layer3", "layer4")),
    ],
)
def test_statistics_move_only_where_weights_learn(
    config: dict[str, Any], moving: tuple[str, ...]
) -> None:
    model = resnet()
    TrainableConfig(**config).apply(model)
    before = statistics(model)
    model.visual(torch.randn(4, 4, 32, 32))
    after = statistics(model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if n.startswith(moving)}


def test_gradients_reach_alpha_through_frozen_blocks(learner: Learner) -> None:
    model = learner(last_blocks=1)
    model.encode_image(torch.randn(2, 4, model.image_size, model.image_size)).sum().backward()
    (kernel,) = alpha_parameters(model)
    assert kernel.grad is not None
    assert kernel.grad.abs().max() > 0
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == learning(model)
    assert isinstance(model.visual.conv1, AlphaConv2d)
