import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import alpha_clip
from alpha_clip.model import AlphaClip


def test_a_new_models_alpha_is_zero(tiny_name: str) -> None:
    model, transform, tokenizer = alpha_clip.create_model(tiny_name, geometry="pad")
    assert not model.visual.conv1.weight_alpha.any()
    assert not model.training
    assert model.name == "tiny"
    assert transform.geometry == "pad"
    assert transform.size == model.image_size
    assert transform.normalisation == model.normalisation
    assert tokenizer(["a cat"]).shape == (1, model.config["text_cfg"]["context_length"])


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.half)])
def test_lower_precisions_encode(tiny_name: str, precision: Any, dtype: torch.dtype) -> None:
    model, transform, tokenizer = alpha_clip.create_model(tiny_name, precision=precision)
    assert model.visual.conv1.weight_alpha.dtype == dtype
    rgba = transform(Image.new("RGB", (60, 60)))[None]
    image, text = model.encode_image(rgba), model.encode_text(tokenizer(["a cat"]))
    assert image.dtype == text.dtype == dtype
    assert image.isfinite().all()


def test_normalisation_comes_from_the_config(tiny_name: str, tmp_path: Path) -> None:
    file = Path(tiny_name.removeprefix("local-dir:")) / "open_clip_config.json"
    record = json.loads(file.read_text())
    record["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(record))
    model, transform, _ = alpha_clip.create_model(f"local-dir:{tmp_path}")
    assert transform.normalisation is model.normalisation
    assert model.normalisation.mean == (0.5, 0.5, 0.5)
    assert model.normalisation.std == (0.25, 0.25, 0.25)
    assert model.normalisation.alpha_std == 0.26


def test_an_unknown_way_of_resizing_is_refused(tiny_name: str, tmp_path: Path) -> None:
    file = Path(tiny_name.removeprefix("local-dir:")) / "open_clip_config.json"
    record = json.loads(file.read_text())
    record["preprocess_cfg"] = {"resize_mode": "stretch"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"one of shortest, .* got 'stretch'"):
        alpha_clip.create_model(f"local-dir:{tmp_path}")


def test_the_models_config_is_its_own_copy(tiny_name: str) -> None:
    first = alpha_clip.create_model(tiny_name)[0]
    first.config["text_cfg"]["context_length"] = 3
    second = alpha_clip.create_model(tiny_name)[0]
    assert second.config["text_cfg"]["context_length"] != 3


def test_the_tokenizer_fits_the_text_tower(model: AlphaClip) -> None:
    tokens = model.tokenizer(["a cat", " ".join(["very"] * 100) + " long"])
    length = model.config["text_cfg"]["context_length"]
    assert tokens.shape == (2, length)
    assert model.encode_text(tokens).isfinite().all()


def test_building_a_model_leaves_logging_as_it_was(
    tiny_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.disable(logging.DEBUG)
    try:
        alpha_clip.create_model(tiny_name)
        assert logging.root.manager.disable == logging.DEBUG
    finally:
        logging.disable(logging.NOTSET)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "name of an architecture or a checkpoint with both towers, got"),
    "unknown architecture": ({"name": "ViT-Z-99"}, "unknown architecture 'ViT-Z-99'; open_clip"),
    "unknown tag": (
        {"name": "ViT-B-32", "pretrained": "nobody"},
        "'nobody' is neither a file nor a tag of ViT-B-32; open_clip's tags for it: openai",
    ),
    "no such folder": ({"name": "local-dir:/no/such"}, "/no/such has no open_clip_config.json"),
    "both weights": (
        {"pretrained": "openai", "checkpoint": "folder"},
        "folder holds both towers; leave pretrained='openai' out",
    ),
    "no such checkpoint": ({"checkpoint": "/no/such"}, "written by save_checkpoint"),
    "no such file": ({"checkpoint": "/no/such.pth"}, "there is no file /no/such.pth; expected"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_arguments_are_refused(
    arguments: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=message):
        alpha_clip.create_model(**arguments)


@pytest.fixture
def openai_like(tmp_path: Path) -> Path:
    """A checkpoint with the names and shapes of RN50, as small as its config allows to write."""
    import open_clip

    torch.manual_seed(0)
    clip = open_clip.create_model("RN50")
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.mark.slow
def test_a_tag_is_fetched_and_brings_its_facts(
    openai_like: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's weights need QuickGELU, which an architecture's name does not say."""
    asked: list[Any] = []
    monkeypatch.setattr("open_clip.download_pretrained", lambda c: asked.append(c) or openai_like)
    model, transform, _ = alpha_clip.create_model("RN50", pretrained="openai")
    assert asked[0]["hf_hub"].startswith("timm/resnet50_clip.openai")
    assert model.config["quick_gelu"]
    assert model.base == "openai"
    assert transform.geometry == "center_crop"
    stored = torch.load(openai_like, weights_only=True)["state_dict"]
    own = model.clip.state_dict()
    assert all(torch.equal(own[k], v) for k, v in stored.items())


def test_a_tag_that_cannot_be_fetched_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(facts: Any) -> None:
        raise FileNotFoundError("no network")

    monkeypatch.setattr("open_clip.download_pretrained", offline)
    with pytest.raises(ValueError, match=r"could not be fetched \(no network\); fetch them by"):
        alpha_clip.create_model("ViT-B-32", pretrained="openai")


@pytest.mark.parametrize(
    ("name", "geometry", "mean", "interpolation"),
    [
        ("ViT-B-32", "center_crop", 0.48145466, "bicubic"),
        ("ViT-B-32-SigLIP2-256", "squash", 0.5, "bicubic"),
        ("MobileCLIP2-S0", "center_crop", 0.0, "bilinear"),
    ],
)
@pytest.mark.slow
def test_pictures_are_prepared_as_an_architectures_weights_expect_it(
    name: str, geometry: str, mean: float, interpolation: str
) -> None:
    _, transform, _ = alpha_clip.create_model(name)
    assert transform.geometry == geometry
    assert transform.normalisation.mean[0] == mean
    assert transform.interpolation == interpolation
    assert alpha_clip.create_model(name, geometry="pad")[1].geometry == "pad"


def test_openais_spelling_of_names_is_understood() -> None:
    with pytest.raises(ValueError, match="tag of ViT-B-32"):
        alpha_clip.create_model("ViT-B/32", pretrained="nobody")


def test_a_timm_tower_takes_another_size(tmp_path: Path) -> None:
    """Its weights are loaded at their own size, then the positions are interpolated."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    vision |= {"timm_model_pretrained": False, "image_size": 160}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    record = {"model_cfg": config, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(record))
    name = f"local-dir:{tmp_path}"
    own = alpha_clip.create_model(name)[0]
    saved = alpha_clip.save_checkpoint(own, tmp_path / "own")
    model, transform, _ = alpha_clip.create_model(checkpoint=saved, image_size=192)
    assert transform.size == 192
    assert model.encode_image(torch.randn(1, 4, 192, 192)).shape == (1, 16)
    again = alpha_clip.load_checkpoint(alpha_clip.save_checkpoint(model, tmp_path / "larger"))
    rgba = torch.randn(1, 4, 192, 192)
    torch.testing.assert_close(again.encode_image(rgba), model.encode_image(rgba))
    torch.save(own.clip.state_dict(), tmp_path / "weights.pt")
    from_file = alpha_clip.create_model(name, checkpoint=tmp_path / "weights.pt", image_size=192)
    torch.testing.assert_close(from_file[0].encode_image(rgba), model.encode_image(rgba))


def test_pretrained_weights_of_a_local_architecture_are_refused(tiny_name: str) -> None:
    """Random weights must not pass for trained ones."""
    with pytest.raises(ValueError, match="'openai' is neither a file nor a tag"):
        alpha_clip.create_model(tiny_name, pretrained="openai")


def test_public_names_are_there_and_no_others() -> None:
    for name in alpha_clip.__all__:
        assert getattr(alpha_clip, name).__name__ == name
    assert set(alpha_clip.__all__) < set(dir(alpha_clip))
    with pytest.raises(AttributeError, match="has no attribute 'surprise'"):
        alpha_clip.surprise  # noqa: B018
