import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, _build_vision_tower
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vitamin import GeGluMlp, HybridEmbed, MbConvStages, VitCfg
from timm.models.xcit import Xcit
from torch import nn

import alpha_clip
from alpha_clip.attention import attention_of, encode_with_attention, grid_attention
from alpha_clip.surgery import add_alpha_channel, alpha_parameters

VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def own(**changes: Any) -> nn.Module:
    """Return a tower of open_clip's own."""
    return _build_vision_tower(16, {**VIT, **changes}).eval()


def timm(trunk: Any, **settings: Any) -> nn.Module:
    """Return a tower around a tiny trunk of timm's, as open_clip wraps it."""
    size = settings.pop("img_size", 32)
    config = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": size}
    visual = _build_vision_tower(16, config)
    depth = {} if "depths" in settings else {"depth": 3}
    settings = {"embed_dim": 64, "num_heads": 2, "num_classes": 0, **depth, **settings}
    visual.trunk = trunk(img_size=size, patch_size=settings.pop("patch_size", 8), **settings)
    visual.trunk.pretrained_cfg = {"first_conv": "patch_embed.proj"}
    return visual.eval()


def vitamin(**changes: Any) -> nn.Module:
    config = VitCfg(embed_dim=(16, 32, 64), depths=(1, 1, 1), stem_width=16)

    def embed(**settings: Any) -> HybridEmbed:
        return HybridEmbed(MbConvStages(config), proj=False, **settings)

    settings = {"class_token": False, "global_pool": "avg", "mlp_layer": GeGluMlp, **changes}
    visual = timm(VisionTransformer, embed_layer=embed, img_size=64, patch_size=1, **settings)
    visual.trunk.pretrained_cfg = {"first_conv": "patch_embed.backbone.stem.conv1"}
    return visual


# Tower, its grid, class and register tokens before the patches, whether it pools its class token.
ROPE = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4), "global_pool": "token"}
PE = {**ROPE, "attn_type": "rope", "global_pool": "map", "use_pre_transformer_norm": True}
AVERAGE = {"class_token": False, "reg_tokens": 2, "global_pool": "avg"}
TOWERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], int, bool]] = {
    "ViT": (lambda: own(), (4, 4), 1, True),
    "ViT, not square": (lambda: own(image_size=(16, 40)), (2, 5), 1, True),
    "CLIPA": (lambda: own(pool_type="avg", no_ln_pre=True), (4, 4), 1, False),
    "CoCa": (lambda: own(attentional_pool=True, output_tokens=True), (4, 4), 1, False),
    "custom block": (lambda: own(qk_norm=True, scale_heads=True), (4, 4), 1, True),
    "timm ViT": (lambda: timm(VisionTransformer), (4, 4), 1, True),
    "timm ViT, not square": (
        lambda: timm(VisionTransformer, img_size=(16, 40), reg_tokens=3),
        (2, 5),
        4,
        True,
    ),
    "registers": (lambda: timm(VisionTransformer, **AVERAGE), (4, 4), 2, False),
    "SigLIP": (
        lambda: timm(VisionTransformer, class_token=False, global_pool="map"),
        (4, 4),
        0,
        False,
    ),
    "parallel": (lambda: timm(VisionTransformer, block_fn=ParallelScalingBlock), (4, 4), 1, True),
    "relative positions": (
        lambda: timm(VisionTransformerRelPos, global_pool="avg"),
        (4, 4),
        0,
        False,
    ),
    "EVA02": (lambda: timm(Eva, swiglu_mlp=True, **ROPE), (4, 4), 1, True),
    "EVA02-E": (lambda: timm(Eva, use_post_norm=True, global_pool="token"), (4, 4), 1, True),
    "PE": (lambda: timm(Eva, **PE), (4, 4), 1, False),
    "BEiT": (lambda: timm(Beit, use_shared_rel_pos_bias=True), (4, 4), 1, False),
    "ViTamin": (vitamin, (4, 4), 0, False),
}
KINDS = ["ViT", "custom block", "timm ViT"]


