import json
from pathlib import Path

import pytest
import torch

import alpha_clip
from alpha_clip.cli import main
from alpha_clip.export.model_card import Card
from alpha_clip.model import AlphaClip


def test_a_card_tells_how_to_use_a_model_and_what_it_reached(
    model: AlphaClip, tmp_path: Path
) -> None:
    results = {
        "benchmark": "ImageNetS",
        "scores": {"regions": 10.0, "alpha": 0.5},
        "intervals": {"alpha": [0.4, 0.61]},
    }
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(results))
    Card("GRIT", "apache-2.0", (str(file),)).write(tmp_path, model, "\nload()\n", 3e-7)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\ntags: [clip, alpha-clip, region]\n---\n# ")
    for part in (
        f"{model.image_size} x {model.image_size} px",
        "has 0.5 and 0.26",
        "- Trained on: GRIT.",
        "3.0e-07 of the largest",
        "```python\nload()\n```",
        "| ImageNetS | | 95 % |\n|---|---|---|\n| alpha | 0.5000 | 0.4000–0.6100 |\n",
        "## Licence",
    ):
        assert part in text
    assert "regions |" not in text  # a count is no figure


def test_a_card_says_what_is_not_known(model: AlphaClip, tmp_path: Path) -> None:
    Card().write(tmp_path, model, "load()", 0.0)
    text = (tmp_path / "README.md").read_text()
    assert "license:" not in text
    assert "- Trained on: not stated." in text
    assert "## Figures" not in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"scores": 1, "intervals": 2}'])
def test_files_that_are_no_results_are_refused(
    model: AlphaClip, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "scores.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"scores\.json is no result of alpha-clip eval"):
        Card(metrics=(str(file),)).write(tmp_path, model, "load()", 0.0)


def test_the_command_writes_a_card_and_warns_of_an_untrained_alpha(
    tiny_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    untrained, _, _ = alpha_clip.create_model(tiny_name)
    alpha_clip.save_checkpoint(untrained, tmp_path / "model")
    target = tmp_path / "export"
    arguments = ["export", "--checkpoint", str(tmp_path / "model"), "--output", str(target)]
    assert main([*arguments, "--training_data", "GRIT-1M"]) == 0
    assert "alpha's kernel is zero" in caplog.text
    assert "- Trained on: GRIT-1M." in (target / "README.md").read_text()
