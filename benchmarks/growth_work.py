"""The work whose growth is measured, and the process of its own that does it.

What is worked on is drawn before. Only some of the work imports torch.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipeline.engines.local import LocalEngine
from data_pipeline.filters import Filters
from data_pipeline.run import make_shards
from data_pipeline.runner import PipelineConfig, process_shard
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.shard_maker import ShardTask
from data_pipeline.sources.grit import GritSource
from data_pipeline.sources.storage import find_inputs
from data_pipeline.verification import verify_shards

TORCH = (  # what work with torch imports
    *("alpha_clip.data", "alpha_clip.embedding.embed", "alpha_clip.factory", "open_clip"),
    *("alpha_clip.evaluation.region_classification", "alpha_clip.region_matching"),
)
_LEAST_S = 0.2  # shorter work is repeated until so much time has passed
_LARGE_PX, _FEW = 512, 4  # a side of pictures with many regions, and how many there are
_BATCHES, _BATCH = 64, 2  # of each worker, images in each
_TARS = {"images": 1, "regions": 1, "workers": 64}  # else as many as the size says
_MAKER = PipelineConfig(GritSource(phrases="noun_chunks"), BoxSegmenter())
Work = Callable[[], object]


@dataclass(frozen=True)
class Growth:
    """Work that is done at several sizes.

    Attributes:
        axis: What there is more of.
        sizes: How much of it, ascending.
        prepare: Takes the place of its data (see `draw`), the size and the name of a tower; returns
            the work. Work with workers measures itself: it returns seconds, and their MiB.
        torch: Whether it needs torch.
    """

    axis: str
    sizes: tuple[int, ...]
    prepare: Callable[[Path, int, str], Work]
    torch: bool = True


def serve(
    name: str, size: int, data: Path, tower: str, workers: str, connection: Connection
) -> None:
    """Do work of one size each time that the other end sends `True`.

    Args:
        name: Which of `GROWTHS`.
        size: How much.
        data: The place of its data.
        tower: An open_clip architecture.
        workers: How it starts processes of its own: not as it was started itself.
        connection: Gets seconds, and the most MiB so far on top of what was there before the work;
            where it fails, the traceback.
    """
    multiprocessing.set_start_method(workers, force=True)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            if GROWTHS[name].torch:
                import torch

                torch.set_num_threads(1)
                torch.set_grad_enabled(False)
            work = GROWTHS[name].prepare(data, size, tower)
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is none of the work's
            before = _peak_mib()
            while connection.recv():
                connection.send(_measured(work, before))
        except Exception:  # noqa: BLE001 - the other end raises it
            connection.send(traceback.format_exc())


def _measured(work: Work, before_mib: float) -> tuple[float, float]:
    times, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < _LEAST_S:
        if isinstance(own := work(), tuple):
            return own[0], own[1] + _peak_mib() - before_mib
        times += 1
    return passed / times, _peak_mib() - before_mib


def _peak_mib() -> float:
    return _kib("/proc/self/status", "VmHWM") / 1024


def _workers_mib() -> float:
    """Return what the children of this process hold now, each for itself alone."""
    pids = [child.pid for child in multiprocessing.active_children()]
    return sum(_kib(f"/proc/{pid}/smaps_rollup", "Private_Dirty") for pid in pids) / 1024


def _kib(file: str, name: str) -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _processor_s() -> float:
    """Return the processor's seconds of this process, and of its children that have ended."""
    return sum(sum(getrusage(who)[:2]) for who in (RUSAGE_SELF, RUSAGE_CHILDREN))


