from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from test_huggingface import VIT, build
from test_multimodal import llava, logits, picture

from alpha_clip.export import huggingface
from alpha_clip.export.mixture_of_features import MixtureOfFeatures
from alpha_clip.export.multimodal import swap_vision_tower
from alpha_clip.export.region_processor import RegionProcessor
from alpha_clip.regions import Box

transformers = pytest.importorskip("transformers")


def dino(width: int = 64, patch: int = 4, grid: int = 4) -> Any:
    """A small ViT with two tokens that are no patches, as DINOv2 with a register."""
    torch.manual_seed(1)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=patch * grid,
        patch_size=patch,
        embed_dim=width,
        depth=1,
        num_heads=2,
        num_classes=0,
        reg_tokens=1,
    ).eval()


@pytest.fixture
def tower(tmp_path: Path) -> Any:
    huggingface.export(build(VIT), tmp_path / "alpha")
    return transformers.CLIPVisionModel.from_pretrained(tmp_path / "alpha").eval()


@pytest.mark.parametrize("width", [64, 32])
@torch.no_grad()
def test_features_are_added_patch_by_patch(tower: Any, width: int) -> None:
    other = dino(width)
    mixture = MixtureOfFeatures(tower, other, share=0.25).eval()
    rgba = torch.randn(2, 4, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5,) * 3, (0.5,) * 3))  # this ViT's
    pixels = rgba[:, :3] * mixture.tower_std + mixture.tower_mean
    small = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
    tokens = mixture.match(other.forward_features((small - mean) / std)[:, 2:])
    plain = tower(pixel_values=rgba, output_hidden_states=True)
    found = mixture(rgba, output_hidden_states=True, return_dict=True)
    expected = 0.75 * plain.hidden_states[-2][:, 1:] + 0.25 * tokens
    torch.testing.assert_close(found.hidden_states[-2][:, 1:], expected)
    torch.testing.assert_close(found.hidden_states[-2][:, 0], plain.hidden_states[-2][:, 0])
    torch.testing.assert_close(found.hidden_states[-1], plain.hidden_states[-1])
    torch.testing.assert_close(found.pooler_output, plain.pooler_output)


@torch.no_grad()
def test_features_are_interleaved(tower: Any) -> None:
    mixture = MixtureOfFeatures(tower, dino(), "interleaved").eval()
    rgba = torch.randn(2, 4, 32, 32)
    found = mixture(rgba).hidden_states[-2]
    assert found.shape == (2, 1 + 2 * 16, 64)
    plain = tower(pixel_values=rgba, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(found[:, 1::2], plain[:, 1:])
    other = torch.cat([rgba[:, :3], -rgba[:, 3:]], 1)  # another region, the same picture
    again = mixture(other).hidden_states[-2]
    torch.testing.assert_close(again[:, 2::2], found[:, 2::2])
    assert not torch.allclose(again[:, 1::2], found[:, 1::2], atol=1e-3)


@pytest.mark.parametrize(
    ("mixing", "kind"),
    [("additive", "llava"), ("additive", "llava_next"), ("interleaved", "llava")],
)
def test_a_multimodal_model_sees_with_both(tmp_path: Path, mixing: Any, kind: str) -> None:
    huggingface.export(build(VIT), tmp_path / "alpha")
    model, processor = llava(kind)
    swap_vision_tower(model, tmp_path / "alpha")
    ask = RegionProcessor(processor, tmp_path / "alpha")
    question = "what is this <image>"
    plain = logits(model, ask(picture(), Box(0, 0, 30, 50), text=question))
    mixture = MixtureOfFeatures(model.model.vision_tower, dino(), mixing, share=0.0)
    model.model.vision_tower = mixture.eval()
    if mixing == "interleaved":
        processor.num_additional_image_tokens += 16
    left, right = (
        logits(model, ask(picture(), box, text=question))
        for box in (Box(0, 0, 30, 50), Box(50, 0, 90, 50))
    )
    assert not torch.allclose(left[:, -1], right[:, -1], atol=1e-3)
    if mixing == "additive":
        torch.testing.assert_close(left, plain)
        mixture.share = 0.5
        assert not torch.allclose(
            logits(model, ask(picture(), Box(0, 0, 30, 50), text=question)), plain, atol=1e-3
        )
    else:
        assert left.shape[1] == plain.shape[1] + 16


def test_the_other_tower_is_frozen_unless_told(tower: Any) -> None:
    mixture = MixtureOfFeatures(tower, dino(32))
    assert not any(p.requires_grad for p in mixture.other.parameters())
    assert all(p.requires_grad for p in mixture.match.parameters())
    assert any(
        p.requires_grad for p in MixtureOfFeatures(tower, dino(), trainable=True).other.parameters()
    )
    assert mixture.config is tower.config
    assert mixture.dtype is torch.float32
    assert not any("mean" in name for name in mixture.state_dict())


def test_what_does_not_fit_is_refused(tower: Any) -> None:
    with pytest.raises(ValueError, match=r"share must lie in 0\.\.1, got 2"):
        MixtureOfFeatures(tower, dino(), share=2)
    with pytest.raises(ValueError, match="mixing must be additive or interleaved"):
        MixtureOfFeatures(tower, dino(), "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a ViT of timm's as the other tower, got Linear"):
        MixtureOfFeatures(tower, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"4 x 4 patches: .*img_size=16\)\), it is for \(20, 20\)"):
        MixtureOfFeatures(tower, dino(grid=5))
