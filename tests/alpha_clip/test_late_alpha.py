import copy
import pickle
from typing import Any

import pytest
import torch
from test_attention import TOWERS, families, images, own, pooled, timm
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from alpha_clip import AlphaEntry, add_alpha_channel, fold_alpha
from alpha_clip.attention import attention_of, encode_with_attention, find_blocks
from alpha_clip.attention_masking import attending_to
from alpha_clip.late_alpha import LateAlpha
from alpha_clip.many_regions import encode_many
from alpha_clip.surgery import alpha_entry, alpha_parameters

REFUSED = ["BEiT"]
LATE = [name for name in TOWERS if name not in REFUSED]
PLAIN = AlphaEntry(2, repeat=False, summary=False)


def waken(visual: nn.Module) -> nn.Module:
    """Give alpha something to say."""
    generator = torch.Generator().manual_seed(3)
    for kernel in alpha_parameters(visual):
        kernel.data = torch.randn(kernel.shape, generator=generator) * 0.2
    return visual


def regions(rgb: torch.Tensor, count: int = 3) -> torch.Tensor:
    return torch.randn(len(rgb), count, 1, *rgb.shape[-2:]).sign() * 1.92


def one_by_one(visual: nn.Module, rgb: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    rows = [
        pooled(visual(torch.cat([image, alpha])[None]))[0]
        for image, marks in zip(rgb, alphas, strict=True)
        for alpha in marks
    ]
    return torch.stack(rows).unflatten(0, alphas.shape[:2])


@pytest.mark.parametrize("entry", [1, 2, PLAIN, AlphaEntry(0)], ids=str)
@pytest.mark.parametrize("name", LATE)
@torch.no_grad()
def test_begins_as_the_tower_it_was(name: str, entry: Any) -> None:
    visual = TOWERS[name][0]()
    rgb = images(visual)
    before = pooled(visual(rgb))
    assert add_alpha_channel(visual, entry) is visual
    for alpha in (torch.ones_like(rgb[:, :1]), torch.randn_like(rgb[:, :1])):
        assert torch.equal(pooled(visual(torch.cat([rgb, alpha], 1))), before)


@pytest.mark.parametrize("entry", [1, PLAIN, AlphaEntry(0)], ids=str)
@pytest.mark.parametrize("name", LATE)
@torch.no_grad()
def test_shared_blocks_give_the_numbers_of_one_by_one(name: str, entry: Any) -> None:
    visual = waken(add_alpha_channel(TOWERS[name][0](), entry))
    rgb = images(visual)
    alphas = regions(rgb)
    expected = one_by_one(visual, rgb, alphas)
    assert not torch.allclose(expected[:, 0], expected[:, 1], atol=1e-3)
    for chunk in (1, 2, 4, 100):
        found = encode_many(visual, rgb, alphas, chunk)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", LATE)
@torch.no_grad()
def test_blocks_before_alpha_see_the_picture_alone(name: str) -> None:
    visual = waken(add_alpha_channel(TOWERS[name][0](), 2))
    seen: dict[int, list[torch.Tensor]] = {}
    home = visual.transformer.resblocks if hasattr(visual, "transformer") else visual.trunk.blocks
    for number, block in enumerate(home):
        block.register_forward_hook(
            lambda _, args, x, number=number: seen.setdefault(number, []).append(x)
        )
    rgb = images(visual)
    for alpha in regions(rgb, 2).unbind(1):
        visual(torch.cat([rgb, alpha], 1))
    same = [torch.equal(*seen[number]) for number in range(3)]
    assert same == [True, True, False]


@torch.no_grad()
def test_shared_blocks_run_once_an_image() -> None:
    visual = waken(add_alpha_channel(own(layers=4), 3))
    rows = [0] * 4
    for number, block in enumerate(visual.transformer.resblocks):
        block.register_forward_pre_hook(
            lambda _, args, number=number: rows.__setitem__(number, rows[number] + len(args[0]))
        )
    rgb = images(visual)
    encode_many(visual, rgb, regions(rgb, 5), chunk=3)
    assert rows == [2, 2, 2, 10]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["ViT", "EVA02", "SigLIP", "registers", "CoCa"])
