"""`alpha-clip fit` as it is used: started, killed, told to go, started again."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import alpha_clip
from alpha_clip.regions import RegionSample

MakeSample = Callable[..., RegionSample]
STEPS = 60


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory,
    make_sample: MakeSample,
    write_shards: Callable[..., Any],
) -> Path:
    """Five shards of eight different pictures. Read only."""
    folder = tmp_path_factory.mktemp("resume")
    pairs = [("red", "blue"), ("green", "red"), ("blue", "green")]

    def sample(number: int) -> RegionSample:
        plain = make_sample(str(number), pairs[number % 3], width=40 + number)
        regions = tuple(replace(r, span=None) for r in plain.regions)
        return replace(plain, caption=f"picture {number}", regions=regions)

    write_shards(folder, *[[sample(8 * i + j) for j in range(8)] for i in range(5)])
    return folder


@pytest.fixture
def command(tiny_name: str, shards: Path) -> Callable[..., list[str]]:
    """What one would type for a short run with a checkpoint every seven steps."""

    def typed(output: Path, *more: str) -> list[str]:
        options = {
            "output": output,
            "model.encoder.name": tiny_name,
            "model.optim.lr": 1e-3,
            "data.train": f"[{shards}]",
            "data.val": f"[{shards}]",
            "data.batch_size": 4,
            "data.shuffle": 8,
            "data.flip": 0.5,
            "data.sampling.regions_per_image": 2,
            "data.workers": 2,
            "trainer.accelerator": "cpu",
            "trainer.devices": 1,
            "trainer.max_steps": STEPS,
            "trainer.val_check_interval": 25,
            "trainer.check_val_every_n_epoch": "null",
            "trainer.log_every_n_steps": 1,
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "last.every_n_train_steps": 7,
        }
        flags = [f"--{key}={value}" for key, value in options.items()]
        return [sys.executable, "-m", "alpha_clip", "fit", *flags, *more]

    return typed


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    words, _ = process.communicate(timeout=240)
    assert process.returncode == 0, words
    return words


def losses(output: Path) -> dict[int, str]:
    """Step -> loss, as written to the digit; a later start's word counts."""
    found = {}
    for version in range(len(list((output / "metrics").glob("version_*")))):
        file = output / "metrics" / f"version_{version}" / "metrics.csv"
        for row in csv.DictReader(file.read_text().splitlines()) if file.exists() else ():
            if row.get("train/loss"):
                found[int(row["step"])] = row["train/loss"]
    return found


def wait_for(file: Path, process: subprocess.Popen[str], newer_than: float = 0.0) -> None:
    end = time.monotonic() + 200
    while not (file.exists() and file.stat().st_mtime > newer_than):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{file} was never written"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_and_told_to_go_a_run_ends_as_if_left_alone(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """SIGKILL between two checkpoints, SIGTERM, then to the end: same samples, losses, weights."""
    alone, output = tmp_path / "alone", tmp_path / "run"
    uninterrupted = start(command(alone))
    last = output / "checkpoints" / "last.ckpt"

    process = start(command(output))
    wait_for(last, process)
    time.sleep(0.2)  # a few steps on
    process.kill()
    process.communicate()

    written = last.stat().st_mtime
    process = start(command(output))
    wait_for(last, process, newer_than=written)
    os.killpg(process.pid, signal.SIGTERM)  # its readers get it, too
    words = finish(process)
    assert "SIGTERM: the run ends after this step" in words
    step = int(words.split("stopped after step ")[1].split(";")[0])
    assert torch.load(last, weights_only=True)["global_step"] == step < STEPS

    finish(start(command(output)))
    finish(uninterrupted)
    assert sorted(losses(alone)) == list(range(STEPS))
    # Lightning logs a step after its checkpoint: that one line a kill may cost.
    assert losses(output).items() <= losses(alone).items()
    assert len(losses(output)) >= STEPS - 1
    ours, theirs = (alpha_clip.load_checkpoint(run / "model") for run in (output, alone))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert not list(output.rglob("*.tmp"))


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Type a command of `command` in this process."""
    from alpha_clip.cli import main

    monkeypatch.setattr(sys, "argv", ["alpha-clip", *arguments[3:]])
    try:
        return main()
    except SystemExit as stop:
        return int(stop.code or 0)