@pytest.fixture(params=TOWERS)
def tower(request: pytest.FixtureRequest) -> nn.Module:
    return TOWERS[request.param][0]()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> nn.Module:
    """One tower of each way to read attention."""
    return TOWERS[request.param][0]()


def images(visual: Any, channels: int = 3) -> torch.Tensor:
    size = visual.image_size
    return torch.randn(2, channels, *(size if isinstance(size, tuple) else (size, size)))


def pooled(features: Any) -> torch.Tensor:
    return features[0] if isinstance(features, tuple) else features


def applied(visual: nn.Module, rgba: torch.Tensor, patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What each block of a plain pass applies: its fused attention to the unit matrix."""
    fused, found = nn.functional.scaled_dot_product_attention, []

    def attend(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        unit = torch.eye(k.shape[-2]).expand(*k.shape[:-1], -1)
        found.append(fused(q, k, unit, *args, **kwargs))
        return fused(q, k, v, *args, **kwargs)

    with patch.context() as context:
        context.setattr(nn.functional, "scaled_dot_product_attention", attend)
        visual(rgba)  # with gradients, as the native path of nn.MultiheadAttention calls no other
    return found


def state(visual: nn.Module) -> dict[str, dict[str, Any]]:
    """Everything that modules hold: parameters by identity, hooks, settings."""
    return {
        name: {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        for name, module in visual.named_modules()
    }


@pytest.mark.parametrize("alpha", [False, True], ids=["RGB", "RGBA"])
@torch.no_grad()
def test_features_are_those_of_a_plain_pass(tower: nn.Module, alpha: bool) -> None:
    if alpha:
        add_alpha_channel(tower)
        nn.init.normal_(alpha_parameters(tower)[0], std=0.1)
    rgba = images(tower, 3 + alpha)
    plain, before = pooled(tower(rgba)), state(tower)
    for block in (0, -1):
        features, attention = encode_with_attention(tower, rgba, block)
        torch.testing.assert_close(features, plain, rtol=1e-5, atol=1e-5)
        assert attention.shape == (2, 2, attention.shape[2], attention.shape[2])
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:3]))
        assert attention.min() >= 0
    assert state(tower) == before
    torch.testing.assert_close(pooled(tower(rgba)), plain, rtol=0, atol=0)


def test_attention_is_what_the_block_applies(
    tower: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    rgb = images(tower)
    expected = applied(tower, rgb, monkeypatch)
    assert not torch.allclose(expected[0], expected[2], atol=1e-4)
    for block, index in ((0, 0), (1, 1), (2, 2), (-1, 2), (-3, 0)):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                attention = encode_with_attention(tower, rgb, block)[1]
            torch.testing.assert_close(attention, expected[index], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_attention_by_hand() -> None:
    """The dimensions of the paper's code in the goldens: 3 blocks, 2 heads, 17 tokens."""
    vision = {**VIT, "image_size": 64, "patch_size": 16, "width": 128, "head_width": 64}
    visual = _build_vision_tower(64, vision, quick_gelu=True).eval()
    block = visual.transformer.resblocks[-1]
    seen: list[torch.Tensor] = []
    rgb = images(visual)
    with block.ln_1.register_forward_hook(lambda *x: seen.append(x[2])):
        attention = encode_with_attention(visual, rgb)[1]
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    q, k, _ = nn.functional.linear(seen[0], weight, bias).chunk(3, dim=-1)
    for head in (0, 1):
        at = slice(64 * head, 64 * (head + 1))
        expected = (q[..., at] @ k[..., at].mT / 64**0.5).softmax(-1)
        torch.testing.assert_close(attention[:, head], expected, rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_features_and_attention(kind: nn.Module) -> None:
    add_alpha_channel(kind)
    (alpha,) = alpha_parameters(kind)
    rgba = images(kind, 4)
    (plain,) = torch.autograd.grad(pooled(kind(rgba)).square().sum(), alpha)
    features, attention = encode_with_attention(kind, rgba)
    (captured,) = torch.autograd.grad(features.square().sum(), alpha, retain_graph=True)
    torch.testing.assert_close(captured, plain, rtol=1e-3, atol=1e-5)
    (through,) = torch.autograd.grad(attention[:, :, 0].square().sum(), alpha)
    assert through.abs().max() > 0


def test_gradients_with_checkpointing(kind: Any) -> None:
    rgb = images(kind).requires_grad_()
    plain = torch.autograd.grad(kind(rgb).square().sum(), rgb)[0]
    kind.set_grad_checkpointing()
    features, _ = encode_with_attention(kind, rgb)
    captured = torch.autograd.grad(features.square().sum(), rgb)[0]
    torch.testing.assert_close(captured, plain, rtol=1e-3, atol=1e-5)
    home = kind.trunk if hasattr(kind, "trunk") else kind.transformer
    assert home.grad_checkpointing is True


@torch.no_grad()
def test_half_precision_autocast(kind: nn.Module) -> None:
    rgb = images(kind)
    full, exact = encode_with_attention(kind, rgb)
    with torch.autocast("cpu", torch.bfloat16):
        features, attention = encode_with_attention(kind, rgb)
    torch.testing.assert_close(features.float(), full, rtol=0.05, atol=0.05)
    torch.testing.assert_close(attention.float(), exact, rtol=0.05, atol=0.01)
    ones = torch.ones(exact.shape[:3])
    torch.testing.assert_close(attention.float().sum(-1), ones, rtol=0, atol=0.02)


def test_a_pass_that_fails_leaves_the_tower_as_it_was(kind: Any) -> None:
    home = kind.trunk.blocks if hasattr(kind, "trunk") else kind.transformer.resblocks
    rgb, plain = images(kind), state(kind)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    hook = home[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        encode_with_attention(kind, rgb)
    hook.remove()
    assert state(kind) == plain


def test_a_pass_can_follow_one_that_failed_inside_the_block(kind: Any) -> None:
    attend = (kind.trunk.blocks if hasattr(kind, "trunk") else kind.transformer.resblocks)[2].attn
    last = {"Attention": "attn_drop" if hasattr(kind, "trunk") else "ln_k"}
    name = last.get(type(attend).__name__)
    rgb = images(kind)
    with attention_of(kind) as maps:
        hook = (attend.get_submodule(name) if name else attend).register_forward_hook(
            lambda *_: 1 / 0, prepend=True
        )
        with pytest.raises(ZeroDivisionError):
            kind(rgb)
        hook.remove()
        features = kind(rgb)
    assert len(maps) == 1
    torch.testing.assert_close(features, kind(rgb), rtol=1e-5, atol=1e-5)


def test_nothing_keeps_the_attention_alive(kind: nn.Module) -> None:
    rgb = images(kind)
    with torch.no_grad():
        features, attention = encode_with_attention(kind, rgb)
    watch = weakref.ref(attention)
    del attention
    assert watch() is None
    assert features.isfinite().all()


def test_training_mode_and_its_dropout() -> None:
    visual = timm(VisionTransformer, attn_drop_rate=0.5).train()
    attention = encode_with_attention(visual, images(visual))[1]
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, 17))
    assert visual.training


def test_every_pass_is_collected(model: alpha_clip.AlphaClip) -> None:
    size = model.image_size
    rgb, alphas = torch.randn(2, 3, size, size), torch.randn(2, 3, 1, size, size)
    with attention_of(model.visual) as maps:
        features = model.encode_regions(rgb, alphas, chunk=4)
    assert [len(m) for m in maps] == [4, 2]
    torch.testing.assert_close(features, model.encode_regions(rgb, alphas), rtol=1e-5, atol=1e-5)
    last = torch.cat([rgb[1:], alphas[1:, 2]], 1)
    attention = encode_with_attention(model.visual, last)[1]
    torch.testing.assert_close(maps[1][1:], attention, rtol=1e-4, atol=1e-6)


def test_a_pass_without_the_hooks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    visual = own()
    monkeypatch.setattr(visual, "forward", lambda x: x)
    with pytest.raises(RuntimeError, match=r"one pass of block -1 of VisionTransformer, saw 0"):
        encode_with_attention(visual, images(visual))


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_the_grid_leaves_other_tokens_out(name: str) -> None:
    build, (rows, columns), prefix, pools_class = TOWERS[name]
    visual = build()
    attention = encode_with_attention(visual, images(visual))[1]
    maps = grid_attention(visual, attention)
    assert maps.shape == (2, 2, rows, columns)
    query = "class" if pools_class else "mean"
    torch.testing.assert_close(maps, grid_attention(visual, attention, query))
    for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0)):
        received = attention[..., prefix + row * columns + column]
        expected = received[:, :, 0] if pools_class else received[:, :, prefix:].mean(-1)
        torch.testing.assert_close(maps[..., row, column], expected)
    if prefix == 0:
        torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 2))


