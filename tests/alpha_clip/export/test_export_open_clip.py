import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from torch import nn

import alpha_clip
from alpha_clip.export import open_clip_rgb, towers
from alpha_clip.export.open_clip import compare, export
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import alpha_parameters
from alpha_clip.transforms import RegionTransform

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
TIMM: dict[str, Any] = {"timm_model_pretrained": False, "timm_pool": "", "image_size": 160}
CONVNEXT = {**TIMM, "timm_model_name": "test_convnext"}
TIMM_RESNET = {**TIMM, "timm_model_name": "test_resnet"}
SIGLIP = {**TIMM, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"}
FAMILIES = [  # the stem alone is touched: a tower for each kind of stem
    *("ViT-S-32", "RN50", "PE-Core-T-16-384", "convnext_tiny", "ViTamin-S", "MobileCLIP2-S0"),
]


def build(vision: dict[str, Any], name: str = "small", dim: int = 32, **more: Any) -> AlphaClip:
    torch.manual_seed(0)
    clip = CLIP(dim, vision, TEXT, **more).eval()
    for parameter in alpha_parameters(alpha_clip.add_alpha_channel(clip.visual)):
        nn.init.normal_(parameter, std=0.1)
    config = {"embed_dim": dim, "vision_cfg": vision, "text_cfg": TEXT, **more}
    size = vision["image_size"]
    return AlphaClip(clip, name, config, RegionTransform(size)).requires_grad_(False)


@pytest.fixture(scope="module")
def small() -> AlphaClip:
    return build(VIT)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, small: AlphaClip) -> Path:
    """An export of the small ViT. Read only."""
    folder = tmp_path_factory.mktemp("open_clip") / "out"
    before = {k: v.clone() for k, v in small.state_dict().items()}
    report = export(small, folder)
    assert report.directory == str(folder)
    assert report.max_difference <= 1e-5
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in before.items())
    assert len(alpha_parameters(small.visual)) == 1  # the model itself is not folded
    return folder


@torch.no_grad()
@pytest.mark.parametrize("vision", [VIT, RESNET, CONVNEXT], ids=["ViT", "ResNet", "ConvNeXt"])
def test_the_card_says_how_stock_open_clip_loads_it(
    vision: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(vision)
    assert export(model, tmp_path / "out").max_difference <= 1e-5
    usage = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    rgba = torch.randn(2, 4, vision["image_size"], vision["image_size"])
    names: dict[str, Any] = {"rgba": rgba}
    monkeypatch.chdir(tmp_path / "out")
    exec(usage, names)
    torch.testing.assert_close(names["features"], model.encode_image(rgba), rtol=0, atol=1e-5)
    other = names["model"].encode_image(torch.cat([rgba[:, :3], -rgba[:, 3:]], 1))
    assert not torch.allclose(other, names["features"], rtol=0, atol=1e-4)


def test_without_those_lines_it_is_refused_and_not_misread(exported: Path) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for visual\.conv1\.weight"):
        open_clip.create_model(f"local-dir:{exported}")


@torch.no_grad()
def test_this_package_loads_it_as_well(exported: Path, small: AlphaClip) -> None:
    weights = exported / "open_clip_model.safetensors"
    loaded, _, _ = alpha_clip.create_model(f"local-dir:{exported}", checkpoint=weights)
    rgba = torch.randn(2, 4, 32, 32)
    assert torch.equal(loaded.encode_image(rgba), small.encode_image(rgba))


def test_the_config_has_open_clips_schema(exported: Path, small: AlphaClip) -> None:
    record = json.loads((exported / "open_clip_config.json").read_text())
    assert record["model_cfg"] == small.config
    assert record["preprocess_cfg"]["mean"] == list(small.normalisation.mean)
    assert record["alpha_clip"]["alpha_std"] == 0.26
    names = {p.name for p in exported.iterdir()}
    assert names == {"README.md", "open_clip_config.json", "open_clip_model.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_real_tower_of_each_family(name: str, tmp_path: Path) -> None:
    if name not in open_clip.list_models():
        pytest.skip(f"open_clip {open_clip.__version__} has no {name}")
    config = open_clip.get_model_config(name)
    vision = {"image_size": 224, **config["vision_cfg"]}
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    model = build(vision, name, config["embed_dim"], quick_gelu=config.get("quick_gelu", False))
    assert export(model, tmp_path / "out").max_difference <= 1e-5


# The whole image, without a fourth channel.


@torch.no_grad()
@pytest.mark.parametrize("vision", [VIT, CONVNEXT, SIGLIP], ids=["ViT", "ConvNeXt", "SigLIP"])
def test_with_three_channels_it_is_a_plain_clip(vision: dict[str, Any], tmp_path: Path) -> None:
    model = build(vision)
    positions = model.state_dict().get("visual.positional_embedding", torch.zeros(0)).clone()
    assert open_clip_rgb.export(model, tmp_path / "out").max_difference <= 1e-5
    plain, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    rgb = preprocess(Image.new("RGB", (50, 40), (200, 30, 60)))[None]
    ours, theirs = model.encode_image(rgb), plain.eval().encode_image(rgb)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    background = torch.full_like(rgb[:, :1], -model.normalisation.whole_image)
    assert not torch.allclose(model.encode_image(rgb, background), ours, rtol=0, atol=1e-3)
    record = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert "alpha_clip" not in record
    assert "the region is the whole image" in (tmp_path / "out" / "README.md").read_text()
    assert torch.equal(
        model.state_dict().get("visual.positional_embedding", torch.zeros(0)), positions
    )


@pytest.mark.parametrize("vision", [RESNET, TIMM_RESNET], ids=["ResNet", "timm ResNet"])
def test_three_channels_are_refused_where_they_are_not_exact(
    vision: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"conv1.* pads with zeros: one alpha everywhere can't be"):
        open_clip_rgb.export(build(vision), tmp_path / "out")
    model = build(SIGLIP)
    model.visual.trunk.patch_embed.proj.bias = None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"trunk\.patch_embed\.proj has no bias: one alpha"):
        open_clip_rgb.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# What is refused.


def test_a_timm_tower_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    model = build(SIGLIP, "SigLIP-small")
    model.visual.set_input_size(96)  # type: ignore[operator]
    model.transform = model.transform.replace(size=96)
    with pytest.raises(ValueError, match=r"load SigLIP-small at 96 px .* use save_checkpoint"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folded_model_is_refused(tmp_path: Path) -> None:
    model = build(VIT)
    alpha_clip.fold_alpha(model.visual)
    with pytest.raises(ValueError, match="alpha channel of small is folded already"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_half_precision_is_exported_in_fp32(tmp_path: Path) -> None:
    model = build(VIT).bfloat16()
    assert export(model, tmp_path / "out").max_difference <= 1e-5
    assert model.dtype == torch.bfloat16


def test_an_export_that_differs_is_not_kept(
    small: AlphaClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(towers, "largest_difference", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="differ by nan, more than 1e-05; it was not kept"):
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
        other.clip.get_parameter(name).mul_(1.01)
        assert compare(other, exported) > 1e-4
