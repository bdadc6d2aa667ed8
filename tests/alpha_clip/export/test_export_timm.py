import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP
from torch import nn

import alpha_clip
from alpha_clip.export import timm as target
from alpha_clip.export.timm import compare, export
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import alpha_parameters
from alpha_clip.transforms import RegionTransform

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TIMM: dict[str, Any] = {"timm_model_pretrained": False, "image_size": 160}
MLP = {**TIMM, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"}
TOWERS: dict[str, dict[str, Any]] = {
    "ViT": {**VIT, "mlp_ratio": 2.0},
    "ResNet with a linear head": {**TIMM, "timm_model_name": "test_resnet"},
    "ConvNeXt": {**TIMM, "timm_model_name": "test_convnext", "timm_pool": ""},
    "pooled by attention": {
        **TIMM,
        "timm_model_name": "test_vit3",
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "its own classifier": {
        **TIMM,
        "timm_model_name": "test_vit",
        "timm_pool": "token",
        "timm_proj": None,
    },
    "pooled otherwise than built": {
        **TIMM,
        "timm_model_name": "test_vit",
        "timm_pool": "avg",
        "timm_proj_bias": True,
    },
}
FAMILIES = [
    *("ViT-S-32", "RN50", "EVA02-B-16", "ViT-B-32-SigLIP2-256", "PE-Core-T-16-384"),
    *("convnext_tiny", "ViTamin-S", "swin_base_patch4_window7_224", "MobileCLIP2-S0"),
    *("MobileCLIP-B", "vit_relpos_medium_patch16_cls_224", "vit_medium_patch16_gap_256"),
]


def build(vision: dict[str, Any], name: str = "small", dim: int = 32, **more: Any) -> AlphaClip:
    torch.manual_seed(0)
    clip = CLIP(dim, vision, TEXT, **more).eval()
    for parameter in alpha_parameters(alpha_clip.add_alpha_channel(clip.visual)):
        nn.init.normal_(parameter, std=0.1)
    config = {"embed_dim": dim, "vision_cfg": vision, "text_cfg": TEXT}
    size = vision["image_size"]
    return AlphaClip(clip, name, config, RegionTransform(size)).requires_grad_(False)


@pytest.fixture(scope="module")
def small() -> AlphaClip:
    return build(VIT)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, small: AlphaClip) -> Path:
    """An export of the small ViT. Read only."""
    folder = tmp_path_factory.mktemp("timm") / "out"
    before = {k: v.clone() for k, v in small.state_dict().items()}
    report = export(small, folder)
    assert report.directory == str(folder)
    assert report.max_difference <= 1e-5
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in before.items())
    assert len(alpha_parameters(small.visual)) == 1  # the model itself is not folded
    return folder


@torch.no_grad()
def test_stock_timm_computes_the_same_in_both_ways(exported: Path, small: AlphaClip) -> None:
    rgba = torch.randn(3, 4, 32, 32)
    record = json.loads((exported / "config.json").read_text())
    weights = str(exported / "model.safetensors")
    for tower in (
        timm.create_model(f"local-dir:{exported}", pretrained=True),
        timm.create_model(record["architecture"], **record["model_args"], checkpoint_path=weights),
    ):
        features = tower.eval()(rgba)
        torch.testing.assert_close(features, small.encode_image(rgba), rtol=0, atol=1e-5)
        other = torch.cat([rgba[:, :3], -rgba[:, 3:]], 1)
        assert not torch.allclose(tower(other), features, atol=1e-2)