@torch.no_grad()
def test_who_looks_can_be_chosen() -> None:
    visual = own()
    attention = encode_with_attention(visual, images(visual))[1]
    mean = grid_attention(visual, attention, "mean")
    torch.testing.assert_close(mean.flatten(2), attention[:, :, 1:, 1:].mean(2))
    assert not torch.equal(mean, grid_attention(visual, attention, "class"))
    with pytest.raises(ValueError, match="'class' or 'mean', got 'all'"):
        grid_attention(visual, attention, "all")  # type: ignore[arg-type]


@torch.no_grad()
def test_images_of_another_size_have_another_grid() -> None:
    visual = timm(VisionTransformer, dynamic_img_size=True)
    _, attention = encode_with_attention(visual, torch.randn(1, 3, 24, 64))
    with pytest.raises(ValueError, match=r"17, 17\] \(1 \+ 4 x 4 .* got \[1, 2, 25, 25\]"):
        grid_attention(visual, attention)
    visual.set_input_size((24, 64))
    assert grid_attention(visual, attention).shape == (1, 2, 3, 8)


@pytest.mark.parametrize("name", ["SigLIP", "registers", "ViTamin"])
def test_a_class_token_must_exist_to_be_asked(name: str) -> None:
    build, (rows, columns), prefix, _ = TOWERS[name]
    tokens = prefix + rows * columns
    with pytest.raises(ValueError, match=r"VisionTransformer has no class token; use query='mean'"):
        grid_attention(build(), torch.ones(1, 2, tokens, tokens), "class")


