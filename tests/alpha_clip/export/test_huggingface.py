import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from torch import nn

import alpha_clip
from alpha_clip.export.base import fresh_directory
from alpha_clip.export.huggingface import compare, export
from alpha_clip.export.layouts.clip import convert_state_dict
from alpha_clip.model import AlphaClip
from alpha_clip.transforms import RegionTransform

transformers = pytest.importorskip("transformers")

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}


def build(vision: dict[str, Any], name: str = "small", **more: Any) -> AlphaClip:
    clip = CLIP(32, vision, TEXT, **more).eval()
    alpha_clip.add_alpha_channel(clip.visual)
    for name_, parameter in clip.visual.named_parameters():
        if name_.endswith(("weight_alpha", "bias")):  # what is zero would not be compared
            nn.init.normal_(parameter, std=0.1)
    return AlphaClip(
        clip, name, {"vision_cfg": vision, "text_cfg": TEXT}, RegionTransform(vision["image_size"])
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: AlphaClip) -> Path:
    """An export of the tiny model. Read only."""
    folder = tmp_path_factory.mktemp("export") / "deep" / "tower"
    report = export(model, folder)
    assert report.directory == str(folder)
    assert report.max_difference <= 1e-5
    return folder


@torch.no_grad()
def test_stock_transformers_computes_the_same(exported: Path, model: AlphaClip) -> None:
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(exported).eval()
    rgba = torch.randn(3, 4, model.image_size, model.image_size)
    theirs, ours = tower(pixel_values=rgba).image_embeds, model.encode_image(rgba)
    assert float((theirs - ours).abs().max() / ours.abs().max()) <= 1e-5
    other = torch.cat([rgba[:, :3], -rgba[:, 3:]], 1)
    assert not torch.allclose(tower(pixel_values=other).image_embeds, theirs, atol=1e-3)


def test_every_weight_comes_from_ours(exported: Path, model: AlphaClip) -> None:
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(exported)
    state = convert_state_dict(model.visual)
    assert all(torch.equal(tower.state_dict()[k], v) for k, v in state.items())
    count = sum(p.numel() for p in model.visual.parameters())
    assert sum(p.numel() for p in tower.parameters()) == count


def test_the_processor_makes_what_our_transform_makes(exported: Path, model: AlphaClip) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(exported)
    size = model.image_size
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    alpha = (rng.random((size, size)) < 0.5).astype(np.uint8) * 255
    rgba = np.concatenate([pixels, alpha[..., None]], -1)
    theirs = processor(rgba, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    from PIL import Image

    ours = RegionTransform(size, model.normalisation)(Image.fromarray(pixels), alpha)
    torch.testing.assert_close(theirs[0], ours, atol=1e-4, rtol=1e-4)


def test_the_folder_holds_no_pickle(exported: Path) -> None:
    names = {p.name for p in exported.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert json.loads((exported / "config.json").read_text())["num_channels"] == 4
    assert [p.name for p in exported.parent.iterdir()] == ["tower"]


@pytest.mark.parametrize("quick", [False, True])
def test_both_activations(tmp_path: Path, quick: bool) -> None:
    report = export(build(VIT, quick_gelu=quick), tmp_path / "out")
    assert report.max_difference <= 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["hidden_act"] == ("quick_gelu" if quick else "gelu")


def test_a_resnet_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no ModifiedResNet \(RN-small\); export it to another"):
        export(build(RESNET, "RN-small"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more",
    [
        {"no_ln_pre": True},
        {"pool_type": "avg"},
        {"final_ln_after_pool": True},
        {"ls_init_value": 0.1},
        {"attentional_pool": True, "attn_pooler_heads": 2},
    ],
    ids=lambda more: next(iter(more)),
)
def test_other_vits_are_refused_by_name(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ViT-odd is a ViT that transformers' CLIP cannot express"):
        export(build({**VIT, **more}, "ViT-odd"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folded_tower_is_refused(tmp_path: Path) -> None:
    model = build(VIT)
    alpha_clip.fold_alpha(model.visual)
    with pytest.raises(ValueError, match="cannot express"):
        export(model, tmp_path / "out")


def test_a_folder_with_something_in_it_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; pass --overwrite true"):
        export(build(VIT), target)
    assert (target / "mine.txt").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    model = build(VIT)
    export(model, target, overwrite=True)
    assert not (target / "old.txt").exists()
    assert compare(model, target) <= 1e-5


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("mine")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        export(build(VIT), target, overwrite=True)
    assert target.read_text() == "mine"


def test_an_export_that_differs_is_not_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(ValueError, match=r"features differ by .*, more than -1e\+00; it was not"):
        export(build(VIT), target, overwrite=True, tolerance=-1.0)
    assert [p.name for p in target.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_compare_notices_another_model(exported: Path, model: AlphaClip) -> None:
    assert compare(model, exported) <= 1e-5
    other = deepcopy(model)
    other.visual.conv1.weight_alpha.mul_(1.01)
    assert compare(other, exported) > 1e-5


def test_fresh_directory_leaves_nothing_after_a_failure(tmp_path: Path) -> None:
    def fail() -> None:
        with fresh_directory(tmp_path / "a" / "b", overwrite=False) as folder:
            (folder / "half.txt").write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert list((tmp_path / "a").iterdir()) == []


def test_fresh_directory_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with fresh_directory(tmp_path / "a", overwrite=False) as folder:
        (folder / "whole.txt").write_text("whole")
        assert list((tmp_path / "a").iterdir()) == []
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["whole.txt"]
