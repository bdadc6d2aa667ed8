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
        "could not build 'ViT-B-32': .*nobody",
    ),
    "no such folder": ({"name": "local-dir:/no/such"}, "/no/such has no open_clip_config.json"),
    "both weights": (
        {"pretrained": "openai", "checkpoint": "folder"},
        "folder holds both towers; leave pretrained='openai' out",
    ),
    "no such checkpoint": ({"checkpoint": "/no/such"}, "written by save_checkpoint"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_arguments_are_refused(
    arguments: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=message):
        alpha_clip.create_model(**arguments)


def test_pretrained_weights_of_a_local_architecture_are_refused(tiny_name: str) -> None:
    """open_clip ignores the tag there; random weights must not pass for trained ones."""
    with pytest.raises(ValueError, match="pretrained"):
        alpha_clip.create_model(tiny_name, pretrained="openai")


def test_public_names_are_there_and_no_others() -> None:
    for name in alpha_clip.__all__:
        assert getattr(alpha_clip, name).__name__ == name
    assert set(alpha_clip.__all__) < set(dir(alpha_clip))
    with pytest.raises(AttributeError, match="has no attribute 'surprise'"):
        alpha_clip.surprise  # noqa: B018
