from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.model import _build_vision_tower
from test_attention import TOWERS, images, own, state, timm, vitamin
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import alpha_clip
from alpha_clip.attention_masking import attending_to
from alpha_clip.surgery import add_alpha_channel, alpha_parameters

MASKED = ["ViT", "ViT, not square", "custom block", "timm ViT", "timm ViT, not square", "EVA02"]
MASKED += ["EVA02-E"]


@pytest.fixture(params=MASKED)
def tower(request: pytest.FixtureRequest) -> Any:
    return TOWERS[request.param][0]()


def blocks_of(visual: Any) -> Any:
    return visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks


def corner(rgb: torch.Tensor, rows: int = 16, columns: int = 8) -> torch.Tensor:
    """A mask of the upper left corner: by default two patches of the first column."""
    mask = torch.zeros_like(rgb[:, :1])
    mask[..., :rows, :columns] = 1
    return mask


@torch.no_grad()
def seen_by_block(visual: Any, block: int, rgb: torch.Tensor) -> tuple[Any, Any, torch.Tensor]:
    """Return what a block takes and gives in a pass, within whatever context there is."""
    seen: list[Any] = []
    hook = blocks_of(visual)[block].register_forward_hook(
        lambda _, args, kwargs, output: seen.extend((args[0], kwargs, output)), with_kwargs=True
    )
    visual(rgb)
    hook.remove()
    return seen[0], seen[1], seen[2]


@torch.no_grad()
def test_masks_are_obeyed_in_every_block_by_hand() -> None:
    """Each block's own weights, over the tokens that MaskCLIP lets the copy see."""
    visual: Any = own()
    rgb = images(visual)
    mask = corner(rgb)
    mask[1] = 0
    mask[1, :, 8:16, 16:32] = 1
    visible = [[0, 1, 5], [0, 7, 8]]  # the class token, then patches by number + 1
    for blocks in (None, [2], [0, -1]):
        masked = {0, 1, 2} if blocks is None else {b % 3 for b in blocks}
        with attending_to(visual, mask, blocks):
            features = visual(rgb)
        for image in (0, 1):
            copy = seen_by_block(visual, 0, rgb)[0][image, :1]
            for number, block in enumerate(visual.transformer.resblocks):
                x = seen_by_block(visual, number, rgb)[0][image]
                keys = block.ln_1(x[visible[image]] if number in masked else x)
                weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
                q = nn.functional.linear(block.ln_1(copy), weight[:64], bias[:64])
                k, v = nn.functional.linear(keys, weight[64:], bias[64:]).chunk(2, -1)
                heads = [slice(0, 32), slice(32, 64)]
                looks = [(q[:, h] @ k[:, h].T / 32**0.5).softmax(-1) @ v[:, h] for h in heads]
                copy = copy + block.attn.out_proj(torch.cat(looks, -1))
                copy = copy + block.mlp(block.ln_2(copy))
            expected = visual.ln_post(copy[0]) @ visual.proj
            torch.testing.assert_close(features[image], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MASKED)
