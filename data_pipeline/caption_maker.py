"""The last stage of ImageNet's road: words for the masks that are left, and the shards."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from alpha_clip.regions import (
    RegionAnnotation,
    RegionSample,
    SampleError,
    StoredImage,
    decode_rle,
    read_image,
)
from data_pipeline.caption_text import NAME_IF_MISSING, merge, strip_background, with_article
from data_pipeline.captioners.base import Captioner
from data_pipeline.captioners.template import TemplateCaptioner
from data_pipeline.foreground import Background, Foreground, cut_out
from data_pipeline.plugin import identity
from data_pipeline.shard_maker import ShardMaker, ShardTask, StageClock, check_rate, digest_of
from data_pipeline.shards import ShardManifest, ShardWriter
from data_pipeline.sources.base import Reject
from data_pipeline.sources.masked import MaskedPicture, MaskedRegion, MaskedSource

_COLOURS: dict[object, tuple[str, ...]] = {
    "white": ("white",),
    "clip_mean": ("grey", "brown", "beige"),
}


@dataclass(frozen=True)
class Words:
    """How captions are made of what a captioner says.

    Attributes:
        background: What the object is put on to be described; the paper took white.
        cut_out_px: Side of the picture that the captioner gets.
        merge: `name_if_missing` adds the class name to captions that lack it; or a format with
            `{caption}`, `{class_name}` or `{phrase}`, the name with its article.
        whole_picture: Caption of the whole picture, with `{}` for the name with its article; empty
            for none.
    """

    background: Background = "white"
    cut_out_px: int = 384
    merge: str = NAME_IF_MISSING
    whole_picture: str = "a photo of {}"

    def __post_init__(self) -> None:
        merge("a thing", "thing", self.merge)  # refuses an unknown style
        if self.whole_picture and self.whole_picture.count("{}") != 1:
            raise ValueError(
                f"whole_picture must have one {{}} for the class name, got {self.whole_picture!r}"
            )
        cut_out(np.zeros((2, 2, 3), np.uint8), np.ones((2, 2), bool), self.background)

    def text(self, said: str, name: str) -> str:
        """Return a region's caption: the background stripped, the name merged in."""
        if colours := _COLOURS.get(self.background):
            said = strip_background(said, colours)
        return merge(said, name, self.merge)


