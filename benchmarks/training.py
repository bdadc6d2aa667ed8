"""What the trainer costs beside a bare loop, and what a second process brings."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from alpha_clip.batches import RegionBatch, phrase_ids
from alpha_clip.demo import config_file
from alpha_clip.module import AlphaClipModule, EncoderConfig
from alpha_clip.optim import create_optimizer, create_schedule
from alpha_clip.progress import RunProgress
from alpha_clip.throughput import Throughput
from benchmarks.pictures import write_shard
from benchmarks.table import report
from benchmarks.timing import Row, compare


def training(
    name: str | None = None,
    batch_size: int = 32,
    steps: int = 20,
    rounds: int = 7,
    device: str = "cpu",
    output: Path = Path("runs/benchmarks/training.csv"),
) -> list[Row]:
    """Compare `Trainer.fit` with a bare loop of the same step, and two processes with one.

    The trainer logs, meters and guards as `alpha-clip fit` does. Two processes read, train and join
    their gradients on the CPU, with one thread each.

    Args:
        name: An open_clip architecture; `None` is the demo's tiny one, where overhead shows most.
        batch_size: Images a step, with two regions each.
        steps: Steps a round.
        rounds: How often to measure.
        device: Where to train in the first comparison.
        output: CSV file for the table.
    """
    warnings.filterwarnings("ignore", ".*(many workers|in eval mode|treespec|val_dataloader)")
    tiny = f"local-dir:{Path(config_file('models/tiny/open_clip_config.json')).parent}"
    module = AlphaClipModule(EncoderConfig(name=name or tiny))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for images in (batch_size, 1):  # with one image, what the trainer costs is seen best
            batches = [random_batch(module, images, device)] * steps
            ways: dict[str, Callable[[], object]] = {
                "bare loop": partial(bare, module, batches, device),
                "Trainer.fit": partial(fitted, module, batches, device, folder),
            }
            case = f"{steps} steps of {module.model.name}, {2 * images} regions"
            rows += compare(case, ways, rounds, device)
        rows += _scaling(folder, tiny, steps, rounds)
    report(rows, output)
    return rows


def random_batch(module: AlphaClipModule, images: int, device: str) -> RegionBatch:
    """Return noise with two regions an image, in the shape that the reader gives it."""
    size = module.model.image_size
    tokens = module.model.tokenizer([f"object number {i}" for i in range(2 * images)])
    return RegionBatch(
        rgb=torch.randn(images, 3, size, size),
        alphas=torch.randn(images, 2, 1, size, size),
        tokens=tokens,
        phrase=torch.arange(2 * images).view(images, 2),
        phrase_ids=phrase_ids(tokens).view(images, 2),
        image_ids=torch.arange(images),
        whole=torch.zeros(images, 2, dtype=torch.bool),
    ).to(device)


def bare(module: AlphaClipModule, batches: list[RegionBatch], device: str) -> float:
    """Train by hand; return the seconds of the loop."""
    module.to(device)
    optimizer = create_optimizer(module.model.named_parameters(), module.roles, module.optim)
    schedule = create_schedule(optimizer, module.optim, len(batches))
    begin = _now(device)
    for batch in batches:
        loss = module.loss(module(batch), module.model.logit_scale.exp(), None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _now(device) - begin


def fitted(module: AlphaClipModule, batches: list[RegionBatch], device: str, folder: str) -> float:
    """Train as `alpha-clip fit` does; return the seconds of the loop."""
    clock = _Clock(device)
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="gpu" if device.startswith("cuda") else "cpu",
        devices=1,
        max_steps=len(batches),
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        callbacks=[clock, Throughput(), RunProgress(), LearningRateMonitor("step")],
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return clock.seconds


class _Clock(L.Callback):
    """Measures the loop alone, without what is set up and taken down around it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = -_now(self.device)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += _now(self.device)


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _scaling(folder: str, tiny: str, steps: int, rounds: int) -> list[Row]:
    """Run the command with one and with two processes; the batch is the same in each process."""
    shards = Path(folder) / "shards"
    write_shard(shards, np.random.default_rng(0), 200)

    def run(processes: int) -> Callable[[], float]:
        def seconds_a_region() -> float:
            with tempfile.TemporaryDirectory(dir=folder) as output:
                return 1 / _speed(tiny, shards, Path(output), processes, steps)

        return seconds_a_region

    ways: dict[str, Callable[[], object]] = {"1 process": run(1), "2 processes": run(2)}
    return compare("a region, read and trained on", ways, min(rounds, 3), "cpu", warmup=0)


def _speed(tiny: str, shards: Path, output: Path, processes: int, steps: int) -> float:
    options = {
        "output": output,
        "model.encoder.name": tiny,
        "data.train": f"[{shards}]",
        "data.batch_size": 16,
        "data.sampling.regions_per_image": 2,
        "data.workers": 0,
        "data.shuffle": 50,
        "trainer.accelerator": "cpu",
        "trainer.devices": processes,
        "trainer.strategy": "ddp" if processes > 1 else "auto",
        "trainer.max_steps": 2 * steps,
        "trainer.log_every_n_steps": max(1, steps // 4),
        "trainer.enable_progress_bar": "false",
    }
    flags = [f"--{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "alpha_clip", "fit", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    rows = csv.DictReader((output / "metrics/version_0/metrics.csv").read_text().splitlines())
    speeds = [float(row["speed/regions"]) for row in rows if row["speed/regions"]]
    return statistics.median(speeds[1:])  # the first interval warms up
