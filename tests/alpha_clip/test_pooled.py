"""The short way to features gives the same, and leaves the way to whoever watches a tower."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import nn

from alpha_clip import AlphaClip, create_model, fold_alpha
from alpha_clip.pooled import pooled_features


def vit(**options: Any) -> VisionTransformer:
    tower = VisionTransformer(32, 8, 32, 3, 4, 4.0, output_dim=16, **options)
    return tower.eval()


def resnet() -> ModifiedResNet:
    tower = ModifiedResNet([1, 1, 1, 1], 16, 4, 64, 8)
    for norm in (m for m in tower.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # open_clip starts some at zero
    return tower.eval()


TOWERS = {
    "ViT": vit,
    "ViT with layer scale": lambda: vit(ls_init_value=0.3),
    "ViT, norm after the pool": lambda: vit(final_ln_after_pool=True),
    "ResNet": resnet,
}
OTHERS = {
    "ViT that averages": lambda: vit(pool_type="avg"),
    "CoCa's": lambda: vit(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=4),
    "ViT with its tokens": lambda: vit(output_tokens=True, pool_type="avg"),
}


def images(tower: nn.Module) -> torch.Tensor:
    return torch.randn(3, 3, *(2 * [64 if isinstance(tower, ModifiedResNet) else 32]))


def flops(tower: nn.Module, rgb: torch.Tensor, exactly: bool) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        pooled_features(tower, rgb, exactly)
    return counter.get_total_flops()


def own(tower: nn.Module, rgb: torch.Tensor) -> torch.Tensor:
    out = tower(rgb)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("build", [*TOWERS.values(), *OTHERS.values()], ids=[*TOWERS, *OTHERS])
def test_features_and_gradients_are_the_same(build: Any) -> None:
    tower = build()
    twin = deepcopy(tower)
    rgb = images(tower)
    short, expected = pooled_features(tower, rgb), own(twin, rgb)
    torch.testing.assert_close(short, expected, rtol=1e-5, atol=1e-5)
    short.square().sum().backward()
    expected.square().sum().backward()
    for (name, ours), theirs in zip(tower.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is None:  # CoCa's pooling leaves some out
            assert ours.grad is None
            continue
        assert ours.grad is not None, name
        scale = theirs.grad.abs().max()
        assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * scale + 1e-6, name


@pytest.mark.parametrize("build", TOWERS.values(), ids=TOWERS)
def test_it_is_less_work(build: Any) -> None:
    tower = build()
    rgb = images(tower)
    assert flops(tower, rgb, exactly=False) < 0.95 * flops(tower, rgb, exactly=True)
    assert torch.equal(pooled_features(tower, rgb, exactly=True), tower(rgb))


def watched_block(tower: Any) -> None:
    tower.transformer.resblocks[-1].register_forward_hook(lambda *_: None)


def watched_attention(tower: Any) -> None:
    tower.transformer.resblocks[-1].attn.register_forward_pre_hook(lambda *_: None)


def watched_norm(tower: Any) -> None:
    tower.ln_post.register_forward_hook(lambda *_: None)


def watched_tower(tower: Any) -> None:
    tower.register_forward_hook(lambda *_: None)


def checkpointed(tower: Any) -> None:
    tower.set_grad_checkpointing(True)


def adapted(tower: Any) -> None:
    class Other(nn.MultiheadAttention):
        pass

    tower.transformer.resblocks[-1].attn.__class__ = Other


def compiled(tower: Any) -> None:
    tower.compile(backend="eager")


@pytest.mark.parametrize(
    "change",
    [
        *(watched_block, watched_attention, watched_norm, watched_tower),
        *(checkpointed, adapted, compiled),
    ],
)
def test_whoever_watches_sees_the_towers_own_pass(change: Any) -> None:
    tower = vit()
    rgb = images(tower)
    expected = tower(rgb)
    change(tower)
    seen: list[int] = []
    first = tower.transformer.resblocks[0].mlp
    first.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    last = tower.transformer.resblocks[-1].mlp
    tokens: list[int] = []
    # Not a hook: that alone would be a reason.
    forward = last.forward
    last.forward = lambda x: (tokens.append(x.shape[1]), forward(x))[1]
    torch.testing.assert_close(pooled_features(tower, rgb), expected)
    assert tokens == seen == [17]


def test_a_watched_pool_is_left_alone() -> None:
    tower = resnet()
    shapes: list[torch.Size] = []
    tower.attnpool.q_proj.register_forward_hook(lambda _, args, out: shapes.append(out.shape))
    tower.attnpool.register_forward_hook(lambda _, args, out: shapes.append(args[0].shape))
    pooled_features(tower, images(tower))
    assert shapes == [torch.Size([3, 256, 2, 2])]


def test_a_model_takes_it_where_it_need_not_be_exact(
    tiny_name: str, model: AlphaClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[bool] = []

    def spy(visual: nn.Module, inputs: torch.Tensor, exactly: bool = False) -> torch.Tensor:
        ways.append(exactly)
        return pooled_features(visual, inputs, exactly)

    for module in ("model", "many_regions"):
        monkeypatch.setattr(f"alpha_clip.{module}.pooled_features", spy)
    size = model.image_size
    rgba, alphas = torch.randn(2, 4, size, size), torch.randn(1, 2, 1, size, size)
    twin = create_model(tiny_name)[0]
    exact = twin.encode_image(rgba)
    assert torch.equal(exact, twin.visual(rgba))
    twin.encode_regions(rgba[:1, :3], alphas)
    twin.train().encode_image(rgba)
    fold_alpha(twin.eval().visual)
    torch.testing.assert_close(twin.encode_image(rgba), exact, rtol=1e-4, atol=1e-5)
    assert ways == [True, False, False, False]
