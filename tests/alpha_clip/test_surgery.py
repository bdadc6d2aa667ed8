import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from torch import nn

from alpha_clip.surgery import (
    AlphaConv2d,
    add_alpha_channel,
    alpha_parameters,
    find_stems,
    fold_alpha,
)

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
TIMM: dict[str, Any] = {"timm_model_pretrained": False, "timm_proj": "linear", "timm_pool": "avg"}
TOWERS: dict[str, dict[str, Any]] = {
    "ViT": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
    "timm ViT": {**TIMM, "timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160},
    "timm ResNet": {**TIMM, "timm_model_name": "test_resnet", "image_size": 64},
    "timm EfficientNet": {**TIMM, "timm_model_name": "test_efficientnet", "image_size": 64},
}


def build(vision: dict[str, Any]) -> nn.Module:
    return CLIP(32, vision, TEXT).eval().visual


@pytest.fixture(params=TOWERS.values(), ids=TOWERS.keys())
def tower(request: pytest.FixtureRequest) -> tuple[nn.Module, int]:
    return build(request.param), request.param["image_size"]


def trained(visual: nn.Module) -> nn.Module:
    for parameter in alpha_parameters(visual):
        nn.init.normal_(parameter, std=0.1)
    return visual


def test_surgery_changes_nothing(tower: tuple[nn.Module, int]) -> None:
    visual, size = tower
    rgb = torch.randn(2, 3, size, size)
    before, keys = visual(rgb), list(visual.state_dict())
    weights = {k: v.clone() for k, v in visual.state_dict().items()}
    assert add_alpha_channel(visual) is visual
    for alpha in (torch.zeros(2, 1, size, size), torch.randn(2, 1, size, size)):
        assert torch.equal(visual(torch.cat([rgb, alpha], 1)), before)
    state = visual.state_dict()
    new = [k for k in state if k.endswith("weight_alpha")]
    assert [k for k in state if k not in new] == keys
    assert len(new) == 1
    assert all(torch.equal(state[k], v) for k, v in weights.items())
    assert not state[new[0]].any()


def test_gradient_reaches_alpha(tower: tuple[nn.Module, int]) -> None:
    visual, size = tower
    add_alpha_channel(visual)
    (parameter,) = alpha_parameters(visual)
    visual(torch.randn(2, 4, size, size)).square().sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.abs().max() > 0


def test_alpha_changes_the_features_once_it_is_trained(tower: tuple[nn.Module, int]) -> None:
    visual, size = tower
    trained(add_alpha_channel(visual))
    rgba = torch.randn(1, 4, size, size)
    other = rgba.clone()
    other[:, 3] += 1
    assert not torch.allclose(visual(rgba), visual(other))


def test_folding_keeps_the_features_and_drops_our_class(tower: tuple[nn.Module, int]) -> None:
    visual, size = tower
    trained(add_alpha_channel(visual))
    rgba = torch.randn(2, 4, size, size)
    before, keys = visual(rgba), list(visual.state_dict())
    (name,) = [n for n, m in visual.named_modules() if isinstance(m, AlphaConv2d)]
    assert fold_alpha(visual) is visual
    torch.testing.assert_close(visual(rgba), before, rtol=1e-5, atol=5e-6)
    assert not any(isinstance(m, AlphaConv2d) for m in visual.modules())
    stem = visual.get_submodule(name)
    assert type(stem) is nn.Conv2d
    assert stem.weight.shape[1] == stem.in_channels == 4
    assert list(visual.state_dict()) == [k for k in keys if not k.endswith("weight_alpha")]
    assert alpha_parameters(visual) == []


def test_alpha_conv_is_the_sum_of_two_convolutions() -> None:
    for bias in (False, True):
        conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=1, bias=bias)
        new = AlphaConv2d.from_conv(conv)
        nn.init.normal_(new.weight_alpha)
        rgba = torch.randn(2, 4, 9, 9)
        alone = nn.functional.conv2d(rgba[:, 3:], new.weight_alpha, stride=2, padding=1)
        torch.testing.assert_close(new(rgba), conv(rgba[:, :3]) + alone)


