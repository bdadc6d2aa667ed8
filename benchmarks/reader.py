"""Reading training data on one core: regions a second, and where the milliseconds go."""

from __future__ import annotations

import io
import json
import math
import random
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import webdataset as wds
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.transforms import functional as T
from torchvision.transforms import v2

from alpha_clip.datasets import RegionShards
from alpha_clip.drops import Drops
from alpha_clip.geometry import make_square
from alpha_clip.mask_stack import MaskStack
from alpha_clip.reader import Shard, find_shards, read_samples
from alpha_clip.regions import RegionSample, decode_jpeg, parse_sample
from alpha_clip.sampling import Sampling
from alpha_clip.streams import ShardSet
from alpha_clip.transforms import Normalisation, RegionAugment, RegionTransform
from benchmarks.pictures import REGIONS, write_shard
from benchmarks.table import report
from benchmarks.timing import Measured, Row, measure

PUBLISHED, TRAINING = "published script", f"ours, {REGIONS} regions an image"
EVALUATION = f"ours, {REGIONS} regions, the published script's work"
FLOOR = "floor: decode, one resize"
_REQUIRED = 2  # times the regions a second of the published script
_TOLERANCE = 0.02  # of normalised values, on average: a step of uint8 is 0.015
_EDGE_PX, _CHECKED = 3, 4  # where the published script mixes picture and padding; pictures
_NORM = Normalisation()
_Pair = tuple[Tensor, Tensor]
_Way = Callable[[], Iterator[int]]
_Clock = Callable[..., Measured]


def reader(
    shards: list[str] | None = None,
    samples: int = 50,
    size: int = 224,
    rounds: int = 15,
    budget_s: float = 120.0,
    output: Path = Path("runs/benchmarks/reader.csv"),
) -> list[Row]:
    """Read shards on one core up to normalised tensors, in five ways; plain webdataset is 1.

    Times and ratios are those of a region. The second case shows the stages of an image with four
    regions; its ratios are shares of the whole.

    Args:
        shards: Folders of shards with pictures in them, made by `alpha-clip-data`; `None` writes
            pictures of 640 x 480 px with four regions each.
        samples: Images a round.
        size: Side of the tensors, in pixels.
        rounds: How often to measure, at least 2.
        budget_s: Seconds after which a case ends before all its rounds; five are done anyway.
        output: CSV file for the table.

    Raises:
        ValueError: If a number is too small, the shards hold no sound pictures, or two ways differ.
    """
    for name, count, least in (("samples", samples, 1), ("size", size, 16), ("rounds", rounds, 2)):
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}; give more")
    with tempfile.TemporaryDirectory() as folder, _one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation")  # pycocotools with NumPy 2
        if shards is None:
            write_shard(Path(folder), np.random.default_rng(0), samples)
        found = find_shards(shards or [folder])
        for sample in _sound(found, _CHECKED):
            check_sample(sample, size)
        samples = min(samples, sum(shard.samples for shard in found))
        ways = ways_to_read(found, size, samples)
        timed = partial(measure, rounds=rounds, device="cpu", budget_s=budget_s, items=1)
        every: dict[str, Callable[[], object]] = {n: partial(each, w) for n, w in ways.items()}
        measured = timed(f"{samples} images, each region", every)
        rows = measured.rows() + _stage_rows(timed, ways[TRAINING], found, samples, size)
    report(rows, output, "decoding the JPEG and resizing four channels once")
    _tell(measured)
    return rows


def ways_to_read(shards: list[Shard], size: int, samples: int) -> dict[str, _Way]:
    """Return the five ways to read so many images; each yields how many regions it has made."""
    tars = [str(shard.file) for shard in shards]
    augment, evaluate = RegionAugment(size), RegionTransform(size, geometry="pad")
    ours = partial(_ours, shards, samples)
    return {
        "webdataset and Pillow": partial(_webdataset, tars, size, samples),
        PUBLISHED: partial(_published, tars, size, samples),
        "ours, 1 region an image": partial(ours, augment, 1),
        TRAINING: partial(ours, augment, REGIONS),
        EVALUATION: partial(ours, evaluate, REGIONS),
    }


