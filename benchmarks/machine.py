"""Where figures come from, and the best that this machine does."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode


@cache
def machine() -> str:
    """Return processor, card, versions and date in a line."""
    names = [f"{os.cpu_count()} x {_processor()}"]
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "open_clip_torch", "timm"))
    return f"{', '.join(names)}; {packages}; {datetime.date.today()}"


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a large matrix product, measured now.

    What the passes of a tower are held against. A GPU gets a chain of products, long enough for its
    clock to settle where it stays.
    """
    size, repeats = (8192, 20) if device.startswith("cuda") else (2048, 1)
    a, b = _factors(size, device, dtype)
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b)
    _wait(device)
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def at_matmul_rate(flops: float, device: str, dtype: torch.dtype) -> Callable[[], float]:
    """Return what says how many seconds so many operations take at the rate of that moment."""
    matmul_rate(device, dtype)
    return lambda: flops / matmul_rate(device, dtype)


@cache
def _factors(size: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return first, second


def forward_flops(run: Callable[..., object], *inputs: torch.Tensor) -> float:
    """Return the operations of a forward pass: matrix products, convolutions and attention.

    With gradients, because PyTorch's fused attention of inference is not counted.
    """
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        run(*inputs)
    return float(counter.get_total_flops())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
