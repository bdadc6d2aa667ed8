from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alpha_clip.progress import RunProgress


def trainer(**more: Any) -> Any:
    """What the bars ask of a trainer."""
    common = {
        "global_step": 0,
        "estimated_stepping_batches": 4,
        "log_every_n_steps": 2,
        "sanity_checking": False,
        "num_val_batches": [3],
        "num_sanity_val_batches": [1],
        "progress_bar_metrics": {"train/loss": torch.tensor(1.5)},
    }
    return SimpleNamespace(**{**common, **more})


def train(bars: RunProgress, run: Any, batches: range, every: int = 1) -> None:
    """Go through batches, with an optimizer step after each `every`."""
    for index in batches:
        run.global_step += (index + 1) % every == 0
        bars.on_train_batch_end(run, None, None, None, index)


def test_a_bar_counts_optimizer_steps(capsys: pytest.CaptureFixture[str]) -> None:
    bars, run = RunProgress(), trainer()
    bars.on_train_start(run, None)
    train(bars, run, range(8), every=2)
    bars.on_train_end(run, None)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("train: 100%")
    assert "4/4" in last
    assert "train/loss=1.500" in last


def test_a_run_that_goes_on_begins_where_it_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    bars, run = RunProgress(), trainer(global_step=3)
    bars.on_train_start(run, None)
    assert "3/4" in capsys.readouterr().err


def test_an_unknown_length_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    bars, run = RunProgress(), trainer(estimated_stepping_batches=float("inf"))
    bars.on_train_start(run, None)
    train(bars, run, range(2))
    bars.on_train_end(run, None)
    assert "2step" in capsys.readouterr().err


def test_the_device_is_asked_only_when_the_loss_is_logged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Loss:
        read = 0

        def __format__(self, spec: str) -> str:
            Loss.read += 1
            return "1.5"

    bars, run = RunProgress(), trainer(progress_bar_metrics={"loss": Loss()}, log_every_n_steps=5)
    bars.on_train_start(run, None)
    train(bars, run, range(4))
    assert Loss.read == 0
    train(bars, run, range(4, 10))
    assert Loss.read == 2


def test_validation_has_a_bar_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    bars, run = RunProgress(), trainer()
    bars.on_train_start(run, None)
    for checks, word in ((True, "check"), (False, "validate")):
        run.sanity_checking = checks
        bars.on_validation_start(run, None)
        bars.on_validation_batch_end(run, None, None, None, 0)
        assert f"{word}:   0%" in capsys.readouterr().err
        bars.on_validation_end(run, None)
    run.progress_bar_metrics = {"val/region_top1": torch.tensor(0.25)}
    bars.on_validation_start(run, None)
    bars.on_validation_end(run, None)
    bars.teardown(run, None, "fit")
    assert "val/region_top1=0.250" in capsys.readouterr().err.split("\r")[-1]


def test_only_the_first_process_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    bars, run = RunProgress(), trainer(is_global_zero=False)
    bars.setup(run, None, "fit")
    bars.on_train_start(run, None)
    train(bars, run, range(4))
    bars.on_validation_start(run, None)
    bars.on_validation_end(run, None)
    bars.on_train_end(run, None)
    assert capsys.readouterr().err == ""


def test_an_error_closes_what_is_open(capsys: pytest.CaptureFixture[str]) -> None:
    bars, run = RunProgress(), trainer()
    bars.on_train_start(run, None)
    bars.on_validation_start(run, None)
    bars.on_exception(run, None, ValueError())
    assert capsys.readouterr().err.endswith("\n")
    bars.teardown(run, None, "fit")  # Lightning comes by once more


def test_printing_leaves_the_bars_whole(capsys: pytest.CaptureFixture[str]) -> None:
    RunProgress().print("a", 1)
    assert capsys.readouterr().out == "a 1\n"
