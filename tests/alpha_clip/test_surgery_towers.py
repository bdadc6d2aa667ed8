"""The surgery on every architecture of open_clip, on a real tower of each family, in every mode."""

import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from open_clip.model import CLIP, _build_vision_tower
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alpha_clip.surgery import (
    AlphaConv2d,
    add_alpha_channel,
    alpha_parameters,
    find_stems,
    fold_alpha,
    sharing_rgb,
)

TWO_STEMS = {"MobileCLIP-S1", "MobileCLIP-S2", "MobileCLIP2-S0", "MobileCLIP2-S2"}
FAMILIES = [
    *("ViT-S-32", "RN50", "coca_ViT-B-32", "EVA02-B-16", "ViT-B-32-SigLIP2-256"),
    *("PE-Core-T-16-384", "convnext_tiny", "ViTamin-S", "swin_base_patch4_window7_224"),
    *("MobileCLIP2-S0", "MobileCLIP-B", "vit_relpos_medium_patch16_cls_224"),
    "vit_medium_patch16_gap_256",
]


def build(name: str) -> Any:
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["timm_model_pretrained"] = False
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # timm draws its initial weights on the meta device, where there are none.
        warnings.filterwarnings("ignore", ".*no-op for zero-element tensors|.*meta")
        return _build_vision_tower(
            config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
        ).eval()


def features(visual: nn.Module, image: Tensor) -> Tensor:
    out = visual(image)
    return out[0] if isinstance(out, tuple) else out  # CoCa's gives its tokens as well


def size_of(visual: Any) -> int:
    size = visual.image_size
    return int(size[0] if isinstance(size, tuple) else size)


@pytest.mark.slow
@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_architecture(name: str) -> None:
    with torch.device("meta"):
        visual = build(name)
    keys, stems = list(visual.state_dict()), find_stems(visual)
    assert len(stems) == (2 if name in TWO_STEMS else 1)
    add_alpha_channel(visual)
    state = visual.state_dict()
    new = [f"{stem}.weight_alpha" for stem in stems]
    assert [key for key in state if key not in new] == keys
    assert set(new) < set(state)
    assert all(p.is_meta and p.shape[1] == 1 for p in alpha_parameters(visual))
    fold_alpha(visual)
    assert list(visual.state_dict()) == keys
    assert all(visual.get_submodule(stem).weight.shape[1] == 4 for stem in stems)


@pytest.mark.skipif(
    Version(open_clip.__version__) < Version("3.3"), reason="open_clip 3.3 has 144 architectures"
)
def test_there_are_as_many_architectures_as_documented() -> None:
    assert len(open_clip.list_models()) >= 144


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_real_tower_of_each_family(name: str) -> None:
    if name not in open_clip.list_models():
        pytest.skip(f"open_clip {open_clip.__version__} has no {name}")
    visual = build(name)
    size = size_of(visual)
    rgba = torch.randn(1, 4, size, size)
    with torch.no_grad():
        before = features(visual, rgba[:, :3])
        add_alpha_channel(visual)
        assert torch.equal(features(visual, rgba), before)
        with sharing_rgb(rgba[:, :3]):
            assert torch.equal(features(visual, rgba[:, 3:]), before)
    for parameter in visual.parameters():
        parameter.requires_grad_(False)
    for parameter in alpha_parameters(visual):
        parameter.requires_grad_(True)
    features(visual, rgba).square().sum().backward()
    for parameter in alpha_parameters(visual):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        trained = features(visual, rgba)
        assert not torch.allclose(trained, before, rtol=1e-3)
        with sharing_rgb(rgba[:, :3]):
            shared = features(visual, rgba[:, 3:])
        scale = float(trained.abs().max())
        torch.testing.assert_close(shared, trained, rtol=0, atol=1e-5 * scale)
        folded = features(fold_alpha(visual), rgba)
        torch.testing.assert_close(folded, trained, rtol=0, atol=1e-5 * scale)


