"""Small, generated things that the tests share: a tiny model, samples and finished shards."""

from __future__ import annotations

import io
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import alpha_clip
from alpha_clip.regions import RegionAnnotation, RegionSample, encode_rle, rle_area
from data_pipeline.shards import ShardManifest, ShardWriter

REPOSITORY = Path(__file__).parents[2]
COLOURS = {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (30, 40, 220)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def tiny_name() -> str:
    """The shipped tiny architecture, as `create_model` takes it."""
    return f"local-dir:{REPOSITORY / 'configs/models/tiny'}"


@pytest.fixture(scope="session")
def tiny(tiny_name: str) -> tuple[Any, Any, Any]:
    """Model, transform and tokenizer; alpha's kernel is not zero. Tests must not change it."""
    torch.manual_seed(0)
    model, transform, tokenizer = alpha_clip.create_model(tiny_name)
    torch.nn.init.normal_(model.visual.conv1.weight_alpha, std=0.02)
    return model.requires_grad_(False), transform, tokenizer


@pytest.fixture(scope="session")
def model(tiny: tuple[Any, Any, Any]) -> alpha_clip.AlphaClip:
    """The tiny model alone. Tests must not change it."""
    return tiny[0]


@pytest.fixture(scope="session")
def make_jpeg() -> Callable[..., bytes]:
    """Return the bytes of a JPEG of a size, filled with grey or given pixels."""

    def make(width: int = 40, height: int = 30, pixels: Any = None) -> bytes:
        if pixels is None:
            pixels = np.full((height, width, 3), 127, np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def make_sample(make_jpeg: Callable[..., bytes]) -> Callable[..., RegionSample]:
    """Return a sound sample: coloured rectangles side by side, one region each."""

    def make(
        key: str = "0", colours: Sequence[str] = ("red", "blue"), width: int = 40, height: int = 30
    ) -> RegionSample:
        pixels = np.full((height, width, 3), 127, np.uint8)
        caption = " beside ".join(f"{colour} thing" for colour in colours)
        regions = []
        for rid, colour in enumerate(colours):
            text = f"{colour} thing"
            x1, x2 = (width * rid) // len(colours) + 2, (width * (rid + 1)) // len(colours) - 2
            y1, y2 = 5, height - 5
            pixels[y1:y2, x1:x2] = COLOURS[colour]
            mask = np.zeros((height, width), bool)
            mask[y1:y2, x1:x2] = True
            rle = encode_rle(mask)
            start = caption.index(text)
            regions.append(
                RegionAnnotation(
                    rid=rid,
                    text=text,
                    kind="noun_chunk",
                    span=(start, start + len(text)),
                    box=(float(x1), float(y1), float(x2), float(y2)),
                    rle=rle,
                    area=rle_area(rle),
                    score=0.5,
                )
            )
        jpeg = make_jpeg(width, height, pixels)
        return RegionSample(key, jpeg, f"id-{key}", "test", width, height, caption, tuple(regions))

    return make


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., list[ShardManifest]]:
    """Write samples as finished shards, one for each list of samples."""

    def write(folder: Path, *shards: Sequence[RegionSample]) -> list[ShardManifest]:
        manifests = []
        for index, samples in enumerate(shards):
            writer = ShardWriter(folder, index)
            for sample in samples:
                writer.write(sample)
            manifests.append(writer.commit("0" * 16, f"input-{index}.tar"))
        return manifests

    return write


@pytest.fixture(scope="session")
def two_shards(
    tmp_path_factory: pytest.TempPathFactory,
    make_sample: Callable[..., RegionSample],
    write_shards: Callable[..., list[ShardManifest]],
) -> Path:
    """A folder with two finished shards of three samples with two regions. Read only."""
    folder = tmp_path_factory.mktemp("shards")
    pairs = [("red", "blue"), ("green", "red"), ("blue", "green")]
    samples = [make_sample(str(i), pairs[i % 3]) for i in range(6)]
    write_shards(folder, samples[:3], samples[3:])
    return folder