@pytest.mark.parametrize("block", [3, -4, 100])
def test_blocks_out_of_range_are_refused(kind: nn.Module, block: int) -> None:
    message = rf"VisionTransformer has 3 blocks: expected a block in -3\.\.2, got {block}"
    with pytest.raises(ValueError, match=message), attention_of(kind, block):
        pass


def of_timm(name: str) -> nn.Module:
    return _build_vision_tower(16, {"timm_model_name": name, "timm_pool": "avg"})


SWIN = {"depths": (1, 1), "num_heads": (2, 2), "patch_size": 4, "window_size": 4}
NO_VIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ModifiedResNet": (lambda: own(layers=[1, 1, 1, 1], width=16), "ModifiedResNet"),
    "ConvNeXt": (lambda: of_timm("test_convnext"), "ConvNeXt"),
    "EfficientNet": (lambda: of_timm("test_efficientnet"), "EfficientNet"),
    "ResNet": (lambda: of_timm("test_resnet"), "ResNet"),
    "Swin": (lambda: timm(SwinTransformer, **SWIN), "SwinTransformer"),
    "the whole CLIP": (lambda: CLIP(16, VIT, TEXT), "CLIP"),
}


@pytest.mark.parametrize("name", NO_VIT)
def test_towers_without_blocks_of_tokens_are_refused(name: str) -> None:
    build, kind = NO_VIT[name]
    visual, message = build(), rf"patches, then blocks, in .*visual\.trunk.*; got {kind}$"
    with pytest.raises(ValueError, match=message), attention_of(visual):
        pass
    with pytest.raises(ValueError, match=message):
        grid_attention(visual, torch.ones(1, 1, 17, 17))