@pytest.mark.slow
def test_a_mobileclip_is_folded_before_it_is_reparameterised() -> None:
    from timm.utils.model import reparameterize_model

    visual = build("MobileCLIP2-S0")
    with torch.no_grad():
        add_alpha_channel(visual)
        for parameter in alpha_parameters(visual):
            nn.init.normal_(parameter, std=0.05)
        rgba = torch.randn(1, 4, size_of(visual), size_of(visual))
        trained = features(visual, rgba)
        fold_alpha(visual)
        visual.trunk = reparameterize_model(visual.trunk)
        small = features(visual, rgba)
    torch.testing.assert_close(small, trained, rtol=0, atol=1e-4 * float(trained.abs().max()))
    with pytest.raises(ValueError, match=r"reparameterised for inference, .* add the alpha"):
        add_alpha_channel(visual)


def test_a_linear_stem_is_refused_by_name() -> None:
    import timm

    with pytest.raises(ValueError, match=r"NaFlexVit\.embeds\.proj to be a Conv2d .* got Linear"):
        add_alpha_channel(timm.create_model("naflexvit_base_patch16_gap"))


def test_a_bare_timm_model_takes_alpha() -> None:
    import timm

    model = timm.create_model("test_vit").eval()
    rgba = torch.randn(1, 4, 160, 160)
    with torch.no_grad():
        before = model(rgba[:, :3])
        assert torch.equal(add_alpha_channel(model)(rgba), before)
    assert isinstance(model.patch_embed.proj, AlphaConv2d)


# Modes, on tiny towers.

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
TIMM: dict[str, Any] = {"timm_model_pretrained": False, "timm_proj": "linear", "timm_pool": "avg"}
TOWERS: dict[str, dict[str, Any]] = {
    "ViT": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
    "timm ResNet": {**TIMM, "timm_model_name": "test_resnet", "image_size": 64},
}


@pytest.fixture(params=TOWERS.values(), ids=TOWERS.keys())
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, Tensor]:
    """The same tower without and with a fresh alpha channel, and RGBA for it."""
    torch.manual_seed(0)
    plain, treated = (CLIP(32, request.param, TEXT).eval().visual for _ in range(2))
    treated.load_state_dict(plain.state_dict())
    size = request.param["image_size"]
    return plain, add_alpha_channel(treated), torch.randn(2, 4, size, size)


def alpha_gradient(visual: nn.Module, rgba: Tensor) -> Tensor:
    (parameter,) = alpha_parameters(visual)
    parameter.grad = None
    visual(rgba).float().square().sum().backward()
    assert parameter.grad is not None
    return parameter.grad.clone()


def test_autocast(pair: tuple[Any, Any, Tensor]) -> None:
    plain, treated, rgba = pair
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(rgba[:, :3])
        assert torch.equal(treated(rgba), expected)
        assert expected.dtype == torch.bfloat16
        with sharing_rgb(rgba[:, :3]):
            assert torch.equal(treated(rgba[:, 3:]), expected)
        assert alpha_gradient(treated, rgba).abs().max() > 0