def each(way: _Way, of: int = 1) -> float:
    """Return the seconds that a way takes for each of its regions, or for `of` of them."""
    start = time.perf_counter()
    regions = sum(way())
    return of * (time.perf_counter() - start) / regions


def published_way(jpeg: bytes, rle: dict[str, Any], size: int) -> _Pair:
    """Turn a picture and a mask into tensors as the published training script does.

    It decodes with OpenCV, pads to a square with zeros, and resizes floating values.
    """
    bgr = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    rgba = np.dstack([cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), coco_mask.decode(rle)])
    height, width = rgba.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.pad(rgba, ((top, side - height - top), (left, side - width - left), (0, 0)))
    colour, alpha = T.to_tensor(square[..., :3]), T.to_tensor(square[..., 3] * 255)
    colour = T.resize(colour, [size, size], T.InterpolationMode.BICUBIC, antialias=True)
    return _normalised(colour, T.resize(alpha, [size, size], antialias=True))


def check_sample(sample: RegionSample, size: int) -> None:
    """Make sure that ours gives of a picture what the published way does.

    Raises:
        ValueError: If they differ by more than rounding to 0..255 explains.
    """
    masks = [dict(region.rle) for region in sample.regions]
    rgb, alphas = RegionTransform(size, geometry="pad").many(decode_jpeg(sample.jpeg), masks)
    for mask, alpha in zip(masks, alphas, strict=True):
        _check_same((rgb, alpha), published_way(sample.jpeg, mask, size), sample.w / sample.h)


