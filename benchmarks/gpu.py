"""All that a GPU is asked for, in one call, most wanted first, within a limit of time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.encode import TOWERS, encode
from benchmarks.machine import machine
from benchmarks.pipeline import pipeline
from benchmarks.regions import regions
from benchmarks.timing import Row
from benchmarks.training_step import training_step

_LARGE, _SMALL = "ViT-L-14-quickgelu", "ViT-B-32-quickgelu"
_BATCHES = [1, 8, 64, 256]  # each is compiled twice, which takes longer than all that is measured


def gpu(
    published: Path | None = None,
    minutes: float = 8,
    tiny: bool = False,
    device: str = "cuda",
    output: Path = Path("runs/benchmarks/gpu"),
) -> dict[str, list[Row]]:
    """Measure encoding, the training step, regions and SAM on a GPU.

    Each part writes tables of its own; a part that fails is told, and the next one begins. What
    has not begun in time is left out.

    Args:
        published: A clone of https://github.com/SunzeY/AlphaCLIP, to compare with.
        minutes: When to begin no further part.
        tiny: Take small towers and few images, to try the script itself.
        device: Where to run; the CPU, to try it.
        output: Folder for the tables.

    Raises:
        ValueError: If there is no GPU.
        RuntimeError: At the end, if a part failed.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            "expected a GPU, found none that PyTorch can use; to try the script on the CPU: "
            "python -m benchmarks gpu --tiny true --device cpu"
        )
    sys.stdout.write(f"{machine()}\n")
    began = time.perf_counter()
    found: dict[str, list[Row]] = {}
    failed = []
    for name, part in (_tiny if tiny else _parts)(published, device, output).items():
        if time.perf_counter() - began > 60 * minutes:
            sys.stdout.write(f"\n{name}: left out, {minutes:g} minutes are over\n")
            continue
        sys.stdout.write(f"\n{name}\n")
        try:
            found[name] = part()
        except (RuntimeError, ValueError) as error:  # the other parts are worth having
            sys.stdout.write(f"{name} failed: {type(error).__name__}: {error}\n")
            failed.append(name)
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        sys.stdout.flush()
    if failed:
        raise RuntimeError(f"{', '.join(failed)} failed; the reasons are above")
    return found


def _parts(published: Path | None, device: str, folder: Path) -> dict[str, Callable[[], list[Row]]]:
    code = partial(encode, published=published, device=device, budget_s=10)
    others = [name for name in TOWERS if name != _LARGE]
    return {
        "encode": partial(code, [_LARGE], _BATCHES, ["bf16"], output=folder / "encode.csv"),
        "training step": partial(
            training_step, None, None, published, device=device, output=folder / "step.csv"
        ),
        "regions": partial(
            *(regions, [_LARGE], None, published),
            budget_s=10,
            device=device,
            output=folder / "regions.csv",
        ),
        "SAM": partial(
            pipeline, device=device, grabcut=False, budget_s=10, output=folder / "pipeline.csv"
        ),
        "encode in fp16": partial(
            *(code, [_LARGE], _BATCHES, ["fp16"]), compile=False, output=folder / "encode_fp16.csv"
        ),
        "encode others": partial(
            *(code, others, _BATCHES, ["bf16"]), compile=False, output=folder / "encode_others.csv"
        ),
    }


def _tiny(published: Path | None, device: str, folder: Path) -> dict[str, Callable[[], list[Row]]]:
    return {
        "encode": partial(
            *(encode, [_SMALL], [1, 2], None, published, False, 5, 0),
            device=device,
            output=folder / "encode.csv",
        ),
        "training step": partial(
            *(training_step, _SMALL, 1, published, False, 5, 0),
            device=device,
            output=folder / "step.csv",
        ),
        "regions": partial(
            *(regions, [_SMALL], [1, 2], published, 5, 0),
            device=device,
            output=folder / "regions.csv",
        ),
        "SAM": partial(
            *(pipeline, 2, device, "vit_b", 64, 2, 4, False, False, 0),
            output=folder / "pipeline.csv",
        ),
    }
