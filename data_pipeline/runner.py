"""One input shard in, one output shard out: the step that every engine runs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from alpha_clip.regions import RegionAnnotation, RegionSample, SampleError, encode_rle
from data_pipeline.segmenters.base import Segmenter
from data_pipeline.shards import ShardManifest, ShardWriter, read_manifests
from data_pipeline.sources.base import BadShardError, Reject, Source, SourceSample


@dataclass(frozen=True)
class PipelineConfig:
    """What turns an input shard into an output shard; the same config gives the same bytes.

    Attributes:
        source: Reads the input.
        segmenter: Makes a mask for each box.
    """

    source: Source
    segmenter: Segmenter

    @property
    def hash(self) -> str:
        """Digest of everything that decides the output's content."""
        parts = {
            name: {"class": f"{type(part).__module__}.{type(part).__qualname__}", **_public(part)}
            for name, part in (("source", self.source), ("segmenter", self.segmenter))
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ShardTask:
    """One input shard and the number of the shard to make of it."""

    path: Path
    index: int


@dataclass
class RunSummary:
    """What a run did, added up over shards.

    Attributes:
        shards: Shards that are committed, those of earlier runs included.
        samples: Samples in them.
        regions: Regions in them.
        rejects: Reason -> how often.
        bad_shards: Input shard -> why it could not be read; nothing of it was committed.
    """

    shards: int = 0
    samples: int = 0
    regions: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    bad_shards: dict[str, str] = field(default_factory=dict)

    def add(self, manifest: ShardManifest) -> None:
        """Count a committed shard."""
        self.shards += 1
        self.samples += manifest.samples
        self.regions += manifest.regions
        self.rejects.update(manifest.rejects)

    def __str__(self) -> str:
        lines = [f"{self.shards} shards: {self.samples} samples, {self.regions} regions"]
        for reason, count in sorted(self.rejects.items()):
            lines.append(f"  skipped {count:>8} {reason}")
        for path, reason in sorted(self.bad_shards.items()):
            lines.append(f"  skipped the whole of {path}: {reason}")
        return "\n".join(lines)


def process_shard(task: ShardTask, output: Path, config: PipelineConfig) -> ShardManifest:
    """Make one output shard.

    Args:
        task: Which input, and its number.
        output: The data set's folder.
        config: How.

    Returns:
        The manifest that was committed.

    Raises:
        BadShardError: If the input can't be read at all; nothing is committed.
    """
    writer = ShardWriter(output, task.index)
    try:
        for item in config.source.read(task.path):
            if isinstance(item, Reject):
                writer.reject(item)
                continue
            for reject in item.rejects:
                writer.reject(reject)
            _write_sample(writer, item, config)
        return writer.commit(config.hash, str(task.path))
    except BaseException:
        writer.abandon()
        raise


def _write_sample(writer: ShardWriter, item: SourceSample, config: PipelineConfig) -> None:
    annotations = []
    boxes = np.array([p.box_xyxy_px for p in item.phrases], np.float64).reshape(-1, 4)
    predictions = config.segmenter.segment(item.image.rgb, boxes) if item.phrases else []
    for phrase, prediction in zip(item.phrases, predictions, strict=True):
        area = int(prediction.mask.sum())
        if area == 0:
            writer.reject(Reject(item.key, phrase.rid, "empty_mask", phrase.text))
            continue
        annotations.append(
            RegionAnnotation(
                rid=phrase.rid,
                text=phrase.text,
                kind=phrase.kind,
                span=phrase.span,
                box=phrase.box_xyxy_px,
                rle=encode_rle(prediction.mask),
                area=area,
                score=phrase.score,
                sam_iou=prediction.iou,
                stability=prediction.stability,
            )
        )
    height, width = item.image.rgb.shape[:2]
    sample = RegionSample(
        key=item.key,
        jpeg=item.image.jpeg,
        id=item.id,
        source=config.source.name,
        w=width,
        h=height,
        caption=item.caption,
        regions=tuple(annotations),
        reencoded=item.image.reencoded,
    )
    try:
        writer.write(sample)
    except SampleError as error:
        writer.reject(Reject(item.key, None, error.reason, str(error), len(annotations)))


def plan(inputs: list[Path], output: Path, config: PipelineConfig) -> list[ShardTask]:
    """Return the shards that are still to be made.

    Args:
        inputs: Input shards; their order numbers the output.
        output: The data set's folder.
        config: How shards are made.

    Raises:
        ValueError: If the folder holds shards of other settings or of other inputs.
    """
    done = read_manifests(output) if output.exists() else {}
    if surplus := [stem for stem in done if int(stem) >= len(inputs)]:
        raise ValueError(
            f"{output} holds shard {surplus[0]}, but {len(inputs)} inputs were given; keep the "
            "list of inputs as it was, or write to another folder"
        )
    tasks = []
    for index, path in enumerate(inputs):
        manifest = done.get(f"{index:05d}")
        if manifest is None:
            tasks.append(ShardTask(path, index))
        elif manifest.config_hash != config.hash:
            raise ValueError(
                f"{output} holds shards made with other settings (config {manifest.config_hash}, "
                f"now {config.hash}); write to another folder, or delete this one"
            )
        elif manifest.input["path"] != str(path):
            raise ValueError(
                f"{output} made shard {index:05d} of {manifest.input['path']}, now it would be "
                f"{path}; keep the list of inputs as it was, or write to another folder"
            )
    return tasks


def _public(part: Any) -> dict[str, Any]:
    return {f.name: getattr(part, f.name) for f in fields(part) if not f.name.startswith("_")}


__all__ = ["BadShardError", "PipelineConfig", "RunSummary", "ShardTask", "plan", "process_shard"]
