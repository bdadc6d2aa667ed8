"""SigLIP's towers, and towers of three channels for consumers that know no region."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from test_huggingface import TEXT, VIT, build
from torch import nn

import alpha_clip
from alpha_clip.cli import main
from alpha_clip.export import huggingface, huggingface_rgb
from alpha_clip.model import AlphaClip
from alpha_clip.transforms import RegionTransform

transformers = pytest.importorskip("transformers")
SIGLIP = "vit_base_patch16_siglip_224"


def siglip(geometry: Any = "squash", **trunk: Any) -> AlphaClip:
    """SigLIP's tower as open_clip builds it, but small."""
    clip = open_clip.model.CLIP(32, VIT, TEXT)
    with torch.device("meta"):
        clip.visual = open_clip.timm_model.TimmModel(SIGLIP, 64, 224, pool="map", proj="none")
    torch.manual_seed(0)
    clip.visual.trunk = timm.create_model(
        SIGLIP,
        img_size=32,
        **{"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 0, **trunk},
    )
    clip.visual.image_size = (32, 32)
    alpha_clip.add_alpha_channel(clip.visual)
    for name, parameter in clip.visual.named_parameters():
        if parameter.abs().max() == 0 or "norm" in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)  # what is zero or one would not be compared
    transform = RegionTransform(32, geometry=geometry)
    return AlphaClip(clip.eval(), "small-SigLIP", {"vision_cfg": {}, "text_cfg": TEXT}, transform)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_siglip_is_transformers_own(tmp_path: Path, act: str) -> None:
    model = siglip(act_layer=act)
    report = huggingface.export(model, tmp_path / "out")
    assert report.max_difference <= 1e-5
    record = json.loads((tmp_path / "out/config.json").read_text())
    assert record["architectures"] == ["SiglipVisionModel"]
    assert record["hidden_act"] == ("gelu" if act == "gelu" else "gelu_pytorch_tanh")
    tower = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out").eval()
    count = sum(p.numel() for p in model.visual.parameters())
    assert sum(p.numel() for p in tower.parameters()) == count
    rgba = torch.randn(2, 4, 32, 32)
    other = torch.cat([rgba[:, :3], -rgba[:, 3:]], 1)
    with torch.no_grad():
        assert not torch.allclose(tower(rgba).pooler_output, tower(other).pooler_output, atol=1e-3)


@pytest.mark.parametrize(
    "trunk", [{"qk_norm": True}, {"init_values": 0.1}, {"class_token": True}, {"pre_norm": True}]
)
def test_other_trunks_are_refused_by_name(tmp_path: Path, trunk: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="small-SigLIP is no SigLIP tower"):
        huggingface.export(siglip(**trunk), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lambda: build(VIT), siglip], ids=["CLIP", "SigLIP"])
def test_three_channels_see_everything(tmp_path: Path, make: Any) -> None:
    model = make()
    report = huggingface_rgb.export(model, tmp_path / "out")
    assert report.max_difference <= 1e-5
    assert json.loads((tmp_path / "out/config.json").read_text())["num_channels"] == 3
    rgb = torch.randn(2, 3, 32, 32)
    found = huggingface.stock_features(tmp_path / "out", rgb)
    whole = torch.full((2, 1, 32, 32), model.normalisation.whole_image)
    with torch.no_grad():
        torch.testing.assert_close(found, model.encode_image(rgb, whole), atol=1e-5, rtol=1e-5)
        nothing = model.encode_image(rgb, -whole)
    assert not torch.allclose(found, nothing, atol=1e-3)


@pytest.mark.parametrize("geometry", ["squash", "center_crop"])
def test_the_processor_cuts_as_the_model_does(tmp_path: Path, geometry: Any) -> None:
    model = siglip(geometry)
    huggingface_rgb.export(model, tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    y, x = np.mgrid[0:48, 0:80]
    pixels = np.stack([3 * x, 5 * y, 2 * x + y], -1).astype(np.uint8)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    ours = model.transform(Image.fromarray(pixels))[:3]
    assert (theirs - ours).abs().mean() < 0.03


def test_the_command_writes_either(tmp_path: Path, model: AlphaClip) -> None:
    alpha_clip.save_checkpoint(model, tmp_path / "model")
    for target in ("huggingface", "huggingface_rgb"):
        arguments = ["--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / target)]
        assert main(["export", "--format", target, *arguments]) == 0
        assert "from_pretrained" in (tmp_path / target / "README.md").read_text()


@pytest.mark.slow
def test_an_export_needs_no_code_of_ours(tmp_path: Path, model: AlphaClip) -> None:
    huggingface.export(model, tmp_path / "clip")
    huggingface.export(siglip(), tmp_path / "siglip")
    code = f"""
import sys
sys.modules["alpha_clip"] = None  # importing it fails
import torch
from transformers import CLIPVisionModelWithProjection, SiglipVisionModel
for kind, name in ((CLIPVisionModelWithProjection, "clip"), (SiglipVisionModel, "siglip")):
    tower, found = kind.from_pretrained({str(tmp_path)!r} + "/" + name, output_loading_info=True)
    assert not any(found.values()), found
    size = tower.config.image_size
    assert tower(torch.zeros(1, 4, size, size))[0].isfinite().all()
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout.strip().endswith("fine"), done.stderr
