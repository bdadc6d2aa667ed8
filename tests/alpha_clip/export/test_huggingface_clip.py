from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from test_huggingface import TEXT, VIT, build
from test_huggingface_towers import siglip
from torch import nn

import alpha_clip
from alpha_clip.export.huggingface_clip import compare, export
from alpha_clip.model import AlphaClip
from alpha_clip.transforms import RegionTransform

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: AlphaClip) -> Path:
    """An export of the tiny model, which has OpenAI's vocabulary. Read only."""
    folder = tmp_path_factory.mktemp("clip") / "out"
    assert export(model, folder).max_difference <= 1e-5
    return folder


@torch.no_grad()
def test_stock_transformers_compares_pictures_with_texts(exported: Path, model: AlphaClip) -> None:
    twin = transformers.CLIPModel.from_pretrained(exported).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(exported)
    texts = ["a red circle", "two blue squares, and much more than that"]
    rgba = torch.randn(3, 4, model.image_size, model.image_size)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    theirs = twin(pixel_values=rgba, **inputs).logits_per_image
    images = model.encode_image(rgba, normalize=True)
    ours = model.encode_text(model.tokenizer(texts), normalize=True)
    torch.testing.assert_close(
        theirs, model.logit_scale.exp() * images @ ours.T, atol=1e-4, rtol=1e-5
    )
    other = torch.cat([rgba[:, :3], -rgba[:, 3:]], 1)
    assert not torch.allclose(
        twin(pixel_values=other, **inputs).logits_per_image, theirs, atol=1e-3
    )


@pytest.mark.parametrize(
    "text", ["a photo of a cat", "It's  MÜNCHEN, 12:30! naïve café", "<3 & bye", "日本語 text", ""]
)
def test_the_tokenizer_is_the_models(exported: Path, model: AlphaClip, text: str) -> None:
    theirs = transformers.CLIPTokenizer.from_pretrained(exported)(text)["input_ids"]
    ours = model.tokenizer([text])[0].tolist()
    assert theirs == ours[: ours.index(max(ours)) + 1]


def test_every_weight_comes_from_ours(exported: Path, model: AlphaClip) -> None:
    twin = transformers.CLIPModel.from_pretrained(exported)
    count = sum(p.numel() for p in model.clip.parameters())
    assert sum(p.numel() for p in twin.parameters()) == count
    assert {p.name for p in exported.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
        *("merges.txt", "vocab.json", "tokenizer_config.json"),
    }


@pytest.mark.parametrize("quick", [False, True])
def test_both_activations_and_another_vocabulary(tmp_path: Path, quick: bool) -> None:
    model = build(VIT, quick_gelu=quick)
    assert export(model, tmp_path / "out").max_difference <= 1e-5
    assert not (tmp_path / "out" / "vocab.json").exists()  # of 64 words; not OpenAI's
    nn.init.normal_(model.clip.text_projection)
    assert compare(model, tmp_path / "out") > 1e-3


def test_a_text_tower_of_its_own_is_read_too(tmp_path: Path) -> None:
    clip = open_clip.model.CustomTextCLIP(32, VIT, TEXT).eval()
    alpha_clip.add_alpha_channel(clip.visual)
    config = {"vision_cfg": VIT, "text_cfg": TEXT}
    model = AlphaClip(clip, "custom", config, RegionTransform(32))
    assert export(model, tmp_path / "out").max_difference <= 1e-5


@pytest.mark.parametrize(
    "more",
    [{"pool_type": "last"}, {"no_causal_mask": True}, {"proj_bias": True}, {"ls_init_value": 0.1}],
    ids=lambda more: next(iter(more)),
)
def test_other_text_towers_are_refused_by_name(tmp_path: Path, more: dict[str, Any]) -> None:
    clip = open_clip.model.CustomTextCLIP(32, VIT, {**TEXT, **more}).eval()
    alpha_clip.add_alpha_channel(clip.visual)
    model = AlphaClip(clip, "odd", {"vision_cfg": VIT, "text_cfg": TEXT}, RegionTransform(32))
    with pytest.raises(ValueError, match="the text tower of odd is none of CLIP's"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_image_towers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no TimmModel"):
        export(siglip(), tmp_path / "out")