def write_tar(
    file: Path, pictures: int, boxes: int = 4, first: int = 0, side_px: int = 96, phrases: int = 4
) -> None:
    """Write pictures with boxes as GRIT has them, no two alike.

    Args:
        file: The tar.
        pictures: How many.
        boxes: How many in each.
        first: Number of the first picture.
        side_px: Width and height of the pictures; many small ones show what grows with them.
        phrases: How many phrases the boxes have, in turn.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    rng, words = np.random.default_rng(first), [f"thing{i}" for i in range(phrases)]
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(first, first + pictures):
            coarse = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8))
            jpeg = io.BytesIO()
            coarse.resize((side_px, side_px), Image.Resampling.BICUBIC).save(jpeg, "JPEG")
            corners = np.sort(rng.uniform(0, 0.95, (boxes, 2, 2)), axis=1)
            corners[:, 1] += 0.05
            places = enumerate(corners.reshape(boxes, 4).tolist())
            chunks = [[7 * (i % phrases), 7 * (i % phrases) + 6, *box, 1.0] for i, box in places]
            record = json.dumps({"caption": " ".join(words), "noun_chunks": chunks}).encode()
            for suffix, data in (("jpg", jpeg.getvalue()), ("json", record)):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def draw(axis: str, data: Path, size: int) -> None:
    """Draw what there is `size` of, unless it is there: tars in `data.in`, shards in `data`."""
    for index in tqdm(range(_TARS.get(axis, size)), f"draw {size} {axis}", leave=False):
        tar = Path(f"{data}.in") / f"{index:05d}.tar"
        if tar.exists():
            continue
        if axis == "images":
            write_tar(tar, size)
        elif axis == "regions":  # each may repeat each other one
            write_tar(tar, _FEW, size, side_px=_LARGE_PX, phrases=1)
        else:
            write_tar(tar, 1, first=index)
        process_shard(ShardTask(str(tar), index), data, _MAKER)


def _making(filters: Filters, data: Path, size: int, tower: str) -> Work:
    maker, task = replace(_MAKER, filters=filters), ShardTask(f"{data}.in/00000.tar", 0)

    def work() -> None:
        with TemporaryDirectory(dir=data.parent) as output:
            process_shard(task, Path(output), maker)

    return work


def _stream(data: Path, regions: int, shuffle: int) -> Any:
    from alpha_clip import datasets, reader, sampling, streams, transforms

    shards = streams.ShardSet(tuple(reader.find_shards([str(data)])))
    augment, some = transforms.RegionAugment(224), sampling.Sampling(regions)
    return datasets.RegionShards([shards], augment, some, seed=0, shuffle=shuffle)


def _reading(axis: str, data: Path, size: int, tower: str) -> Work:
    images, regions = (size, 1) if axis == "images" else (_FEW, size)
    stream = _stream(data, regions, shuffle=1)
    return lambda: sum(len(sample.alphas) for sample in islice(stream, images))


def _loading(data: Path, size: int, tower: str) -> Work:
    from alpha_clip.batches import Collate
    from alpha_clip.loader import TrainingBatches

    stream = _stream(data, 2, shuffle=16)
    loader = TrainingBatches(stream, _BATCH, size, Collate(_model(tower).tokenizer))

    def work() -> tuple[float, float]:
        """Return processor seconds: workers without a core of their own only take turns."""
        start, batches = _processor_s(), iter(loader)
        images = sum(len(batch.rgb) for batch in islice(batches, size * _BATCHES))
        assert images == size * _BATCHES * _BATCH
        memory = _workers_mib()
        del batches  # ends the workers, whose time is known then
        return _processor_s() - start, memory

    return work


def _model(tower: str) -> Any:
    from alpha_clip.factory import create_model

    return create_model(tower)[0]


def _evaluating(axis: str, data: Path, size: int, tower: str) -> Work:
    from alpha_clip.evaluation.region_classification import RegionClassification

    model, controls = _model(tower), axis == "regions"
    return lambda: RegionClassification([str(data)], focus=["alpha"], controls=controls).run(model)


def _embedding(data: Path, size: int, tower: str) -> Work:
    from alpha_clip.embedding.embed import embed

    def work() -> None:
        with TemporaryDirectory(dir=data.parent) as output:
            embed(None, output, data=[str(data)], name=tower)

    return work


def _encoding(data: Path, size: int, tower: str) -> Work:
    import torch

    model = _model(tower)
    rgb = torch.randn(1, 3, model.image_size, model.image_size)
    alphas = torch.randn(1, size, 1, *rgb.shape[2:])
    return lambda: model.encode_regions(rgb, alphas)


def _finding(data: Path, size: int, tower: str) -> Work:
    from alpha_clip.data import RegionDataModule
    from alpha_clip.reader import find_shards
    from alpha_clip.streams import Reader, ShardSet

    def work() -> None:
        RegionDataModule([str(data)]).setup("fit")
        found = ShardSet(tuple(find_shards([str(data)])))
        assert len(Reader().shares(list(found.shards))) == found.samples == size

    return work


def _finding_to_embed(data: Path, size: int, tower: str) -> Work:
    from alpha_clip.embedding.sources import open_source

    return lambda: open_source([str(data)], None, None, None, max_images=size).parts()


def _verifying(data: Path, size: int, tower: str) -> Work:
    return lambda: verify_shards(data)


def _resuming(data: Path, size: int, tower: str) -> Work:
    return lambda: make_shards(find_inputs(f"{data}.in/*.tar"), data, _MAKER, LocalEngine(), 1)


def _doubled(first: int, last: int) -> tuple[int, ...]:
    return (first, *_doubled(2 * first, last)) if first <= last else ()


_PLAIN = partial(_making, Filters())
_DISTINCT = partial(_making, Filters(near_duplicate_bits=6, duplicate_mask_iou=0.9))
_DISTINCT_REGIONS = partial(_making, Filters(duplicate_mask_iou=0.9))
GROWTHS = {
    "making": Growth("images", _doubled(64, 2048), _PLAIN, torch=False),
    "making_distinct": Growth("images", _doubled(64, 2048), _DISTINCT, torch=False),
    "reading": Growth("images", _doubled(32, 1024), partial(_reading, "images")),
    "evaluating": Growth("images", _doubled(16, 512), partial(_evaluating, "images")),
    "embedding": Growth("images", _doubled(16, 512), _embedding),
    "encode_regions": Growth("regions", _doubled(4, 256), _encoding),
    "reading_regions": Growth("regions", _doubled(4, 128), partial(_reading, "regions")),
    "making_regions": Growth("regions", _doubled(4, 128), _DISTINCT_REGIONS, torch=False),
    "evaluating_regions": Growth("regions", _doubled(4, 128), partial(_evaluating, "regions")),
    "loading": Growth("workers", (1, 2, 4), _loading),
    "finding": Growth("shards", _doubled(16, 1024), _finding),
    "finding_to_embed": Growth("shards", _doubled(16, 1024), _finding_to_embed),
    "verifying": Growth("shards", _doubled(16, 1024), _verifying, torch=False),
    "resuming": Growth("shards", _doubled(16, 1024), _resuming, torch=False),
}