@dataclass(frozen=True)
class CaptionMaker(ShardMaker):
    """Makes region–text shards of pictures with masks.

    Attributes:
        source: Reads them.
        captioner: Describes what has no caption yet.
        words: How captions are made of what it says.
        max_reject_rate: Above this share of lost pictures a shard of some size is not committed.
    """

    source: MaskedSource
    captioner: Captioner = field(default_factory=TemplateCaptioner)
    words: Words = field(default_factory=Words)
    max_reject_rate: float = 0.9

    @cached_property
    def hash(self) -> str:
        """Digest of everything that decides the shards."""
        parts = {"source": self.source.settings(), "words": vars(self.words)}
        return digest_of({**parts, "captioner": identity(self.captioner)})

    def load(self) -> None:
        """Load the captioner's weights; see `ShardMaker.load`."""
        self.captioner.load()

    def try_loading(self) -> None:
        """Load them, and let go; see `ShardMaker.try_loading`."""
        copy(self.captioner).load()

    def place(self, worker: int) -> None:
        """Give the captioner its device; see `ShardMaker.place`."""
        self.captioner.place(worker)

    def make(self, task: ShardTask, output: Path, clock: StageClock) -> ShardManifest:
        """Make one shard; see `ShardMaker.make`."""
        writer: ShardWriter[RegionSample] = ShardWriter(output, task.index)
        try:
            batch: list[_Item] = []
            waiting = 0
            for item in self._prepared(task, writer, clock):
                batch.append(item)
                waiting += len(item.cuts)
                if waiting >= self.captioner.batch_size():
                    self._finish(batch, writer, clock)
                    batch, waiting = [], 0
            self._finish(batch, writer, clock)
            check_rate(writer, self.max_reject_rate)
            with clock.stage("commit"):
                return writer.commit(self.hash, task.path)
        except BaseException:
            writer.abandon()
            raise

    def _prepared(
        self, task: ShardTask, writer: ShardWriter[RegionSample], clock: StageClock
    ) -> Iterator[_Item]:
        """Decode pictures and cut out what is to be described."""
        for item in self.source.read(task.path, task.index):
            if isinstance(item, Reject):
                writer.reject(item)
                continue
            with clock.stage("decode"):
                try:
                    image = read_image(item.data, self.source.max_image_px)
                    cuts = [
                        (region, self._cut(image, region))
                        for region in item.regions
                        if region.caption is None
                    ]
                except SampleError as error:
                    lost = len(item.regions)
                    writer.reject(Reject(item.key, None, error.reason, error.detail, lost))
                    continue
            yield _Item(item, image, cuts)

    def _cut(self, image: StoredImage, region: MaskedRegion) -> Foreground:
        try:
            mask = decode_rle(region.rle)
        except ValueError as error:
            raise SampleError("bad_rle", str(error)) from error
        if mask.shape != image.rgb.shape[:2]:
            raise SampleError(
                "size_mismatch", f"a mask of {mask.shape} on a picture of {image.rgb.shape[:2]}"
            )
        return cut_out(image.rgb, mask, self.words.background, self.words.cut_out_px)

    def _finish(
        self, batch: list[_Item], writer: ShardWriter[RegionSample], clock: StageClock
    ) -> None:
        """Describe and write a batch, in order."""
        cuts = [cut for item in batch for cut in item.cuts]
        with clock.stage("caption"):
            size = self.captioner.batch_size()
            said: list[str | SampleError] = []
            for start in range(0, len(cuts), size):
                some = cuts[start : start + size]
                said += self.captioner.caption_batch(
                    [shown for _, shown in some], [region.name for region, _ in some]
                )
        answers = iter(said)
        for item in batch:
            captions = {region.rid: next(answers) for region, _ in item.cuts}
            with clock.stage("write"):
                self._write(item, captions, writer)
        clock.tick(len(batch))

    def _write(
        self,
        item: _Item,
        said: dict[int, str | SampleError],
        writer: ShardWriter[RegionSample],
    ) -> None:
        picture, regions, rejects = item.picture, [], list[Reject]()
        for region in picture.regions:
            answer = said.get(region.rid, region.caption)
            if isinstance(answer, str):
                regions.append(_annotation(region, self.words.text(answer, region.name)))
            elif answer is not None:
                rejects.append(Reject(picture.key, region.rid, answer.reason, answer.detail))
        whole = self.words.whole_picture
        sample = RegionSample(
            key=picture.key,
            jpeg=item.image.jpeg,
            id=picture.id,
            source=self.source.name,
            w=item.image.rgb.shape[1],
            h=item.image.rgb.shape[0],
            caption=whole.format(with_article(picture.name)) if whole else "",
            regions=tuple(regions),
            reencoded=item.image.reencoded,
        )
        for reject in rejects:
            writer.reject(reject)
        try:
            writer.write(sample, picture.data)
        except SampleError as error:
            writer.reject(Reject(picture.key, None, error.reason, error.detail, len(regions)))


@dataclass
class _Item:
    """A picture on its way."""

    picture: MaskedPicture
    image: StoredImage
    cuts: list[tuple[MaskedRegion, Foreground]]


def _annotation(region: MaskedRegion, text: str) -> RegionAnnotation:
    return RegionAnnotation(
        rid=region.rid,
        text=text,
        kind="caption",
        span=None,
        box=region.box_xyxy_px,
        rle=region.rle,
        area=region.area,
        score=region.score,
        sam_iou=region.sam_iou,
        stability=region.stability,
    )