def short(*more: str) -> tuple[str, ...]:
    return ("--trainer.max_steps=3", "--data.workers=0", "--seed_everything=3", *more)


def test_a_run_leaves_what_it_promises(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    options = short("--trainer.val_check_interval=2")
    assert run(command(out, *options), monkeypatch) == 0
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {
        "checkpoints/last.ckpt",
        "checkpoints/best-step=2.ckpt",
        "metrics/version_0/config.yaml",
        "metrics/version_0/metrics.csv",
        "model/model.safetensors",
        "model/open_clip_config.json",
    } <= found
    assert any(name.startswith("tensorboard/events.out") for name in found)
    columns = (out / "metrics/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {
        *("train/loss", "train/grad_norm", "train/dropped_samples", "lr-AdamW/alpha"),
        *("speed/images", "speed/regions"),
        *("val/region_top1", "val/within_image_top1", "val/within_image_cosine"),
    } <= set(columns)
    best, _, _ = alpha_clip.create_model(checkpoint=out / "checkpoints/best-step=2.ckpt")
    final = alpha_clip.load_checkpoint(out / "model")
    assert not torch.equal(best.visual.conv1.weight_alpha, final.visual.conv1.weight_alpha)
    # Finished: the same command again changes nothing.
    assert run(command(out, *options), monkeypatch) == 0
    again = alpha_clip.load_checkpoint(out / "model")
    assert torch.equal(again.visual.conv1.weight, final.visual.conv1.weight)


def test_validate_gives_the_figures_of_the_run(
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    options = short("--trainer.val_check_interval=3")
    assert run(command(out, *options), monkeypatch) == 0
    rows = csv.DictReader((out / "metrics/version_0/metrics.csv").read_text().splitlines())
    (expected,) = [row["val/region_top1"] for row in rows if row["val/region_top1"]]
    arguments = [a for a in command(out, *options) if not a.startswith("--last")]
    arguments[3] = "validate"
    capsys.readouterr()
    assert run(arguments, monkeypatch) == 0
    assert f"{float(expected):.5f}"[:6] in capsys.readouterr().out


def test_a_checkpoint_of_another_recipe_stops_before_work(
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    assert run(command(out, *short()), monkeypatch) == 0
    other = short("--model.optim.lr=0.5", "--model.trainable.visual=false")
    assert run(command(out, *other), monkeypatch) == 2
    message = capsys.readouterr().err
    assert "optim.lr: 0.001 there, 0.5 here" in message
    assert "trainable.visual: True there, False here" in message


def test_a_damaged_checkpoint_stops_before_work(
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    assert run(command(out, *short()), monkeypatch) == 0
    last = out / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    assert run(command(out, *short()), monkeypatch) == 2
    assert "last.ckpt can't be read as a training checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.batch_size=41", "40 images in 1 data sets do not fill one batch"),
        ("--data.train=[nowhere]", "nowhere holds no finished shards"),
        ("--model.optim.warmup_steps=3", "warmup_steps = 3 leaves nothing of a run of 3 steps"),
        ("--data.phrases=nowhere", "nowhere holds no text features"),
        ("--data.train=[of_another_schema]", "no sound sample in 5 shards"),
        ("--data.train=[empty]", "empty holds no finished shards"),
    ],
)
def test_what_can_not_work_stops_before_work(
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shards: Path,
    option: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    shutil.copytree(shards, "of_another_schema")
    for tar in Path("of_another_schema").glob("*.tar"):
        content = tar.read_bytes()
        assert b'"v":1' in content
        tar.write_bytes(content.replace(b'"v":1', b'"v":9'))
    assert run(command(tmp_path / "run", *short(option)), monkeypatch) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_exactly(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """SIGTERM reaches one of them; both save and leave with exit code 0."""
    two = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2")
    two += ("--data.workers=0", "--trainer.max_steps=40")
    alone, output = tmp_path / "alone", tmp_path / "run"
    finish(start(command(alone, *two)))
    process = start(command(output, *two))
    last = output / "checkpoints" / "last.ckpt"
    wait_for(last, process)
    process.send_signal(signal.SIGTERM)
    assert "stopped after step" in finish(process)
    assert torch.load(last, weights_only=True)["global_step"] < 40
    finish(start(command(output, *two)))
    assert losses(output).items() <= losses(alone).items()
    ours, theirs = (alpha_clip.load_checkpoint(run / "model") for run in (output, alone))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
