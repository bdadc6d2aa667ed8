from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from torch import nn

import alpha_clip
from alpha_clip.export.published import ALPHA_FILE, BASE_FILE, compare, export
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import alpha_parameters
from alpha_clip.transforms import RegionTransform

TEXT = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}


def build(
    vision: dict[str, Any], text: dict[str, Any] | None = None, gelu: bool = True
) -> AlphaClip:
    torch.manual_seed(0)
    clip = CLIP(32, vision, {**TEXT, **(text or {})}, quick_gelu=gelu).eval()
    alpha_clip.add_alpha_channel(clip.visual)
    for parameter in alpha_parameters(clip.visual):
        nn.init.normal_(parameter, std=0.1)
    config = {"vision_cfg": vision, "text_cfg": {**TEXT, **(text or {})}}
    return AlphaClip(clip, "small", config, RegionTransform(32)).requires_grad_(False)


@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_the_papers_names_load_it(vision: dict[str, Any], tmp_path: Path) -> None:
    model = build(vision)
    report = export(model, tmp_path / "out")
    assert report.max_difference <= 1e-5
    files = [str(tmp_path / "out" / name) for name in (BASE_FILE, ALPHA_FILE)]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {ALPHA_FILE, BASE_FILE, "README.md"}
    loaded, _ = alpha_clip.load(*files, device="cpu")
    image, alpha = torch.randn(2, 3, 32, 32), torch.randn(2, 1, 32, 32)
    tokens = torch.randint(1, 64, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(loaded.visual(image, alpha), model.encode_image(image, alpha))
        torch.testing.assert_close(loaded.encode_text(tokens), model.encode_text(tokens))
    assert "conv1_alpha.weight" in torch.load(files[1], weights_only=True)
    assert not any("alpha" in k for k in torch.load(files[0], weights_only=True))


OTHERS: dict[str, AlphaClip] = {
    "GELU": build(VIT, gelu=False),
    "small heads": build({**VIT, "head_width": 32}),
    "small text heads": build(VIT, {"heads": 2}),
}


@pytest.mark.parametrize("model", OTHERS.values(), ids=OTHERS.keys())
def test_what_the_published_code_would_compute_otherwise_is_refused(
    model: AlphaClip, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="knows OpenAI's towers only, with QuickGELU and 64"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_published_code_lacks_is_refused(tmp_path: Path) -> None:
    model = build({"timm_model_name": "test_resnet", "timm_model_pretrained": False})
    with pytest.raises(ValueError, match="not this TimmModel; use save_checkpoint"):
        export(model, tmp_path / "out")


def test_a_damaged_export_is_noticed(tmp_path: Path) -> None:
    model = build(VIT)
    export(model, tmp_path / "out")
    file = tmp_path / "out" / ALPHA_FILE
    state = torch.load(file, weights_only=True)
    torch.save({**state, "proj": 1.5 * state["proj"]}, file)
    assert compare(model, tmp_path / "out") > 1e-3
