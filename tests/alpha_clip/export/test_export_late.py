"""Late alpha leaves as two graphs, or not at all."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from torch import nn

import alpha_clip
from alpha_clip.export import onnx as onnx_target
from alpha_clip.export import torch_export
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import alpha_parameters
from alpha_clip.transforms import RegionTransform

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "head_width": 32}
TIMM = {
    "timm_model_name": "test_vit3",
    "timm_model_pretrained": False,
    "timm_pool": "map",
    "timm_proj": "none",
    "image_size": 160,
}
STOCK = [
    "blip2",
    "huggingface",
    "huggingface_clip",
    "huggingface_rgb",
    "huggingface_siglip",
    "open_clip",
    "open_clip_rgb",
    "published",
    "timm",
]


def build(vision: dict[str, Any], block: int) -> AlphaClip:
    torch.manual_seed(0)
    clip = CLIP(64, vision, TEXT).eval()
    for kernel in alpha_parameters(alpha_clip.add_alpha_channel(clip.visual, block)):
        nn.init.normal_(kernel, std=0.1)
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": TEXT}
    return AlphaClip(clip, "small", config, RegionTransform(vision["image_size"]))


def regions(model: AlphaClip) -> tuple[torch.Tensor, ...]:
    """Two images, five regions, and whose they are."""
    size = model.image_size
    alpha = torch.randn(5, 1, size, size).sign() * 1.92
    return torch.randn(2, 3, size, size), alpha, torch.tensor([0, 1, 1, 0, 1])


@torch.no_grad()
def expected(model: AlphaClip, rgb: Any, alpha: Any, image: Any) -> torch.Tensor:
    return model.encode_image(torch.cat([rgb[image], alpha], 1))


@torch.no_grad()
def test_torch_export_writes_a_trunk_and_a_head(tmp_path: Path) -> None:
    model = build(VIT, 2)
    assert torch_export.export(model, tmp_path / "out").max_difference <= 1e-5
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"trunk.pt2", "head.pt2", "text.pt2", "preprocess.json", "README.md"}
    programs = {n: torch.export.load(tmp_path / "out" / f"{n}.pt2") for n in ("trunk", "head")}
    trunk, head = (p.module() for p in programs.values())
    rgb, alpha, image = regions(model)
    found = head(trunk(rgb), alpha, image)
    torch.testing.assert_close(found, expected(model, rgb, alpha, image), rtol=0, atol=1e-5)
    blocks = {
        name: {key.split("resblocks.")[1][0] for key in p.state_dict if "resblocks" in key}
        for name, p in programs.items()
    }
    assert blocks == {"trunk": {"0", "1"}, "head": {"2", "3"}}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "features = head(trunk(rgb), alpha, image)" in card


@pytest.mark.slow
@torch.no_grad()
def test_onnx_writes_a_trunk_and_a_head(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = build(VIT, 2)
    assert onnx_target.export(model, tmp_path / "out").max_difference <= 1e-4
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"trunk.onnx", "head.onnx", "text.onnx", "preprocess.json", "README.md"}
    trunk, head = (
        runtime.InferenceSession(str(tmp_path / "out" / f"{n}.onnx")) for n in ("trunk", "head")
    )
    rgb, alpha, image = regions(model)
    (tokens,) = trunk.run(None, {"rgb": rgb.numpy()})
    given = {"image_tokens": tokens, "alpha": alpha.numpy(), "image": image.numpy()}
    (found,) = head.run(None, given)
    theirs = torch.from_numpy(found)
    torch.testing.assert_close(theirs, expected(model, rgb, alpha, image), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_trunk_of_timm_is_cut_as_well(tmp_path: Path) -> None:
    assert torch_export.export(build(TIMM, 3), tmp_path / "torch").max_difference <= 1e-5
    pytest.importorskip("onnxruntime")
    assert onnx_target.export(build(TIMM, 3), tmp_path / "onnx").max_difference <= 1e-4


@torch.no_grad()
def test_serving_takes_late_alpha() -> None:
    model = build(VIT, 2)
    rgb, alpha, image = regions(model)
    rgba = torch.cat([rgb[image], alpha], 1)
    found = torch_export.serving(model, backend="eager")(rgba)
    torch.testing.assert_close(found, model.encode_image(rgba), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", STOCK)
def test_stock_code_that_cannot_hold_it_is_refused_with_the_reason(
    name: str, tmp_path: Path
) -> None:
    vision = TIMM if name in ("huggingface_siglip", "blip2") else VIT
    target = import_module(f"alpha_clip.export.{name}")
    why = r"alpha enters small in front of block 1.*torch_export or onnx"
    with pytest.raises(ValueError, match=why):
        target.export(build(vision, 1), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_target_was_looked_at() -> None:
    from pkgutil import iter_modules

    import alpha_clip.export as targets
    from alpha_clip.cli import _NO_TARGETS

    known = {module.name for module in iter_modules(targets.__path__)} - _NO_TARGETS
    assert known == {*STOCK, "onnx", "torch_export"}