def test_blocks_that_cannot_be_read_are_refused_before_the_pass() -> None:
    visual = own(scaled_cosine_attn=True)
    with pytest.raises(ValueError, match="attention of Attention with scaled cosine; expected"):
        encode_with_attention(visual, images(visual))
    visual = own()
    visual.transformer.resblocks[1] = nn.Linear(64, 64)
    with (
        pytest.raises(ValueError, match="can't read the attention of Linear"),
        attention_of(visual, 1),
    ):
        pass


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: timm(VisionTransformer, attn_layer="diff"), "DiffAttention"),
        (lambda: timm(Xcit, cls_attn_layers=1, eta=1.0), "XCA"),
    ],
    ids=["differential", "between channels"],
)
def test_attention_of_another_shape_is_refused(build: Callable[[], Any], kind: str) -> None:
    visual = build()
    before = state(visual)
    with pytest.raises(ValueError, match=rf"can't read the attention of {kind}: .* 2 heads"):
        encode_with_attention(visual, images(visual))
    assert state(visual) == before


def test_coca_as_a_whole() -> None:
    vision = {**VIT, "attentional_pool": True, "output_tokens": True, "attn_pooler_queries": 9}
    decoder = {**TEXT, "mlp_ratio": 2, "context_length": 7}
    model = CoCa(32, decoder, {**TEXT, "embed_cls": True, "output_tokens": True}, vision).eval()
    rgb = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features, attention = encode_with_attention(model.visual, rgb)
        plain = model.encode_image(rgb, normalize=False)
    torch.testing.assert_close(features, plain, rtol=1e-5, atol=1e-5)
    assert grid_attention(model.visual, attention).shape == (2, 2, 4, 4)


SIZES = "tiny|small|medium|base|x*large|huge|giant(opt)?|gigantic|enormous|so[0-9]+m|[0-9.]+"


def families() -> Iterator[tuple[int, str, nn.Module]]:
    """Yield width of features, class and tower of each family of open_clip, on the meta device."""
    seen = set()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = {**config["vision_cfg"], "timm_model_pretrained": False}
        family = re.sub(SIZES, "", vision.get("timm_model_name") or str(type(vision["layers"])))
        family += str([vision.get(k) for k in ("pool_type", "attentional_pool", "timm_pool")])
        if family in seen:
            continue
        seen.add(family)
        with torch.device("meta"):
            visual = _build_vision_tower(config["embed_dim"], vision).eval()
        yield config["embed_dim"], type(getattr(visual, "trunk", visual)).__name__, visual


@pytest.mark.slow
@torch.no_grad()
def test_families_of_open_clip() -> None:
    """One tower of each family: shapes only."""
    refused, supported = set(), set()
    for dim, kind, visual in families():
        with torch.device("meta"):
            try:
                features, attention = encode_with_attention(visual, images(visual)[:1])
                assert features.shape == (1, dim)
                assert len(grid_attention(visual, attention)) == 1
                supported.add(kind)
            except ValueError:
                refused.add(kind)
    assert supported == {"VisionTransformer", "Eva", "VisionTransformerRelPos"}
    assert refused == {"ModifiedResNet", "ConvNeXt", "FastVit", "SwinTransformer"}
