"""One training step of a large tower: speed, memory and MFU, beside the published implementation.

That is run from a clone of its repository (SunzeY/AlphaCLIP; it needs `pip install loralib`), with
random weights in the same sizes: fp16 autocast with a gradient scaler, attention by an explicit
softmax, texts of 77 tokens, separate convolutions.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.throughput import get_available_flops

from alpha_clip.batches import RegionBatch
from alpha_clip.module import AlphaClipModule, EncoderConfig
from alpha_clip.optim import create_optimizer
from alpha_clip.throughput import flops_per_region
from benchmarks.timing import Row, compare, report
from benchmarks.training import random_batch


def training_step(
    name: str = "ViT-L-14",
    images: int = 64,
    published: Path | None = None,
    compile: bool = False,
    rounds: int = 10,
    device: str = "cuda",
    output: Path = Path("runs/benchmarks/training_step.csv"),
) -> list[Row]:
    """Time a training step with two regions an image, and measure its memory.

    Args:
        name: An open_clip ViT of OpenAI's layout.
        images: Images a step.
        published: A clone of the published repository, to compare with; `None` compares with our
            own step in eager fp32.
        compile: Whether our tower goes through `torch.compile`.
        rounds: How often to measure.
        device: Where to train; on the CPU there is no memory to report.
        output: CSV file for the table.
    """
    module = AlphaClipModule(EncoderConfig(name=name), compile=compile).to(device)
    batch = random_batch(module, images, device)
    first: dict[str, Callable[[], object]] = (
        {"fp32, eager": _our_step(module, batch, torch.float32)}
        if published is None
        else {"published": _published_step(published, module, batch)}
    )
    half = {"ours, bf16": _our_step(module, batch, torch.bfloat16)}
    # Few CPUs compute in bf16; the others imitate it, many times slower.
    whole = {"ours, fp32": _our_step(module, batch, torch.float32)}
    ways = {**first, **(half if device.startswith("cuda") else whole)}
    memory = {way: _peak(step, device) for way, step in ways.items()}  # GiB
    rows = compare(f"{2 * images} regions of {name}", ways, rounds, device)
    report(rows, output)
    peak = get_available_flops(torch.device(device), torch.bfloat16)
    flops = 2 * images * flops_per_region(module.model)
    for row in rows:
        words = f"{row.variant}: {2000 * images / row.milliseconds:.1f} regions/s"
        if peak:
            words += f", {100 * 1000 * flops / row.milliseconds / peak:.1f} % MFU"
        if memory[row.variant]:
            words += f", {memory[row.variant]:.1f} GiB at the peak"
        sys.stdout.write(words + "\n")
    return rows


def _our_step(
    module: AlphaClipModule, batch: RegionBatch, dtype: torch.dtype
) -> Callable[[], object]:
    optimizer = create_optimizer(module.model.named_parameters(), module.roles, module.optim)
    half = dtype != torch.float32

    def step() -> None:
        with torch.autocast(batch.rgb.device.type, dtype, enabled=half):
            loss = module.loss(module(batch), module.model.logit_scale.exp(), None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _published_step(
    clone: Path, module: AlphaClipModule, batch: RegionBatch
) -> Callable[[], object]:
    device = batch.rgb.device
    model = _published_model(clone, module).to(device)
    learns = list(model.visual.parameters())
    optimizer = torch.optim.AdamW(learns, lr=1e-6)
    on_gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)
    rgb = batch.rgb.repeat_interleave(batch.alphas.shape[1], 0)
    alphas, target = batch.alphas.flatten(0, 1), torch.arange(len(rgb), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16 if on_gpu else None, enabled=on_gpu):
            image = F.normalize(model.visual(rgb, alphas), dim=-1)
            with torch.no_grad():
                text = F.normalize(model.encode_text(batch.tokens), dim=-1)
            logits = model.logit_scale.exp() * image @ text.T
            loss = F.cross_entropy(logits, target, label_smoothing=0.1)
            loss = (loss + F.cross_entropy(logits.T, target, label_smoothing=0.1)) / 2
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def _published_model(clone: Path, module: AlphaClipModule) -> Any:
    """Build the published CLIP in the sizes of ours, in fp32, as its training script does."""
    file = clone / "alpha_clip" / "model.py"
    spec = importlib.util.spec_from_file_location("published_alpha_clip", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ValueError(f"{file} is missing; give a clone of SunzeY/AlphaCLIP")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    vision, text = module.model.config["vision_cfg"], module.model.config["text_cfg"]
    model = code.CLIP(
        module.model.config["embed_dim"],
        *(vision["image_size"], vision["layers"], vision["width"], vision["patch_size"]),
        *(text["context_length"], text["vocab_size"], text["width"]),
        *(text["width"] // 64, text["layers"]),
        lora_adapt=False,
        rank=-1,
    )
    model.float().train().requires_grad_(False)
    model.visual.requires_grad_(True)
    return model


def _peak(step: Callable[[], object], device: str) -> float:
    """Return the most memory that a step takes, in GiB, with all that it is for."""
    if not device.startswith("cuda"):
        return 0.0
    step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) / 2**30