def _check_same(ours: _Pair, theirs: _Pair, aspect: float) -> None:
    """Compare colour inside the padding, whose colours differ, and alpha everywhere."""
    size = ours[0].shape[-1]
    sides = (size / max(1, aspect), size * min(1, aspect))  # of the picture without its padding
    y, x = (min(math.ceil((size - side) / 2) + _EDGE_PX, (size - 1) // 2) for side in sides)
    inner = (..., slice(y, size - y), slice(x, size - x))
    pairs = {"colour": (ours[0][inner], theirs[0][inner]), "alpha": (ours[1], theirs[1])}
    for name, (a, b) in pairs.items():
        difference = float((a - b).abs().mean())
        if not difference < _TOLERANCE:
            raise ValueError(
                f"the published way and ours disagree about {name}: expected a mean difference "
                f"below {_TOLERANCE}, got {difference:.3f}; mend that before timing them"
            )


def _stage_rows(
    timed: _Clock, read: _Way, shards: list[Shard], samples: int, size: int
) -> list[Row]:
    """Time the stages of an image; what they leave of the whole is the rest."""
    spent: list[dict[str, float]] = []
    jpegs = [sample.jpeg for sample in _sound(shards, _CHECKED)]
    ways = {
        "all": partial(each, read, REGIONS),
        "stages": lambda: spent.append(stages(shards, samples, size)),
        FLOOR: partial(each, lambda: (_floor(jpeg, size) for jpeg in jpegs)),
    }
    found = timed(f"the stages of an image with {REGIONS} regions", ways)
    every = found.seconds["all"]
    parts = spent[-len(every) :]  # without those of warming up
    seconds = {"all": every} | {name: [part[name] for part in parts] for name in parts[0]}
    rest = [max(1e-9, a - sum(part.values())) for a, part in zip(every, parts, strict=True)]
    found = replace(found, seconds=seconds | {"the rest": rest, FLOOR: found.seconds[FLOOR]})
    first, *others = found.rows()
    return [replace(first, of_floor=found.ratio(FLOOR, "all")[0]), *others]


def stages(shards: list[Shard], samples: int, size: int) -> dict[str, float]:
    """Read images as in training, in a row of stages; return the seconds of an image in each."""
    crop, how = v2.RandomResizedCrop(size, (0.6, 1.0), (0.8, 1.25)), (size, "squash", _NORM.mean)
    spent: dict[str, float] = defaultdict(float)
    raws = wds.tarfile_to_samples()([{"url": str(shard.file)} for shard in shards])
    then = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal then
        now = time.perf_counter()
        spent[stage] += (now - then) / samples
        then = now

    for raw in islice(raws, samples):
        lap("tar")
        sample = parse_sample(raw["__key__"], raw["jpg"], raw["json"])
        lap("JSON and checks")
        image = decode_jpeg(sample.jpeg)
        lap("JPEG decode")
        image = image if image.mode == "RGB" else image.convert("RGB")
        rgb = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        lap("pixels to a tensor")
        rles = [region.rle for region in (sample.regions * REGIONS)[:REGIONS]]
        masks = MaskStack.of(rles, sample.h, sample.w)
        assert masks is not None  # the sample was checked
        lap("masks read")
        window = crop.make_params([rgb])
        cut = masks.crop(**window)
        (cut.areas() < masks.areas()).any()
        lap("window, what it keeps")
        alphas = make_square(cut, *how)  # type: ignore[arg-type]
        lap("masks decoded, resized")
        rgb = make_square(v2.functional.crop(rgb, **window), *how)  # type: ignore[arg-type]
        lap("picture cut, resized")
        _NORM.rgb(rgb), _NORM.alpha(alphas)
        lap("normalise")
    return spent


def _floor(jpeg: bytes, size: int) -> int:
    image = Image.open(io.BytesIO(jpeg))
    image.load()
    four = torch.empty(image.height, image.width, 4, dtype=torch.uint8).permute(2, 0, 1)
    return len(v2.functional.resize(four, [size, size])[None])


def _webdataset(tars: list[str], size: int, samples: int) -> Iterator[int]:
    chance = random.Random(0)
    for picture in islice(wds.WebDataset(tars, shardshuffle=False).decode("pil"), samples):
        region = chance.choice(picture["json"]["regions"])
        mask = Image.fromarray(coco_mask.decode(region["rle"]) * np.uint8(255))
        colour = T.to_tensor(picture["jpg"].resize((size, size), Image.Resampling.BICUBIC))
        alpha = T.to_tensor(mask.resize((size, size), Image.Resampling.BILINEAR))
        yield len(_normalised(colour, alpha)[1])


def _published(tars: list[str], size: int, samples: int) -> Iterator[int]:
    chance = random.Random(0)
    for raw in islice(wds.WebDataset(tars, shardshuffle=False), samples):
        region = chance.choice(json.loads(raw["json"])["regions"])
        yield len(published_way(raw["jpg"], region["rle"], size)[1])


def _ours(
    shards: list[Shard], samples: int, transform: RegionTransform | RegionAugment, regions: int
) -> Iterator[int]:
    # Never the whole image in place of a region: that needs no mask.
    sampling = Sampling(regions, whole_image_ratio=0)
    stream = RegionShards([ShardSet(tuple(shards))], transform, sampling, seed=0, shuffle=1)
    return (len(sample.alphas) for sample in islice(stream, samples))


def _normalised(colour: Tensor, alpha: Tensor) -> _Pair:
    alpha = T.normalize(alpha, [_NORM.alpha_mean], [_NORM.alpha_std])
    return T.normalize(colour, _NORM.mean, _NORM.std), alpha


def _sound(shards: list[Shard], samples: int) -> list[RegionSample]:
    for shard in shards:
        if shard.pictures:
            raise ValueError(f"{shard.file} holds no pictures; make shards with `layout: tar`")
    drops = Drops()
    found = (sample for shard in shards for sample in read_samples(shard, drops))
    if sound := list(islice(found, samples)):
        return sound
    raise ValueError(f"expected sound samples in the shards, got {dict(drops.counts())}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Give torch and OpenCV one thread, as in a data loader's worker."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def _tell(measured: Measured) -> None:
    for row in measured.rows():
        rate = 1000 / row.milliseconds
        images = rate / (REGIONS if row.variant in (TRAINING, EVALUATION) else 1)
        sys.stdout.write(f"{row.variant}: {rate:.0f} regions/s, {images:.0f} images/s a core\n")
    training, same = (1 / measured.ratio(ours, PUBLISHED)[0] for ours in (TRAINING, EVALUATION))
    verdict = "reached" if min(training, same) >= _REQUIRED else "NOT reached"
    sys.stdout.write(
        f"{REGIONS} regions an image: {training:.1f} x the regions/s of the published script in "
        f"training, {same:.1f} x with the same work; {_REQUIRED} x required: {verdict}\n"
    )
