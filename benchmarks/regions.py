"""Many regions of one photograph: one by one, with `encode_regions`, and as published."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from alpha_clip import AlphaClip, Box, RegionTransform, create_model
from alpha_clip.pooled import pooled_features
from alpha_clip.surgery import alpha_parameters
from benchmarks.machine import at_matmul_rate, forward_flops
from benchmarks.pictures import HEIGHT, WIDTH, photo
from benchmarks.published import (
    is_openai,
    published_code,
    published_preprocess,
    published_tower,
    same_features,
)
from benchmarks.table import report, save, spread
from benchmarks.timing import Measured, Row, measure

TINY = f"local-dir:{Path(__file__).parents[1] / 'configs/models/tiny'}"
ALONE, SHARED, PUBLISHED = "one by one", "encode_regions", "published, one by one"
_FLOOR = "the rate of a large matrix product, for the towers alone"
_SIDE = 160  # of a region, in pixels


def regions(
    architectures: list[str] | None = None,
    counts: list[int] | None = None,
    published: Path | None = None,
    rounds: int = 15,
    budget_s: float = 30,
    device: str = "cpu",
    output: Path = Path("runs/benchmarks/regions.csv"),
) -> list[Row]:
    """Embed regions of a 640 x 480 JPEG, from its bytes to the features; one by one is 1.

    "Of floor" is the share of the rate of a large matrix product, as if the towers were all.

    Args:
        architectures: Architectures; ViT-B-16 and the tiny one of the configs.
        counts: Regions of the image; 1, 4, 16 and 64.
        published: A clone of https://github.com/SunzeY/AlphaCLIP, to compare with.
        rounds: How often to measure, at most.
        budget_s: Seconds for each case, after which five rounds are enough.
        device: Where to run; bf16 on a GPU, else fp32. The published code has no bf16: it is fp16.
        output: CSV file for the table.
    """
    code = None if published is None else published_code(published)
    precision = "bf16" if device.startswith("cuda") else "fp32"
    rng = np.random.default_rng(0)
    jpeg, every, rows = photo(rng), [], []
    for name in architectures or ["ViT-B-16-quickgelu", TINY]:
        model, transform, _ = create_model(name, precision=precision, device=device)
        for kernel in alpha_parameters(model.visual):
            nn.init.normal_(kernel, std=0.02)
        theirs = None
        if code is not None and is_openai(model):
            theirs = published_tower(code, model, half=precision != "fp32")
        rgba = torch.zeros(1, 4, model.image_size, model.image_size, device=device)
        flops = forward_flops(pooled_features, model.visual, rgba.to(model.dtype))
        for count in counts or [1, 4, 16, 64]:
            corners = rng.integers(0, [WIDTH - _SIDE, HEIGHT - _SIDE], (count, 2))
            ways = ways_to_embed(model, transform, jpeg, corners, theirs)
            case = f"{Path(name).name}, {count} region{'s' * (count > 1)}"
            floor = at_matmul_rate(count * flops, device, model.dtype)
            with torch.inference_mode():
                found = measure(
                    *(case, ways, rounds, device),
                    warmup=1,
                    budget_s=budget_s,
                    items=count,
                    floor=floor,
                )
            every.append(found)
            rows += found.rows()
            save(rows, output, _FLOOR)
    report(rows, output, _FLOOR)
    _verdicts(every)
    return rows


def ways_to_embed(
    model: AlphaClip,
    transform: RegionTransform,
    jpeg: bytes,
    corners: NDArray[np.int64],
    published: Any = None,
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return ways of embedding the regions of a JPEG.

    Args:
        model: With alpha.
        transform: Its own.
        jpeg: The picture.
        corners: Upper left corners of the regions, in pixels `[regions, (x, y)]`.
        published: The published tower, if there is one.

    Raises:
        ValueError: If ours give different features.
    """
    boxes = [Box(float(x), float(y), float(x + _SIDE), float(y + _SIDE)) for x, y in corners]
    device = model.logit_scale.device

    def one_by_one() -> torch.Tensor:
        rgba = (transform(Image.open(io.BytesIO(jpeg)), box) for box in boxes)
        return torch.cat([model.encode_image(one[None].to(device)) for one in rgba])

    def as_a_batch() -> torch.Tensor:
        rgba = transform.stack(Image.open(io.BytesIO(jpeg)), boxes)
        return model.encode_image(rgba.to(device))

    def shared() -> torch.Tensor:
        rgb, alphas = transform.many(Image.open(io.BytesIO(jpeg)), boxes)
        return model.encode_regions(rgb[None].to(device), alphas[None].to(device))[0]

    ways = {ALONE: one_by_one, "one RGBA batch": as_a_batch, SHARED: shared}
    with torch.inference_mode():
        expected = one_by_one()
        for way in (as_a_batch, shared):
            same_features(way(), expected, 1e-4 if model.dtype == torch.float32 else 0.1)
    if published is not None:
        ways |= _published_ways(published, model, jpeg, corners)
    return ways


def _published_ways(
    tower: Any, model: AlphaClip, jpeg: bytes, corners: NDArray[np.int64]
) -> dict[str, Callable[[], torch.Tensor]]:
    """As its README shows it, and as well as it can be used: the picture once, all masks together.

    It squashes the mask and crops the picture, so its features are of another crop; the tower is
    the same as ours.
    """
    half = model.dtype != torch.float32
    on_image, on_mask = published_preprocess(model.image_size)
    dtype = torch.float16 if half else torch.float32
    masks = []
    for x, y in corners:
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[y : y + _SIDE, x : x + _SIDE] = 255
        masks.append(mask)

    def embed(rgb: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        device = model.logit_scale.device
        features: torch.Tensor = tower(rgb.to(device, dtype), alpha.to(device, dtype))
        return features

    def one_by_one() -> torch.Tensor:
        parts = []
        for mask in masks:
            picture = Image.open(io.BytesIO(jpeg))
            parts.append(embed(on_image(picture)[None], on_mask(mask)[None]))
        return torch.cat(parts)

    def together() -> torch.Tensor:
        rgb = on_image(Image.open(io.BytesIO(jpeg)))
        alphas = torch.stack([on_mask(mask) for mask in masks])
        return embed(rgb.expand(len(masks), -1, -1, -1), alphas)

    return {PUBLISHED: one_by_one, "published, one batch": together}


def _verdicts(every: Sequence[Measured]) -> None:
    for over, base in ((SHARED, ALONE), (PUBLISHED, SHARED), ("published, one batch", SHARED)):
        sys.stdout.write(spread(every, over, base))