def test_the_config_says_what_the_tower_expects(exported: Path, small: AlphaClip) -> None:
    assert {p.name for p in exported.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    facts = timm.data.resolve_data_config(model=timm.create_model(f"local-dir:{exported}"))
    assert tuple(facts["input_size"]) == (4, 32, 32)
    assert list(facts["mean"]) == [*small.normalisation.mean, 0.5]
    assert list(facts["std"]) == [*small.normalisation.std, 0.26]
    assert (facts["crop_pct"], facts["crop_mode"], facts["interpolation"]) == (
        1.0,
        "center",
        "bicubic",
    )
    card = (exported / "README.md").read_text()
    assert 'timm.create_model("local-dir:.", pretrained=True)' in card
    assert "features = model(rgba)  # CLIP's image features" in card


@pytest.mark.parametrize("vision", TOWERS.values(), ids=TOWERS.keys())
def test_towers(vision: dict[str, Any], tmp_path: Path) -> None:
    model = build(vision)
    assert export(model, tmp_path / "out").max_difference <= 1e-5
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert record["num_classes"] == 32 or vision.get("timm_proj") == "none"
    assert record["model_args"]["in_chans"] == 4


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
    report = export(model, tmp_path / "out")
    assert report.max_difference <= 1e-5
    assert "# CLIP's image features" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("quick", [False, True])
def test_both_activations(quick: bool, tmp_path: Path) -> None:
    assert export(build(VIT, quick_gelu=quick), tmp_path / "out").max_difference <= 1e-5
    architecture = json.loads((tmp_path / "out" / "config.json").read_text())["architecture"]
    assert ("quickgelu" in architecture) == quick


@torch.no_grad()
def test_a_projection_without_a_place_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(MLP)
    assert export(model, tmp_path / "out").max_difference <= 1e-5
    assert "timm can't hold small's projection" in caplog.text
    assert "# pooled, before CLIP's projection" in (tmp_path / "out" / "README.md").read_text()
    tower = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    rgba = torch.randn(2, 4, 160, 160)
    projected = model.visual.head(tower(rgba))  # type: ignore[operator]
    torch.testing.assert_close(projected, model.encode_image(rgba), rtol=1e-4, atol=1e-5)


def test_another_input_size(tmp_path: Path) -> None:
    model = build(TOWERS["its own classifier"])
    model.visual.set_input_size(96)  # type: ignore[operator]
    model.transform = model.transform.replace(size=96, geometry="squash")
    assert export(model, tmp_path / "out").max_difference <= 1e-5
    facts = timm.data.resolve_data_config(model=timm.create_model(f"local-dir:{tmp_path / 'out'}"))
    assert tuple(facts["input_size"]) == (4, 96, 96)
    assert facts["crop_mode"] == "squash"


def test_a_folded_model_in_half_precision_is_exported_in_fp32(tmp_path: Path) -> None:
    model = build(VIT)
    alpha_clip.fold_alpha(model.visual)
    model.bfloat16()
    assert export(model, tmp_path / "out").max_difference <= 1e-5
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "more",
    [
        {"no_ln_pre": True},
        {"pool_type": "avg"},
        {"final_ln_after_pool": True},
        {"ls_init_value": 0.1},
        {"norm_kwargs": {"eps": 1e-6}},
        {"attentional_pool": True, "attn_pooler_heads": 2},
    ],
    ids=lambda more: next(iter(more)),
)
def test_other_vits_are_refused_by_name(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ViT-odd is a ViT that timm's .* onnx, torch_export or"):
        export(build({**VIT, **more}, "ViT-odd"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_towers_are_refused_by_name(tmp_path: Path) -> None:
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
    with pytest.raises(ValueError, match=r"none of RN-small's ModifiedResNets \(width 16"):
        export(build(resnet, "RN-small"), tmp_path / "out")
    model = build(VIT)
    model.visual = nn.Sequential(nn.Conv2d(4, 8, 3))
    with pytest.raises(ValueError, match=r"timm has no Sequential \(small\); export it to onnx"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_trunk_that_was_changed_is_refused_by_name(tmp_path: Path) -> None:
    model = build(TOWERS["ResNet with a linear head"])
    model.visual.trunk.layer1 = nn.Identity()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"no tower that takes the weights of small \(TimmModel\)"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_differs_is_not_kept(
    small: AlphaClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = target._vit_plan

    def wrong(model: AlphaClip, visual: Any) -> Any:
        made = plan(model, visual)
        made.state["norm.weight"] = 1.1 * made.state["norm.weight"]
        return made

    monkeypatch.setattr(target, "_vit_plan", wrong)
    with pytest.raises(ValueError, match=r"differ by .*, more than 1e-05; it was not kept"):
        export(small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_kept(small: AlphaClip, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; pass --overwrite true"):
        export(small, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_compare_notices_another_model(exported: Path, small: AlphaClip) -> None:
    assert compare(small, exported) <= 1e-5
    other = deepcopy(small)
    other.visual.get_parameter("conv1.weight_alpha").mul_(1.01)
    assert compare(other, exported) > 1e-4