def test_channels_last(pair: tuple[Any, Any, Tensor]) -> None:
    plain, treated, rgba = pair
    expected_gradient = alpha_gradient(treated, rgba)
    plain.to(memory_format=torch.channels_last)
    treated.to(memory_format=torch.channels_last)
    rgba = rgba.to(memory_format=torch.channels_last)
    rgb = rgba[:, :3].contiguous(memory_format=torch.channels_last)
    assert torch.equal(treated(rgba), plain(rgb))
    gradient = alpha_gradient(treated, rgba)
    atol = 1e-4 * float(gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("pair", [TOWERS["ViT"]], indirect=True, ids=["ViT"])
def test_gradient_checkpointing(pair: tuple[Any, Any, Tensor]) -> None:
    _, treated, rgba = pair
    treated.train()
    expected = alpha_gradient(treated, rgba)
    treated.set_grad_checkpointing(True)
    assert torch.equal(alpha_gradient(treated, rgba), expected)


def test_compile(pair: tuple[Any, Any, Tensor]) -> None:
    plain, treated, rgba = pair
    torch._dynamo.reset()
    compiled, compiled_plain = (
        torch.compile(tower, backend="aot_eager", fullgraph=True) for tower in (treated, plain)
    )
    with torch.no_grad():
        assert torch.equal(compiled(rgba), compiled_plain(rgba[:, :3]))
    gradient = alpha_gradient(treated, rgba)
    atol = 1e-4 * float(gradient.abs().max())
    torch.testing.assert_close(alpha_gradient(compiled, rgba), gradient, rtol=1e-3, atol=atol)


def test_export(pair: tuple[Any, Any, Tensor]) -> None:
    _, treated, rgba = pair
    program = torch.export.export(treated, (rgba,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(rgba), treated(rgba))


def test_meta(pair: tuple[Any, Any, Tensor]) -> None:
    _, treated, rgba = pair
    treated.to("meta")
    assert treated(rgba.to("meta")).shape == (2, 32)
    assert alpha_gradient(treated, rgba.to("meta")).is_meta


def _ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    visual = add_alpha_channel(CLIP(32, TOWERS["ViT"], TEXT).visual)
    wrapped = DistributedDataParallel(visual)
    batch = torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    wrapped(batch[2 * rank : 2 * rank + 2]).square().mean().backward()
    (parameter,) = alpha_parameters(wrapped)
    if rank == 1:
        torch.save(parameter.grad, f"{folder}/gradient.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_get_the_gradient_of_the_joined_batch(tmp_path: Path) -> None:
    mp.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    visual = add_alpha_channel(CLIP(32, TOWERS["ViT"], TEXT).visual)
    batch = torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    visual(batch).square().mean().backward()
    (parameter,) = alpha_parameters(visual)
    gradient = torch.load(tmp_path / "gradient.pt", weights_only=True)
    torch.testing.assert_close(gradient, parameter.grad)


# RGB shared by many alphas.


@pytest.fixture
def trained(pair: tuple[Any, Any, Tensor]) -> nn.Module:
    treated: nn.Module = pair[1]
    for parameter in alpha_parameters(treated):
        nn.init.normal_(parameter, std=0.1)
    return treated


def test_shared_rgb_is_convolved_once(pair: Any, trained: nn.Module) -> None:
    _, _, rgba = pair
    size = rgba.shape[-1]
    alphas = torch.randn(5, 1, size, size)
    owner = torch.tensor([0, 1, 1, 0, 1])
    (stem,) = [m for m in trained.modules() if isinstance(m, AlphaConv2d)]
    seen: list[int] = []
    convolve = stem.respond_to_rgb
    stem.respond_to_rgb = lambda rgb: seen.append(len(rgb)) or convolve(rgb)  # type: ignore
    with torch.no_grad(), sharing_rgb(rgba[:, :3]) as shared:
        shared.owner = owner[:3]
        first = trained(alphas[:3])
        shared.owner = owner[3:]
        second = trained(alphas[3:])
    assert seen == [2]
    with torch.no_grad():
        expected = trained(torch.cat([rgba[owner, :3], alphas], 1))
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_shared_rgb(pair: Any, trained: nn.Module) -> None:
    rgba = pair[2].double()  # a ReLU near zero makes single precision jump
    trained.double()
    alphas = torch.randn(3, 1, *rgba.shape[2:], dtype=torch.float64)
    parameters = [p for p in trained.parameters() if p.ndim == 4][:2]
    with sharing_rgb(rgba[:1, :3]):
        loss = trained(alphas).square().sum()
    shared = torch.autograd.grad(loss, parameters)
    whole = trained(torch.cat([rgba[:1, :3].expand(3, -1, -1, -1), alphas], 1)).square().sum()
    for ours, theirs in zip(shared, torch.autograd.grad(whole, parameters), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_alpha_alone_is_refused_outside(pair: Any, trained: nn.Module) -> None:
    _, _, rgba = pair
    with torch.no_grad(), sharing_rgb(rgba[:, :3]):
        trained(rgba[:, 3:])
    with pytest.raises(ValueError, match="an alpha tower takes 4 channels"):
        trained(rgba[:, 3:])
