import json
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP
from torch import nn

import alpha_clip
from alpha_clip.export import towers
from alpha_clip.export.torch_export import compare, export, serving
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import alpha_parameters
from alpha_clip.transforms import RegionTransform

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TOWERS: dict[str, dict[str, Any]] = {
    "ViT": VIT,
    "ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
    "timm ConvNeXt": {
        "timm_model_name": "test_convnext",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "image_size": 64,
    },
    "timm ViT": {
        "timm_model_name": "test_vit3",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": 160,
    },
}


def build(vision: dict[str, Any], clip: nn.Module | None = None) -> AlphaClip:
    torch.manual_seed(0)
    clip = (clip or CLIP(32, vision, TEXT)).eval()
    for parameter in alpha_parameters(alpha_clip.add_alpha_channel(clip.visual)):  # type: ignore
        nn.init.normal_(parameter, std=0.1)
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}
    return AlphaClip(clip, "small", config, RegionTransform(vision["image_size"]))


@pytest.fixture(scope="module")
def small() -> AlphaClip:
    return build(VIT)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, small: AlphaClip) -> Path:
    """An export of the small ViT. Read only."""
    folder = tmp_path_factory.mktemp("torch") / "out"
    before = {k: v.clone() for k, v in small.state_dict().items()}
    report = export(small, folder)
    assert report.max_difference <= 1e-5
    after = small.state_dict()
    assert before.keys() == after.keys()  # the model itself is not folded
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(p.requires_grad for p in small.parameters())
    return folder


@torch.no_grad()
def test_the_graphs_compute_the_same_for_any_batch(exported: Path, small: AlphaClip) -> None:
    image = torch.export.load(exported / "image.pt2").module()
    text = torch.export.load(exported / "text.pt2").module()
    for batch in (1, 3, 7):
        rgba, tokens = torch.randn(batch, 4, 32, 32), torch.randint(1, 64, (batch, 8))
        torch.testing.assert_close(image(rgba), small.encode_image(rgba), rtol=0, atol=1e-5)
        torch.testing.assert_close(text(tokens), small.encode_text(tokens), rtol=0, atol=1e-5)
    other = torch.cat([rgba[:, :3], -rgba[:, 3:]], 1)
    assert not torch.allclose(image(other), image(rgba), atol=1e-2)


def test_the_folder_says_what_the_towers_expect(exported: Path, small: AlphaClip) -> None:
    names = {p.name for p in exported.iterdir()}
    assert names == {"image.pt2", "text.pt2", "preprocess.json", "README.md"}
    assert json.loads((exported / "preprocess.json").read_text()) == {
        "size": 32,
        "mean": list(small.normalisation.mean),
        "std": list(small.normalisation.std),
        "alpha_mean": 0.5,
        "alpha_std": 0.26,
        "geometry": "center_crop",
        "interpolation": "bicubic",
        "context_length": 8,
    }


def test_the_graphs_hold_their_own_tower_and_no_paths_of_this_machine(exported: Path) -> None:
    text = torch.export.load(exported / "text.pt2")
    assert not [name for name in text.state_dict if "visual" in name]
    for name in ("image.pt2", "text.pt2"):
        with zipfile.ZipFile(exported / name) as archive:
            content = b"".join(archive.read(member) for member in archive.namelist())
        assert b"site-packages" not in content
        assert b"stack_trace" not in content


@pytest.mark.slow
@pytest.mark.parametrize("vision", TOWERS.values(), ids=TOWERS.keys())
def test_towers(vision: dict[str, Any], tmp_path: Path) -> None:
    assert export(build(vision), tmp_path / "out").max_difference <= 1e-5


@pytest.mark.slow
def test_a_coca_gives_its_pooled_features(tmp_path: Path) -> None:
    vision = {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    model = build(vision, CoCa(32, {**text, "context_length": 8}, text, vision))
    assert export(model, tmp_path / "out").max_difference <= 1e-5
    text_tower = torch.export.load(tmp_path / "out" / "text.pt2")
    assert not [name for name in text_tower.state_dict if "decoder" in name]


def test_a_folded_half_precision_model_in_training_is_exported_in_fp32(tmp_path: Path) -> None:
    model = build({**VIT, "patch_dropout": 0.5})
    alpha_clip.fold_alpha(model.visual)
    model.train().bfloat16()
    assert export(model, tmp_path / "out").max_difference <= 1e-5
    assert model.visual.training
    assert model.dtype == torch.bfloat16


def test_what_cannot_be_traced_is_refused_by_name(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    model = build(VIT)
    model.visual.ln_post = Branching()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"can't trace image\.pt2 of small \(VisionTransformer\)"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_differs_is_not_kept(
    small: AlphaClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(towers, "largest_difference", lambda *_: 2e-5)
    with pytest.raises(ValueError, match=r"differ by 2\.0e-05, more than 1e-05; it was not kept"):
        export(small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_kept(small: AlphaClip, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; pass --overwrite true"):
        export(small, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_compare_notices_another_model(exported: Path, small: AlphaClip) -> None:
    assert compare(small, exported) <= 1e-5
    for name in ("visual.conv1.weight_alpha", "text_projection"):
        other = deepcopy(small)
        other.clip.get_parameter(name).data.mul_(1.01)
        assert compare(other, exported) > 1e-4


def test_serving_folds_a_copy_and_compiles_late(
    small: AlphaClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = serving(small, backend="eager")
    rgba = torch.randn(3, 4, 32, 32)
    features = encode(rgba)
    assert not features.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(features, small.encode_image(rgba), rtol=0, atol=1e-5)
    assert alpha_parameters(small.visual)  # kept apart
    with pytest.raises(Exception, match="no_such_backend"):
        serving(small, backend="no_such_backend")


def test_serving_keeps_the_type_of_the_weights() -> None:
    model = build(VIT).bfloat16()
    assert serving(model, backend="eager")(torch.randn(1, 4, 32, 32)).dtype == torch.bfloat16