def test_training_on_many_regions_gives_the_gradient_of_one_by_one(
    name: str, recompute: bool
) -> None:
    visual = waken(add_alpha_channel(TOWERS[name][0](), 1)).train()
    rgb = images(visual)
    alphas = regions(rgb)
    weights = torch.randn(2, 3, 16)

    def gradients(features: torch.Tensor) -> list[torch.Tensor]:
        visual.zero_grad()
        (features[..., :16] * weights[..., : features.shape[-1]]).sum().backward()
        return [p.grad.clone() for p in visual.parameters() if p.grad is not None]

    expected = gradients(one_by_one(visual, rgb, alphas))
    found = gradients(encode_many(visual, rgb, alphas, 2, recompute))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()) + 1e-6)


def test_one_backward_goes_through_the_shared_blocks_once() -> None:
    visual = waken(add_alpha_channel(own(), 2)).train()
    rows: list[int] = []
    visual.transformer.resblocks[0].register_full_backward_hook(
        lambda _, grad_in, grad_out: rows.append(len(grad_out[0]))
    )
    rgb = images(visual)
    encode_many(visual, rgb, regions(rgb, 4), chunk=8).sum().backward()
    assert rows == [2]


@pytest.mark.parametrize("name", ["ViT", "timm ViT", "EVA02"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    visual = waken(add_alpha_channel(TOWERS[name][0](), 1)).train()
    rgba = images(visual, 4)
    found = []
    for on in (False, True):
        visual.set_grad_checkpointing(on)
        visual.zero_grad()
        # Two passes before the gradient: each has to find its own alpha again.
        (pooled(visual(rgba)) + 2 * pooled(visual(-rgba))).square().sum().backward()
        found.append([p.grad.clone() for p in visual.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["ViT", "timm ViT", "EVA02", "SigLIP"])
@torch.no_grad()
def test_copies_and_pickles_work_on_their_own(name: str) -> None:
    visual = waken(add_alpha_channel(TOWERS[name][0](), 1))
    rgba = images(visual, 4)
    expected = visual(rgba)
    twins = [copy.deepcopy(visual), pickle.loads(pickle.dumps(visual))]
    for kernel in alpha_parameters(visual):
        kernel.zero_()
    for twin in twins:
        assert isinstance(twin, LateAlpha)
        assert type(twin) is type(visual)
        assert torch.equal(twin(rgba), expected)


@torch.no_grad()
def test_the_summary_tells_the_class_token_what_lies_in_the_region() -> None:
    visual = waken(add_alpha_channel(own(), AlphaEntry(2, repeat=False)))
    adds = visual.alpha_patches[0]
    adds.weight_alpha.zero_()
    tokens = torch.randn(1, 17, 64)
    alpha = torch.full((1, 1, 32, 32), -1.92)
    alpha[..., 2:5, 10:12] = 1.92  # a little of the second patch
    changed = adds(tokens, alpha)
    normed = nn.functional.layer_norm(tokens[:, 1:], (64,))
    matrix = adds.summary.weight_alpha.T / 8
    assert torch.allclose(changed[:, 0], tokens[:, 0] + normed[:, 1] @ matrix, atol=0.02)
    assert torch.equal(changed[:, 1:], tokens[:, 1:])
    # Half of the third patch as well: a pixel in it counts half of one in the second.
    alpha[..., :8, 8:16] = 1.92
    alpha[..., :4, 16:24] = 1.92
    mean = (normed[:, 1] + 0.25 * normed[:, 2]) / 1.25
    changed = adds(tokens, alpha)
    assert torch.allclose(changed[:, 0], tokens[:, 0] + mean @ matrix, atol=1e-2)
    for everywhere in (-1.92, 0.0, 1.92):
        whole = adds(tokens, torch.full((1, 1, 32, 32), everywhere))
        assert torch.allclose(whole[:, 0], tokens[:, 0] + normed.mean(1) @ matrix, atol=1e-5)


@torch.no_grad()
def test_the_summary_is_finite_for_an_empty_region_and_in_half_precision() -> None:
    visual = waken(add_alpha_channel(own(), 1)).half()
    rgba = torch.randn(1, 4, 32, 32)
    rgba[:, 3] = -1.92
    assert torch.isfinite(visual(rgba.half())).all()


@torch.no_grad()
def test_attention_can_be_read_and_masked() -> None:
    visual = waken(add_alpha_channel(own(), 2))
    rgb = images(visual)
    alphas = regions(rgb)
    _, attention = encode_with_attention(visual, torch.cat([rgb, alphas[:, 0]], 1))
    assert attention.shape == (2, 2, 17, 17)
    with attention_of(visual, 0) as before, attention_of(visual, 2) as after:
        encode_many(visual, rgb, alphas, chunk=100)
    assert len(before[0]) == 2  # images
    assert len(after[0]) == 6  # regions
    rgba = torch.cat([rgb, alphas[:, 0]], 1)
    with attending_to(visual, torch.ones_like(rgb[:, :1])):
        masked = visual(rgba)
    assert torch.allclose(masked, visual(rgba), atol=1e-5)


def test_stems_are_refused_with_a_reason() -> None:
    for visual, block, why in [
        (timm(Beit), 1, "Beit can't be run block by block"),
        (own(), 3, r"VisionTransformer has 3 blocks: expected alpha_block in 0..2, got 3"),
        (timm(VisionTransformer), 7, "has 3 blocks"),
        (own(patch_dropout=0.5), 1, "leaves out patches"),
        (timm(VisionTransformer, patch_drop_rate=0.5), 1, "leaves out patches"),
        (nn.Conv2d(3, 4, 1), 1, "conv1"),
        (timm(VisionTransformer).trunk, 1, "inside open_clip's tower"),
        (add_alpha_channel(own(), 1), 1, "already"),
        (add_alpha_channel(own(), 1), 0, "already"),
        (add_alpha_channel(own()), 1, "already"),
    ]:
        with pytest.raises(ValueError, match=why):
            add_alpha_channel(visual, block)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="alpha_block"):
            add_alpha_channel(own(), wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ModifiedResNet"):
        add_alpha_channel(own(layers=[1, 1, 1, 1], width=32, head_width=32), 1)
    with pytest.raises(ValueError, match="in front of block 1"):
        fold_alpha(add_alpha_channel(own(), 1))
    with pytest.raises(ValueError, match=r"4 channels.*\[2, 3, 32, 32\]"):
        add_alpha_channel(own(), 1)(torch.randn(2, 3, 32, 32))


def test_block_zero_is_the_papers_place() -> None:
    visual = add_alpha_channel(own(), 0)
    assert alpha_entry(visual).is_first_layer
    assert [k for k in visual.state_dict() if "alpha" in k] == ["conv1.weight_alpha"]
    assert alpha_entry(add_alpha_channel(own(), 2)) == AlphaEntry(2)


@torch.no_grad()
def test_compiled_blocks_give_the_same() -> None:
    visual = waken(add_alpha_channel(own(), 1))
    rgb = images(visual)
    alphas = regions(rgb)
    expected = encode_many(visual, rgb, alphas, 100)
    visual.compile(backend="eager")
    assert torch.allclose(encode_many(visual, rgb, alphas, 100), expected, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_families_of_open_clip() -> None:
    """One tower of each family: shapes only."""
    refused, supported = set(), set()
    for dim, kind, visual in families():
        with torch.device("meta"):
            try:
                find_blocks(visual)
            except ValueError:
                with pytest.raises(ValueError, match=kind):
                    add_alpha_channel(visual, 1)
                refused.add(kind)
                continue
            add_alpha_channel(visual, 1)
            supported.add(kind)
            rgb = images(visual)[:1]
            features = encode_many(visual, rgb, regions(rgb, 2), chunk=4)
            assert features.shape == (1, 2, dim)
    assert supported == {"VisionTransformer", "Eva", "VisionTransformerRelPos"}
    assert refused == {"ModifiedResNet", "ConvNeXt", "FastVit", "SwinTransformer"}
