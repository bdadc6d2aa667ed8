"""The first stage of ImageNet's road: everything in each picture, scored against its class."""

from __future__ import annotations

from copy import copy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from alpha_clip.regions import SampleError, encode_rle, read_image
from data_pipeline.candidates import Candidate, CandidateFile, CandidateSample
from data_pipeline.filters import Filters, box_around
from data_pipeline.plugin import identity
from data_pipeline.scorers.base import Scorer
from data_pipeline.segmenters.base import MaskPrediction, is_device_failure
from data_pipeline.shard_maker import ShardMaker, ShardTask, StageClock, check_rate, digest_of
from data_pipeline.shards import ShardManifest, ShardWriter
from data_pipeline.sources.base import Reject
from data_pipeline.sources.imagenet import ClassPicture, ImageNetSource

_OF_WORDS = (
    *("min_words", "max_words", "min_characters", "max_characters"),
    *("blocked_phrases", "blocked_words", "near_duplicate_bits", "min_box_iou"),
    "duplicate_mask_iou",
)
_HOPELESS = 32  # pictures that fail in a model, if none has worked before


class EverythingSegmenter(Protocol):
    """Makes masks of all that there is in a picture."""

    def place(self, worker: int) -> None:
        """Be told, before `load`, which of several workers on this machine this is."""

    def load(self) -> None:
        """Load weights; called once a process."""

    def settings(self) -> dict[str, Any]:
        """Return what decides the masks."""

    def segment_everything(self, rgb: NDArray[np.uint8]) -> list[MaskPrediction]:
        """Return the masks of an image `[H, W, 3]`."""


@dataclass(frozen=True)
class CandidateMaker(ShardMaker):
    """Makes `NNNNN.candidates.parquet` of a class's pictures.

    Attributes:
        source: Reads the pictures.
        segmenter: Finds everything in them.
        scorer: Compares each mask with the class.
        filters: Which pictures and masks are left out.
        max_reject_rate: Above this share of lost pictures a shard of some size is not committed.
    """

    source: ImageNetSource
    segmenter: EverythingSegmenter
    scorer: Scorer
    filters: Filters = field(default_factory=Filters)
    max_reject_rate: float = 0.9

    @cached_property
    def hash(self) -> str:
        """Digest of everything that decides the candidates."""
        parts: dict[str, Any] = {"filters": asdict(self.filters)}
        for name in ("source", "segmenter", "scorer"):
            parts[name] = identity(getattr(self, name))
        return digest_of(parts)

    def check(self) -> None:
        """Refuse filters of what is not there yet; see `ShardMaker.check`."""
        own, plain = vars(self.filters), vars(Filters())
        if wrong := [name for name in _OF_WORDS if own[name] != plain[name]]:
            raise ValueError(
                f"filters.{wrong[0]} has nothing to do here, where there are no words and boxes "
                "yet; leave it out: filters of a picture's sides and of masks are what counts"
            )

    def load(self) -> None:
        """Load both models' weights; see `ShardMaker.load`."""
        self.segmenter.load()
        self.scorer.load()

    def try_loading(self) -> None:
        """Load them, one after the other, and let go; see `ShardMaker.try_loading`."""
        copy(self.segmenter).load()
        copy(self.scorer).load()

    def place(self, worker: int) -> None:
        """Give both their device; see `ShardMaker.place`."""
        self.segmenter.place(worker)
        self.scorer.place(worker)

    def make(self, task: ShardTask, output: Path, clock: StageClock) -> ShardManifest:
        """Make one file of candidates; see `ShardMaker.make`."""
        writer = ShardWriter(output, task.index, CandidateFile)
        try:
            failures = tried = 0
            for item in self.source.read(task.path):
                if isinstance(item, Reject):
                    writer.reject(item)
                    continue
                try:
                    sample, rejects = self._sample(item, clock)
                    with clock.stage("write"):
                        writer.write(sample)
                    for reject in rejects:
                        writer.reject(reject)
                    tried += 1
                except SampleError as error:
                    writer.reject(Reject(item.key, None, error.reason, error.detail))
                    failed = error.reason.endswith("_failed")
                    failures, tried = failures + failed, tried + failed
                    if failures == tried >= _HOPELESS:
                        raise RuntimeError(f"it failed on every picture: {error}") from error
                clock.tick(1)
            check_rate(writer, self.max_reject_rate)
            with clock.stage("commit"):
                return writer.commit(self.hash, task.path)
        except BaseException:
            writer.abandon()
            raise

    def _sample(
        self, item: ClassPicture, clock: StageClock
    ) -> tuple[CandidateSample, list[Reject]]:
        """Find and score a picture's candidates; also return what was left out."""
        with clock.stage("decode"):
            rgb = read_image(item.data, self.source.max_image_px).rgb
        height, width = rgb.shape[:2]
        self.filters.check_image(width, height)
        with clock.stage("segment"):
            found = _reported("segmenter_failed", self.segmenter.segment_everything, rgb)
        sound, rejects = self._sound(item.key, found)
        if not sound:
            raise SampleError("no_mask", f"nothing in {item.id} makes a candidate")
        with clock.stage("score"):
            masks = [mask.mask for mask, _, _ in sound]
            scores = _reported("scorer_failed", self.scorer.score, rgb, masks, item.name)
        candidates = tuple(
            _candidate(item, number, made, box, area, score)
            for number, ((made, box, area), score) in enumerate(zip(sound, scores, strict=True))
        )
        return CandidateSample(item.key, candidates), rejects

    def _sound(
        self, key: str, found: list[MaskPrediction]
    ) -> tuple[list[tuple[MaskPrediction, _Box, int]], list[Reject]]:
        """Split masks, the largest first, into those that filters let pass and the others."""
        sound, rejects = [], []
        sized = [(int(np.count_nonzero(made.mask)), made) for made in found]
        for number, (area, made) in enumerate(sorted(sized, key=lambda pair: -pair[0])):
            box = box_around(made.mask) if area else (0.0, 0.0, 0.0, 0.0)
            try:
                self.filters.check_mask(made.mask, area, box, made.iou, made.stability)
                sound.append((made, box, area))
            except SampleError as error:
                rejects.append(Reject(key, number, error.reason, error.detail))
        return sound, rejects


_Box = tuple[float, float, float, float]


def _candidate(
    item: ClassPicture, number: int, made: MaskPrediction, box: _Box, area: int, score: float
) -> Candidate:
    height, width = made.mask.shape
    return Candidate(
        key=item.key,
        id=item.id,
        image=item.image,
        wnid=item.wnid,
        name=item.name,
        w=width,
        h=height,
        rid=number,
        box_xyxy_px=box,
        counts=encode_rle(made.mask)["counts"],
        area=area,
        sam_iou=None if made.iou is None else round(made.iou, 4),
        stability=None if made.stability is None else round(made.stability, 4),
        score=round(score, 6),
    )


def _reported(reason: str, model: Any, *arguments: Any) -> Any:
    """Run a model on one picture; its failure is that picture's, unless the device is broken."""
    try:
        return model(*arguments)
    except SampleError:
        raise
    except (RuntimeError, ValueError, ArithmeticError, LookupError) as error:
        if is_device_failure(error):
            raise
        raise SampleError(reason, f"{type(error).__name__}: {error}") from error
