"""One input shard in, one output shard out: the step that every engine runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from alpha_clip.regions import (
    RegionSample,
    SampleError,
    StoredImage,
    read_image,
)
from data_pipeline.annotation import annotate
from data_pipeline.filters import Filters
from data_pipeline.near_duplicates import NearDuplicates
from data_pipeline.plugin import identity
from data_pipeline.segmenters.base import Segmenter
from data_pipeline.shard_files import SHARD_FILES, Layout
from data_pipeline.shard_maker import ShardMaker, ShardTask, StageClock, check_rate, digest_of
from data_pipeline.shards import ShardManifest, ShardWriter
from data_pipeline.sources.base import BoxedPhrase, Reject, Source, SourceSample

_HOPELESS = 32  # pictures that fail in the segmenter, if none has worked before


@dataclass(frozen=True)
class PipelineConfig(ShardMaker):
    """What turns a shard of boxes with phrases into one of regions; see `ShardMaker`.

    Attributes:
        source: Reads the input.
        segmenter: Makes a mask for each box.
        filters: What is left out.
        layout: Whether pictures are stored with their masks.
        max_reject_rate: Above this share of lost samples a shard of some size is not committed:
            something is wrong with it, or with the settings.
    """

    source: Source
    segmenter: Segmenter
    filters: Filters = field(default_factory=Filters)
    layout: Layout = "tar"
    max_reject_rate: float = 0.9

    @cached_property
    def hash(self) -> str:
        """Digest of everything that decides the output's content."""
        parts: dict[str, object] = {"filters": asdict(self.filters), "layout": self.layout}
        parts |= {"source": identity(self.source), "segmenter": identity(self.segmenter)}
        return digest_of(parts)

    def check(self) -> None:
        """Refuse a sidecar to what does not lie in tars; see `ShardMaker.check`."""
        if self.layout == "sidecar" and not self.source.tars:
            raise ValueError(
                "layout: sidecar leaves the pictures in the input's tars, but "
                f"{type(self.source).__name__} reads none; take layout: tar"
            )

    def load(self) -> None:
        """Load the segmenter's weights; see `ShardMaker.load`."""
        self.segmenter.load()

    def try_loading(self) -> None:
        """Load them, and let go; see `ShardMaker.try_loading`."""
        copy(self.segmenter).load()

    def place(self, worker: int) -> None:
        """Give the segmenter its device; see `ShardMaker.place`."""
        self.segmenter.place(worker)

    def make(self, task: ShardTask, output: Path, clock: StageClock) -> ShardManifest:
        """Make a shard; see `process_shard`."""
        return process_shard(task, output, self, clock)


@dataclass
class _Item:
    """A sample on its way: what was rejected of it and, unless all was, the rest."""

    rejects: list[Reject]
    sample: SourceSample | None = None
    image: StoredImage | None = None


def process_shard(
    task: ShardTask, output: Path, config: PipelineConfig, clock: StageClock | None = None
) -> ShardManifest:
    """Make one output shard.

    Args:
        task: Which input, and its number.
        output: The data set's folder.
        config: How.
        clock: Told how long each stage took, and how far it is.

    Returns:
        The manifest that was committed.

    Raises:
        BadShardError: If the input can't be read at all.
        StorageError: If the input's storage fails.
        RuntimeError: If every picture fails in the segmenter, or too many samples are rejected.
        OSError: If the output can't be written. Whatever is raised, nothing is committed.
    """
    clock = clock or StageClock()
    writer = ShardWriter(output, task.index, SHARD_FILES[config.layout])
    try:
        size = config.segmenter.batch_size()
        items = _prepare_all(config.source.read(task.path), config, clock)
        batches = iter(lambda: list(islice(items, size)), [])
        failures: list[SampleError] = []
        tried = 0
        for batch in _ahead(batches) if size > 1 else batches:
            failures += _finish(batch, writer, config, clock)
            tried += sum(item.sample is not None for item in batch)
            clock.tick(len(batch))
            if len(failures) == tried >= _HOPELESS:
                break
        if len(failures) == tried >= 2:
            raise RuntimeError(f"the segmenter failed on every picture: {failures[-1]}")
        check_rate(writer, config.max_reject_rate)
        with clock.stage("commit"):
            return writer.commit(config.hash, task.path)
    except BaseException:
        writer.abandon()
        raise


def _prepare_all(
    items: Iterator[SourceSample | Reject], config: PipelineConfig, clock: StageClock
) -> Iterator[_Item]:
    seen = NearDuplicates(config.filters.near_duplicate_bits)
    while True:
        with clock.stage("read"):
            item = next(items, None)
        if item is None:
            return
        if isinstance(item, Reject):
            yield _Item([item])
            continue
        with clock.stage("decode"):
            prepared = _prepare(item, config, seen)
        yield prepared


def _prepare(sample: SourceSample, config: PipelineConfig, seen: NearDuplicates) -> _Item:
    """Decode a picture and drop the phrases that filters refuse."""
    rejects, phrases = list(sample.rejects), list[BoxedPhrase]()
    try:
        config.filters.check_image(sample.width, sample.height)
        for phrase in sample.phrases:
            try:
                config.filters.check_phrase(phrase.text)
                phrases.append(phrase)
            except SampleError as error:
                rejects.append(Reject(sample.key, phrase.rid, error.reason, error.detail))
        if not phrases:
            raise SampleError("no_regions", f"no phrase of {sample.key} is left")
        image = read_image(sample.image, config.source.max_image_px)
        seen.check(image.rgb)
    except SampleError as error:
        lost = len(sample.phrases) + len(sample.rejects) - len(rejects)
        rejects.append(Reject(sample.key, None, error.reason, error.detail, lost))
        return _Item(rejects)
    return _Item(rejects, replace(sample, phrases=tuple(phrases)), image)


def _ahead(batches: Iterator[list[_Item]]) -> Iterator[list[_Item]]:
    """Prepare the next batch in a thread while the caller, on a GPU, works on this one."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def _finish(
    batch: list[_Item], writer: ShardWriter[RegionSample], config: PipelineConfig, clock: StageClock
) -> list[SampleError]:
    """Segment and write a batch, in order; returns why the segmenter failed, if it did."""
    ready = [(item.sample, item.image) for item in batch if item.sample and item.image]
    boxes = [list(dict.fromkeys(p.box_xyxy_px for p in sample.phrases)) for sample, _ in ready]
    with clock.stage("segment"):
        results = config.segmenter.segment_batch(
            [image.rgb for _, image in ready], [np.array(b, np.float64) for b in boxes]
        )
    predictions = iter(zip(boxes, results, strict=True))
    failures = []
    for item in batch:
        for reject in item.rejects:
            writer.reject(reject)
        if item.sample is None or item.image is None:
            continue
        own_boxes, result = next(predictions)
        if isinstance(result, SampleError):
            failures.append(result)
            lost = len(item.sample.phrases)
            writer.reject(Reject(item.sample.key, None, result.reason, result.detail, lost))
            continue
        with clock.stage("encode"):
            masks = dict(zip(own_boxes, result, strict=True))
            sample, rejects = annotate(
                item.sample, item.image, masks, config.filters, config.source.name
            )
        with clock.stage("write"):
            for reject in rejects:
                writer.reject(reject)
            try:
                writer.write(sample, item.sample.image)
            except SampleError as error:
                lost = len(sample.regions)
                writer.reject(Reject(sample.key, None, error.reason, error.detail, lost))
    return failures
