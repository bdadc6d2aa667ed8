"""One training step of a large tower: speed, memory and MFU, beside the published implementation.

That is run from a clone of its repository, with random weights in the same sizes, as its training
script does: attention by an explicit softmax, texts of 77 tokens, separate convolutions; on a GPU
fp16 autocast with a gradient scaler, on the CPU, which has no fast fp16, fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.throughput import get_available_flops

from alpha_clip.batches import RegionBatch
from alpha_clip.module import AlphaClipModule, EncoderConfig
from alpha_clip.optim import create_optimizer
from alpha_clip.throughput import flops_per_region
from benchmarks.machine import at_matmul_rate
from benchmarks.published import published_clip, published_code
from benchmarks.table import report, spread
from benchmarks.timing import Row, measure
from benchmarks.training import random_batch

OURS, WHOLE_TEXT, COMPILED, PUBLISHED = "ours", "ours, text not cut", "ours, compiled", "published"


def training_step(
    name: str | None = None,
    images: int | None = None,
    published: Path | None = None,
    compile: bool | None = None,
    rounds: int = 20,
    budget_s: float = 60,
    device: str = "cpu",
    output: Path = Path("runs/benchmarks/training_step.csv"),
) -> list[Row]:
    """Time a training step with two regions an image; ours, with its texts cut, is 1.

    "Of floor" is the forward and backward pass of the image tower at the rate of a large matrix
    product in the same round; on GPUs whose peak is known, MFU is printed as well.

    Args:
        name: An open_clip ViT of OpenAI's layout; ViT-L-14 on a GPU, else ViT-B-16.
        images: Images a step; 64 on a GPU, else 4.
        published: A clone of https://github.com/SunzeY/AlphaCLIP, to compare with.
        compile: Whether to compile our tower, too; on GPUs by default.
        rounds: How often to measure, at most.
        budget_s: Seconds after which five rounds are enough.
        device: Where to train; bf16 on a GPU, else fp32. Memory is measured on GPUs only.
        output: CSV file for the table.
    """
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    encoder = EncoderConfig(name=name or ("ViT-L-14-quickgelu" if gpu else "ViT-B-16-quickgelu"))
    images = images or (64 if gpu else 4)
    module = AlphaClipModule(encoder).to(device).train()
    batch = random_batch(module, images, device)
    ways: dict[str, Callable[[], object]] = {
        OURS: our_step(module, batch, dtype),
        WHOLE_TEXT: our_step(module, batch, dtype, cut=False),
    }
    if gpu if compile is None else compile:
        compiled = AlphaClipModule(encoder, compile=True).to(device).train()
        ways[COMPILED] = our_step(compiled, batch, dtype)
    if published is not None:
        ways[PUBLISHED] = published_step(published, module, batch)
    regions = 2 * images
    flops = regions * flops_per_region(module.model)
    found = measure(
        f"{module.model.name}, {regions} regions, {'bf16' if gpu else 'fp32'}",
        *(ways, rounds, device),
        budget_s=budget_s,
        items=regions,
        floor=at_matmul_rate(flops, device, dtype),
    )
    rows = found.rows()
    report(rows, output, "the image tower's passes at the rate of a large matrix product")
    sys.stdout.write(spread([found], PUBLISHED, OURS))
    peak = get_available_flops(torch.device(device), dtype)
    if peak:
        shares = [f"{way} {flops / found.median(way) / peak:.1%}" for way in ways]
        sys.stdout.write(f"MFU: {', '.join(shares)}\n")
    return rows


def our_step(
    module: AlphaClipModule, batch: RegionBatch, dtype: torch.dtype, cut: bool = True
) -> Callable[[], torch.Tensor]:
    """Return a step that says its loss.

    Args:
        module: What to train.
        batch: On its device.
        dtype: Of autocast; fp32 is without.
        cut: Whether the texts are cut to the longest, as the module does by itself.
    """
    optimizer = create_optimizer(module.model.named_parameters(), module.roles, module.optim)
    encode = partial(module.model.clip.encode_text, batch.tokens, normalize=True)

    def step() -> torch.Tensor:
        with torch.autocast(batch.rgb.device.type, dtype, enabled=dtype != torch.float32):
            given = batch
            if not cut:
                with torch.no_grad():
                    given = replace(batch, text=encode())
            loss: torch.Tensor = module.loss(module(given), module.model.logit_scale.exp(), None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def published_step(
    clone: Path, module: AlphaClipModule, batch: RegionBatch
) -> Callable[[], torch.Tensor]:
    """Return the published script's step for the same batch; it says its loss.

    Raises:
        ValueError: If that is no clone of the published repository.
    """
    device = batch.rgb.device
    model = published_clip(published_code(clone), module.model)
    optimizer = torch.optim.AdamW(model.visual.parameters(), lr=1e-6)
    half = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    rgb = batch.rgb.repeat_interleave(batch.alphas.shape[1], 0)
    alphas, target = batch.alphas.flatten(0, 1), torch.arange(len(rgb), device=device)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16 if half else None, enabled=half):
            image = F.normalize(model.visual(rgb, alphas), dim=-1)
            with torch.no_grad():
                text = F.normalize(model.encode_text(batch.tokens), dim=-1)
            logits = model.logit_scale.exp() * image @ text.T
            loss = F.cross_entropy(logits, target, label_smoothing=0.1)
            loss = (loss + F.cross_entropy(logits.T, target, label_smoothing=0.1)) / 2
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step
