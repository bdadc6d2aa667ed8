import json
import re
import sys
from pathlib import Path

import pytest
import torch
from open_clip.model import CLIP

import alpha_clip
from alpha_clip.cli import main
from alpha_clip.layouts import to_published
from alpha_clip.model import AlphaClip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model: AlphaClip) -> str:
    """A checkpoint. Read only."""
    return str(alpha_clip.save_checkpoint(model, tmp_path_factory.mktemp("cli") / "model"))


def run(*arguments: str) -> int:
    """Type a command; return its exit code, however it ends."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["alpha-clip", *arguments])
            return main()
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_every_command(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: alpha-clip COMMAND")
    for command in ("demo", "fit", "validate", "phrases", "eval", "export"):
        assert f"\n  {command} " in shown


def test_arguments_may_be_given_instead_of_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["alpha-clip", "no-such-command"])
    assert main(["--help"]) == 0
    assert main([]) == 0
    assert capsys.readouterr().out.count("usage: alpha-clip") == 2


def test_an_unknown_command_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fti") == 2
    message = capsys.readouterr().err
    assert "unknown command 'fti'; one of demo, fit, validate, phrases, eval, export" in message


@pytest.mark.parametrize("command", ["demo", "fit", "validate", "phrases", "eval", "export"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "alpha-clip" in shown
    assert "--config" in shown


@pytest.mark.parametrize("command", ["demo", "fit", "validate", "phrases", "eval", "export"])
def test_a_misspelt_key_exits_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--ouptut", "x") == 2
    assert "ouptut" in capsys.readouterr().err


def test_a_misspelt_key_in_a_file_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "export.yaml"
    config.write_text("checkpoint: a\nouptut: b\n")
    assert run("export", "--config", str(config)) == 2
    assert "ouptut" in capsys.readouterr().err


def test_export_writes_a_backbone(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    target = tmp_path / "out"
    arguments = ("export", "--checkpoint", checkpoint, "--output", str(target))
    assert run(*arguments) == 0
    assert f"{target}: largest difference" in capsys.readouterr().out
    assert (target / "model.safetensors").is_file()
    assert run(*arguments) == 2
    assert "is not empty; pass --overwrite true" in capsys.readouterr().err
    assert run(*arguments, "--overwrite", "true") == 0


def test_published_weights_are_exported_with_the_clip_they_belong_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1}
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    clip = CLIP(32, vision, text, quick_gelu=True)
    torch.save(clip.state_dict(), tmp_path / "base.pt")
    torch.save(to_published(alpha_clip.add_alpha_channel(clip.visual)), tmp_path / "alpha.pth")
    files = ["--pretrained", str(tmp_path / "base.pt"), "--checkpoint", str(tmp_path / "alpha.pth")]
    assert run("export", *files, "--output", str(tmp_path / "tower")) == 0
    assert (tmp_path / "tower" / "model.safetensors").is_file()
    assert "largest difference" in capsys.readouterr().out
    again = ["--format", "published", "--output", str(tmp_path / "published")]
    assert run("export", *files, *again) == 0
    assert (tmp_path / "published" / "alpha_visual.pth").is_file()


@pytest.mark.parametrize("target", ["base", "tensorflow", "../cli", ""])
def test_an_unknown_export_format_exits_2(
    checkpoint: str, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = run("export", "--checkpoint", checkpoint, "--output", str(out), f"--format={target}")
    assert code == 2
    message = capsys.readouterr().err
    assert f"unknown format {target!r}; expected one of" in message
    assert "huggingface" in message
    assert not out.exists()


def test_eval_writes_its_figures(
    checkpoint: str, two_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deep" / "scores.json"
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"checkpoint: {checkpoint}\noutput: {file}\nbenchmark:\n"
        "  class_path: alpha_clip.evaluation.region_classification.RegionClassification\n"
        f"  init_args: {{data: [{two_shards}], focus: [no alpha, alpha]}}\n"
    )
    assert run("eval", "--config", str(config)) == 0
    record = json.loads(file.read_text())
    assert record["benchmark"] == "RegionClassification"
    assert record["checkpoint"] == checkpoint
    scores = record["scores"]
    assert scores["regions"] == 12
    shown = dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["regions"] == "12"
    low, high = record["intervals"]["alpha"]
    assert shown["alpha"] == f"{scores['alpha']:.4f}  ({low:.4f}–{high:.4f})"
    assert low <= scores["alpha"] <= high
    assert file.with_suffix(".png").is_file()
    # Once more, with nothing left to do.
    assert run("eval", "--config", str(config)) == 0
    assert json.loads(file.read_text()) == record
    assert run("eval", "--config", str(config), "--devices", "0") == 2
    assert "at least one device" in capsys.readouterr().err
    assert run("eval", "--config", str(config), "--output", "scores.csv") == 2
    assert "output is the JSON file" in capsys.readouterr().err


def test_a_missing_checkpoint_exits_2_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "none")
    assert run("export", "--checkpoint", missing, "--output", str(tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert message.startswith("alpha-clip export: expected")
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("command", "extra"), [("export", "export"), ("fit", "train"), ("demo", "train,data,export")]
)
def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, extra: str
) -> None:
    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'something'", name="something")

    monkeypatch.setattr("alpha_clip.cli._call", missing)
    monkeypatch.setattr("alpha_clip.training.TrainingCLI", missing)
    assert run(command) == 2
    message = capsys.readouterr().err
    assert f"alpha-clip {command} needs something: pip install 'alpha-clip[{extra}]'" in message


@pytest.mark.parametrize(
    "arguments",
    [("--masks", "m.json"), ("--sam_checkpoint", "sam.pth"), ("--model", "ViT-B-32")],
    ids=lambda a: a[0],
)
def test_demo_options_that_need_input_exit_2(
    tmp_path: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("demo", "--output", str(tmp_path / "demo"), *arguments) == 2
    assert "need --input" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_demo_input_that_matches_nothing_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = str(tmp_path / "*.tar")
    assert run("demo", "--output", str(tmp_path / "demo"), "--input", pattern) == 2
    assert f"no file matches {pattern!r}" in capsys.readouterr().err