@torch.no_grad()
def test_one_masked_block_is_that_block_on_fewer_tokens(name: str) -> None:
    """In the last block the copy is still the class token: so leave out what it may not see."""
    build, (_, columns), prefix, _ = TOWERS[name]
    tower = build()
    rgb = images(tower)
    x, kwargs, plain = seen_by_block(tower, -1, rgb)
    patches = [0, columns]
    if kwargs.get("rope") is not None:
        kwargs = {**kwargs, "rope": kwargs["rope"][patches]}
    kept = [*range(prefix), *(prefix + p for p in patches)]
    expected = blocks_of(tower)[-1](x[:, kept], **kwargs)[:, 0]
    with attending_to(tower, corner(rgb), blocks=[-1]):
        _, _, given = seen_by_block(tower, -1, rgb)
    torch.testing.assert_close(given[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(given[:, 0], plain[:, 0], atol=1e-3)


@torch.no_grad()
def test_a_mask_of_everything_changes_nothing(tower: Any) -> None:
    rgb, before = images(tower), state(tower)
    plain = tower(rgb)
    with attending_to(tower, torch.ones_like(rgb[:, :1])):
        torch.testing.assert_close(tower(rgb), plain, rtol=1e-4, atol=1e-5)
    assert state(tower) == before
    assert torch.equal(tower(rgb), plain)


@torch.no_grad()
def test_other_tokens_are_those_of_the_plain_pass(tower: Any) -> None:
    rgb = images(tower)
    _, _, plain = seen_by_block(tower, -1, rgb)
    with attending_to(tower, corner(rgb)):
        _, _, masked = seen_by_block(tower, -1, rgb)
    assert masked.shape == plain.shape
    torch.testing.assert_close(masked[:, 1:], plain[:, 1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(masked[:, 0], plain[:, 0], atol=1e-3)


@torch.no_grad()
def test_each_image_has_its_own_mask() -> None:
    visual = own()
    rgb = images(visual)
    masks = corner(rgb)
    masks[1] = 1 - masks[1]
    with attending_to(visual, masks):
        both = visual(rgb)
        swapped = visual(rgb.flip(0))
    for image in (0, 1):
        with attending_to(visual, masks[image : image + 1]):
            alone = visual(rgb[image : image + 1])[0]
        torch.testing.assert_close(both[image], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(swapped.flip(0), both, atol=1e-3)


def inside(mask: torch.Tensor) -> list[int]:
    """Which patches of a 4 x 4 grid of 8 px the copy sees: those that its features depend on."""
    visual = own()
    for parameter in visual.parameters():  # patches mix in the blocks before: leave one block
        parameter.requires_grad_(False)
    visual.transformer.resblocks = visual.transformer.resblocks[:1]
    rgb = images(visual)[:1].requires_grad_()
    with attending_to(visual, mask[None, None]):
        features = visual(rgb).square().sum()
    (gradient,) = torch.autograd.grad(features, rgb)
    reached = gradient[0].abs().amax(0).unfold(0, 8, 8).unfold(1, 8, 8).amax((2, 3)) > 0
    return reached.flatten().nonzero().flatten().tolist()


def test_a_patch_is_inside_if_one_of_its_pixels_is() -> None:
    mask = torch.zeros(32, 32)
    mask[15, 9] = 0.5
    mask[31, 31] = 1
    mask[16:24, 16:24] = 0.49
    assert inside(mask) == [5, 15]


def test_a_faint_region_keeps_the_patch_with_most_of_it() -> None:
    mask = torch.zeros(32, 32)
    mask[0, 0] = 0.4
    mask[10:14, 26:30] = 0.2
    assert inside(mask) == [7]


def test_without_a_region_only_the_class_token_is_left() -> None:
    assert inside(torch.zeros(32, 32)) == []


def test_pixels_beyond_the_last_patch_do_not_count() -> None:
    visual = own(image_size=36)  # 4 patches of 8 px, and 4 px left over
    rgb = images(visual)
    masks = torch.zeros_like(rgb[:, :1])
    with attending_to(visual, masks):
        nothing = visual(rgb)
    masks[..., 33:, 33:] = 1
    with attending_to(visual, masks):
        assert torch.equal(visual(rgb), nothing)


@torch.no_grad()
def test_a_patch_behind_a_convolutional_stem() -> None:
    """As MobileCLIP-B has it: the patches are of the stem's pixels."""
    visual = vitamin(class_token=True, global_pool="token")
    rgb = images(visual)
    plain = visual(rgb)
    with attending_to(visual, torch.ones_like(rgb[:, :1])):
        torch.testing.assert_close(visual(rgb), plain, rtol=1e-4, atol=1e-5)
    with attending_to(visual, corner(rgb)):
        assert not torch.allclose(visual(rgb), plain, atol=1e-3)


def test_gradients_flow(tower: Any) -> None:
    add_alpha_channel(tower)
    (alpha,) = alpha_parameters(tower)
    rgba = images(tower, 4)
    tower.set_grad_checkpointing()
    with attending_to(tower, corner(rgba)):
        features = tower(rgba)
    (gradient,) = torch.autograd.grad(features.square().sum(), alpha)  # after the context
    assert gradient.abs().max() > 0
    with torch.no_grad(), attending_to(tower, corner(rgba)):
        torch.testing.assert_close(tower(rgba), features, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_half_precision(tower: Any) -> None:
    rgb = images(tower)
    with attending_to(tower, corner(rgb)):
        full = tower(rgb)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = tower(rgb)
    torch.testing.assert_close(mixed.float(), full, rtol=0.05, atol=0.05)
    with attending_to(tower.bfloat16(), corner(rgb).bfloat16()):
        torch.testing.assert_close(tower(rgb.bfloat16()).float(), full, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_a_pass_that_fails_leaves_the_tower_as_it_was(tower: Any) -> None:
    rgb, before = images(tower), state(tower)
    with pytest.raises(ZeroDivisionError), attending_to(tower, corner(rgb)):
        with blocks_of(tower)[1].register_forward_hook(lambda *_: 1 / 0):
            tower(rgb)
    assert state(tower) == before


def test_a_model_points_its_image_tower(model: alpha_clip.AlphaClip) -> None:
    size = model.image_size
    rgb, mask = torch.randn(2, 3, size, size), torch.zeros(2, 1, size, size)
    mask[..., : size // 2, :] = 1
    with attending_to(model.visual, mask):
        pointed = model.encode_image(rgb, normalize=True)
    cosine = (pointed * model.encode_image(rgb, normalize=True)).sum(-1)
    assert (cosine < 0.999).all()


@pytest.mark.parametrize("name", [name for name, tower in TOWERS.items() if not tower[3]])
def test_towers_that_pool_in_another_way_are_refused(name: str) -> None:
    visual: Any = TOWERS[name][0]()
    kind = type(getattr(visual, "trunk", visual)).__name__
    message = rf"features come from its class token; {kind} pools in another way"
    with pytest.raises(ValueError, match=message), attending_to(visual, torch.ones(2, 1, 32, 32)):
        pass


def convnext() -> nn.Module:
    return _build_vision_tower(16, {"timm_model_name": "test_convnext", "timm_pool": "avg"})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (convnext, "got ConvNeXt"),
        (lambda: own(layers=[1, 1, 1, 1], width=16), "got ModifiedResNet"),
        (lambda: own(scaled_cosine_attn=True), "can't mask the attention of Attention"),
        (lambda: timm(VisionTransformer, attn_layer="diff"), "attention of DiffAttention"),
        (TOWERS["parallel"][0], "can't mask the attention of ParallelScalingBlock"),
    ],
)
def test_towers_that_take_no_mask_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with (
        pytest.raises(ValueError, match=message),
        attending_to(build(), torch.ones(2, 1, 32, 32)),
    ):
        pass


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.ones(2, 32, 32), r"expected masks \[batch, 1, height, width\].* got \[2, 32, 32\]"),
        (torch.ones(2, 1, 3, 32), r"got \[2, 1, 3, 32\]"),
        (torch.full((2, 1, 32, 32), 1.9), r"must lie in 0\.\.1, got 1\.9\.\.1\.9; of a normalised"),
        (torch.full((2, 1, 32, 32), torch.nan), r"must lie in 0\.\.1, got nan"),
    ],
)
def test_bad_masks_are_refused(masks: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message), attending_to(own(), masks):
        pass


def test_what_does_not_fit_the_pass_is_refused() -> None:
    visual = own()
    rgb = images(visual)
    with pytest.raises(ValueError, match=r"VisionTransformer has 3 blocks: .* got 3"):
        with attending_to(visual, corner(rgb), blocks=[0, 3]):
            pass
    with pytest.raises(ValueError, match=r"for 2 images of 17 tokens.* given 1 images of 17"):
        with attending_to(visual, corner(rgb)):
            visual(rgb[:1])
    dropping = own(patch_dropout=0.5).train()
    with pytest.raises(ValueError, match=r"given 2 images of 9; .*patch dropout off"):
        with attending_to(dropping, corner(rgb)):
            dropping(rgb)


def test_a_pass_without_the_hooks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    visual = own()
    monkeypatch.setattr(visual, "forward", lambda x: x)
    with pytest.raises(RuntimeError, match="a pass of VisionTransformer inside the context, saw"):
        with attending_to(visual, torch.ones(2, 1, 32, 32)):
            visual(images(visual))