def test_the_original_convolution_is_left_as_it_was() -> None:
    conv = nn.Conv2d(3, 5, 3)
    new = AlphaConv2d.from_conv(conv)
    assert new.weight is conv.weight
    assert list(conv.state_dict()) == ["weight", "bias"]
    assert conv.in_channels == 3
    assert new.in_channels == 4


def test_alpha_conv_keeps_type_and_mode_of_the_original() -> None:
    new = AlphaConv2d.from_conv(nn.Conv2d(3, 5, 3, dtype=torch.bfloat16).eval())
    assert new.weight_alpha.dtype == torch.bfloat16
    assert not new.training
    twin = copy.deepcopy(new)
    assert torch.equal(twin.weight, new.weight)
    assert twin.weight_alpha is not new.weight_alpha


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_wrong_channels_are_refused(channels: int) -> None:
    visual = add_alpha_channel(build(TOWERS["ViT"]))
    with pytest.raises(ValueError, match=rf"4 channels .* \[2, {channels}, 32, 32\]"):
        visual(torch.zeros(2, channels, 32, 32))


def test_a_second_surgery_is_refused(tower: tuple[nn.Module, int]) -> None:
    visual = add_alpha_channel(tower[0])
    with pytest.raises(
        ValueError, match=r"\.(conv1(\.0)?|conv_stem|proj) has an alpha channel already"
    ):
        add_alpha_channel(visual)


class Stem(nn.Module):
    def __init__(self, conv1: nn.Module | None) -> None:
        super().__init__()
        if conv1 is not None:
            self.conv1 = conv1


class StandardisedConv2d(nn.Conv2d):
    """Computes something else than its weights say, as timm's StdConv2d and Conv2dSame do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


NO_STEMS: dict[str, Callable[[], nn.Module | None]] = {
    "no conv1": lambda: None,
    "linear": lambda: nn.Linear(3, 4),
    "grey": lambda: nn.Conv2d(1, 4, 3),
    "RGBA already": lambda: nn.Conv2d(4, 4, 3),
    "grouped": lambda: nn.Conv2d(3, 6, 3, groups=3),
    "a convolution of its own kind": lambda: StandardisedConv2d(3, 4, 3),
}


@pytest.mark.parametrize("conv", NO_STEMS.values(), ids=NO_STEMS.keys())
def test_towers_without_a_plain_rgb_stem_are_refused(
    conv: Callable[[], nn.Module | None],
) -> None:
    with pytest.raises(ValueError, match=r"expected Stem\.conv1 to be a Conv2d over 3 channels"):
        add_alpha_channel(Stem(conv()))


def test_a_trunk_that_does_not_name_its_stem_is_refused() -> None:
    visual = build(TOWERS["timm ResNet"])
    visual.trunk.pretrained_cfg = {**visual.trunk.pretrained_cfg, "first_conv": None}
    with pytest.raises(ValueError, match="ResNet does not say which layer reads the picture"):
        add_alpha_channel(visual)


def test_a_trunk_with_several_stems_gets_several_alphas() -> None:
    visual = nn.Module()
    visual.trunk = nn.Module()
    visual.trunk.a, visual.trunk.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5)
    visual.trunk.pretrained_cfg = {"first_conv": ("a", "b")}
    assert list(find_stems(visual)) == ["trunk.a", "trunk.b"]
    add_alpha_channel(visual)
    assert [p.shape[-1] for p in alpha_parameters(visual)] == [3, 5]


def test_nothing_is_changed_when_one_of_several_stems_is_refused() -> None:
    visual = nn.Module()
    visual.trunk = nn.Module()
    visual.trunk.a, visual.trunk.b = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 5)
    visual.trunk.pretrained_cfg = {"first_conv": ("a", "b")}
    with pytest.raises(ValueError, match=r"trunk\.b"):
        add_alpha_channel(visual)
    assert type(visual.trunk.a) is nn.Conv2d


def test_folding_without_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match="VisionTransformer has no alpha channel"):
        fold_alpha(build(TOWERS["ViT"]))


def test_a_whole_clip_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"expected an image tower, got a whole CLIP; pass \.visual"
    ):
        add_alpha_channel(CLIP(32, TOWERS["ViT"], TEXT))
