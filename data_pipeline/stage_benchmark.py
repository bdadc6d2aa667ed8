"""How fast each stage is on this machine, and what that means for a whole data set."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.runner import PipelineConfig, process_shard
from data_pipeline.shard_maker import ShardTask, StageClock
from data_pipeline.sources.base import (
    BadShardError,
    Reject,
    Source,
    SourceSample,
    StorageError,
)
from data_pipeline.sources.scene_drawing import SceneConfig
from data_pipeline.sources.scenes import write_scenes
from data_pipeline.sources.storage import find_inputs

STAGES = ("read", "decode", "segment", "encode", "write", "commit")
_DRAWN = 40  # drawing takes longer than all that is timed
_WARM_UP = 4  # pictures before the clock starts: first calls load, compile and allocate


@dataclass(frozen=True)
class _First(Source):
    """The first samples of several shards, as one."""

    source: Source
    paths: tuple[str, ...]
    count: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.source.name

    @property
    def max_image_px(self) -> int:  # type: ignore[override]
        return self.source.max_image_px

    def read(self, shard: str) -> Iterator[SourceSample | Reject]:
        samples = (item for path in self.paths for item in self.source.read(path))
        return islice(samples, self.count)

    def settings(self) -> dict[str, Any]:
        return self.source.settings()


@dataclass(frozen=True)
class StageReport:
    """Seconds of each stage, and what they come to.

    Attributes:
        images: Samples that were timed, rejected ones included.
        regions: Masks that were made of them.
        kept: Samples that were written.
        seconds: Stage -> seconds in all.
        wall_s: Seconds from the first to the last.
        bytes: Size of what was written.
        project_images: Samples to project for.
    """

    images: int
    regions: int
    kept: int
    seconds: dict[str, float]
    wall_s: float
    bytes: int
    project_images: int

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        rows = [(name, self.seconds.get(name, 0.0)) for name in STAGES]
        rows += [("all", total), ("all but segment", total - self.seconds.get("segment", 0.0))]
        lines = [
            f"{self.images} pictures, {self.kept} kept with {self.regions} regions; one process",
            f"{'stage':<16}{'ms a picture':>13}{'pictures/s':>12}{'share':>7}",
        ]
        for name, seconds in rows:
            each = seconds / self.images
            speed = f"{1 / each:12,.1f}" if each else f"{'-':>12}"
            lines.append(f"{name:<16}{1000 * each:>13.2f}{speed}{seconds / total:>7.0%}")
        hours = self.project_images * self.wall_s / self.images / 3600
        gigabytes = self.project_images * self.bytes / self.images / 1e9
        lines.append(
            f"{self.project_images:,} such pictures: {hours:,.1f} hours on one worker, "
            f"{hours / 8:,.1f} on eight; {gigabytes:,.1f} GB"
        )
        return "\n".join(lines)


def benchmark_stages(
    inputs: list[str] | None, config: PipelineConfig, images: int, project_images: int
) -> StageReport:
    """Time the stages on the first pictures of the inputs, in this process.

    Args:
        inputs: Input shards; `None` draws pictures of about 640 x 480 px with four phrases each.
        config: What to do with them.
        images: How many samples to time.
        project_images: How many samples to project for.

    Raises:
        ValueError: If a number is below 1, weights are missing, or there is no sample.
    """
    if images < 1 or project_images < 1:
        raise ValueError(
            f"benchmark_images and project_images must be at least 1, got {images} and "
            f"{project_images}"
        )
    config.segmenter.load()
    with tempfile.TemporaryDirectory() as folder:
        inputs = inputs or _draw(Path(folder) / "drawn", images)
        for name, count in (("warm", _WARM_UP), ("timed", images)):
            some = _First(config.source, tuple(inputs), count)
            timed = replace(config, source=some, max_reject_rate=1.0)
            clock, start = StageClock(), time.perf_counter()
            try:
                task = ShardTask(inputs[0], 0)
                manifest = process_shard(task, Path(folder) / name, timed, clock)
            except (BadShardError, StorageError) as error:
                raise ValueError(str(error)) from error
            wall = time.perf_counter() - start
    if not manifest.input["samples"]:
        raise ValueError(f"{inputs[0]} and what follows hold no sample to time")
    return StageReport(
        images=manifest.input["samples"],
        regions=manifest.regions,
        kept=manifest.samples,
        seconds=clock.seconds,
        wall_s=wall,
        bytes=manifest.bytes,
        project_images=project_images,
    )


def _draw(folder: Path, images: int) -> list[str]:
    """Draw some pictures of about 640 x 480 px (a side is 512 to 640 px long), to be repeated."""
    drawn = min(images, _DRAWN)
    config = SceneConfig(drawn, size_px=640, objects_min=4, objects_max=4, shard_size=drawn)
    write_scenes(str(folder), config, workers=1)
    return find_inputs(f"{folder}/*.tar") * -(-images // drawn)
