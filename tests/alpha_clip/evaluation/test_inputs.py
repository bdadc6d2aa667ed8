from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alpha_clip.evaluation.inputs import encode_classes, encode_texts
from alpha_clip.model import AlphaClip

NAMES, TEMPLATES = ["cup", "dog", "red car"], ["a photo of a {}.", "{}", "art of {}"]


@torch.inference_mode()
def test_a_class_is_the_mean_of_its_prompts(model: AlphaClip) -> None:
    found = encode_classes(model, NAMES, TEMPLATES)
    for feature, name in zip(found, NAMES, strict=True):
        mean = encode_texts(model, [t.replace("{}", name) for t in TEMPLATES]).mean(0)
        torch.testing.assert_close(feature, mean / mean.norm())
    one = encode_classes(model, NAMES, ["{}"])
    torch.testing.assert_close(one, encode_texts(model, NAMES))


@torch.inference_mode()
def test_features_are_computed_once_and_kept(model: AlphaClip, tmp_path: Path) -> None:
    first = encode_classes(model, NAMES, TEMPLATES, tmp_path)
    silent: Any = SimpleNamespace(logit_scale=model.logit_scale)  # can't encode anything
    assert torch.equal(encode_classes(silent, NAMES, TEMPLATES, tmp_path), first)
    assert [file.name for file in tmp_path.iterdir()] == ["classes.npy"]


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
@torch.inference_mode()
def test_a_damaged_file_is_made_anew(
    model: AlphaClip, tmp_path: Path, damage: bytes | None
) -> None:
    first = encode_classes(model, NAMES, TEMPLATES, tmp_path)
    file = tmp_path / "classes.npy"
    file.write_bytes(file.read_bytes()[:200] if damage is None else damage)
    assert torch.equal(encode_classes(model, NAMES, TEMPLATES, tmp_path), first)
    encode_classes(model, NAMES[:2], TEMPLATES, tmp_path)  # of other names: not taken
    assert len(encode_classes(model, NAMES[:2], TEMPLATES, tmp_path)) == 2


@pytest.mark.parametrize("templates", [[], ["{}", "a photo"]])
def test_templates_need_a_place_for_the_name(model: AlphaClip, templates: list[str]) -> None:
    with pytest.raises(ValueError, match=r"expected templates with \{\} for the name"):
        encode_classes(model, NAMES, templates)
