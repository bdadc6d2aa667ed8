from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import alpha_clip
from alpha_clip.model import AlphaClip
from alpha_clip.trainable import TrainableConfig
from alpha_clip.training_checkpoint import add_model, check_recipe, read_training_checkpoint

RECIPE = {"model": "tiny", "trainable": asdict(TrainableConfig()), "optim": {"lr": 1e-3}}


@pytest.fixture
def checkpoint(model: AlphaClip) -> dict[str, Any]:
    """What Lightning would save of a module with the tiny model."""
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    content: dict[str, Any] = {"state_dict": {**state, "val_matching.rows": torch.zeros(1)}}
    add_model(content, model, RECIPE)
    return content


def test_a_checkpoint_is_read_as_a_model(
    model: AlphaClip, checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(checkpoint, tmp_path / "run.ckpt")
    loaded, transform, _ = alpha_clip.create_model(checkpoint=tmp_path / "run.ckpt")
    assert transform.size == model.image_size
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize("missing", ["alpha_clip_model", "alpha_clip_recipe", "state_dict"])
def test_a_checkpoint_of_another_project_is_refused(
    checkpoint: dict[str, Any], tmp_path: Path, missing: str
) -> None:
    del checkpoint[missing]
    torch.save(checkpoint, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"run.ckpt was not written by AlphaClipModule: it lacks"):
        read_training_checkpoint(tmp_path / "run.ckpt")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no training checkpoint .*gone\.ckpt"):
        alpha_clip.create_model(checkpoint=tmp_path / "gone.ckpt")


def test_both_towers_need_no_base(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    torch.save(checkpoint, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="holds both towers"):
        alpha_clip.create_model("ViT-B-16", "openai", checkpoint=tmp_path / "run.ckpt")


def test_what_differs_is_named(checkpoint: dict[str, Any]) -> None:
    check_recipe(checkpoint, RECIPE)
    with pytest.raises(ValueError, match=r"optim.lr: 0.001 there, 0.1 here; optim.new: nothing"):
        check_recipe(checkpoint, {**RECIPE, "optim": {"lr": 0.1, "new": 2}})
