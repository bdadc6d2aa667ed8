"""Many regions of one photograph: one by one, as a batch, and with RGB shared."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from alpha_clip import AlphaClip, Box, RegionTransform, create_model
from benchmarks.timing import Row, compare, report

TINY = f"local-dir:{Path(__file__).parents[1] / 'configs/models/tiny'}"


def regions(
    architectures: list[str] | None = None,
    count: int = 32,
    rounds: int = 5,
    device: str = "cpu",
    output: Path = Path("runs/benchmarks/regions.csv"),
) -> list[Row]:
    """Embed regions of a 640 x 480 JPEG, from its bytes to the features; one by one is 1.

    Args:
        architectures: Architectures; ViT-B-16 and the tiny one of the configs.
        count: Regions of the image.
        rounds: How often to measure.
        device: Where to run.
        output: CSV file for the table.
    """
    rng = np.random.default_rng(0)
    jpeg = photo(rng)
    corners = rng.integers(0, [440, 280], (count, 2))
    boxes = [Box(float(x), float(y), float(x + 160), float(y + 160)) for x, y in corners]
    rows: list[Row] = []
    for name in architectures or ["ViT-B-16", TINY]:
        model, transform, _ = create_model(name, device=device)
        ways = _ways(model, transform, jpeg, boxes, device)
        with torch.inference_mode():
            alone, together, shared = (way() for way in ways.values())
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)
            rows += compare(f"{Path(name).name}, {count} regions", ways, rounds, device)
    report(rows, output)
    return rows


def photo(rng: np.random.Generator) -> bytes:
    """Return a JPEG with about the detail of a photograph."""
    coarse = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _ways(
    model: AlphaClip,
    transform: RegionTransform,
    jpeg: bytes,
    boxes: Sequence[Box],
    device: str,
) -> dict[str, Callable[[], torch.Tensor]]:
    def one_by_one() -> torch.Tensor:
        rgba = (transform(Image.open(io.BytesIO(jpeg)), box) for box in boxes)
        return torch.cat([model.encode_image(one[None].to(device)) for one in rgba])

    def as_a_batch() -> torch.Tensor:
        rgba = transform.stack(Image.open(io.BytesIO(jpeg)), boxes)
        return model.encode_image(rgba.to(device))

    def shared() -> torch.Tensor:
        rgb, alphas = transform.many(Image.open(io.BytesIO(jpeg)), boxes)
        return model.encode_regions(rgb[None].to(device), alphas[None].to(device))[0]

    return {"one by one": one_by_one, "one RGBA batch": as_a_batch, "encode_regions": shared}
