"""An image with its regions, and how it lies in a shard: `KEY.jpg`, then `KEY.json`.

The same checks run when a sample is written and when it is read. What fails raises `SampleError`,
whose short reason is what pipelines and readers count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

from alpha_clip.jpegs import SampleError, jpeg_size
from alpha_clip.rle import rle_area, rle_areas

SCHEMA_VERSION = 1
PhraseKind = Literal["ref_exp", "noun_chunk", "class", "caption"]


@dataclass(frozen=True)
class RegionAnnotation:
    """A region of an image and the words for it.

    Attributes:
        rid: Number of the region in its source, unique in the image.
        text: The phrase, never empty.
        kind: Where the phrase comes from.
        span: Characters `[start, end)` of the caption that are the phrase, or `None`.
        box: `[x1, y1, x2, y2]` in pixels, inside the image.
        rle: The mask, as COCO's compressed RLE of the image's size.
        area: Pixels inside the mask, above 0.
        score: The source's confidence in the phrase's box.
        sam_iou: The segmenter's own estimate of its mask's IoU.
        stability: The segmenter's stability score.
        clip: CLIP score of the region against its text.
    """

    rid: int
    text: str
    kind: PhraseKind
    span: tuple[int, int] | None
    box: tuple[float, float, float, float]
    rle: Mapping[str, Any]
    area: int
    score: float | None = None
    sam_iou: float | None = None
    stability: float | None = None
    clip: float | None = None

    def check(self, sample: RegionSample, mask_px: int | None = None) -> None:
        """Raise `SampleError` if this region is not a sound one of `sample`.

        Args:
            sample: The sample.
            mask_px: Pixels of the mask, where it has been checked and measured already.
        """
        if not isinstance(self.text, str) or not self.text.strip():
            raise SampleError("empty_phrase", f"region {self.rid} has no text")
        if self.kind not in get_args(PhraseKind):
            raise SampleError("bad_kind", f"region {self.rid} has kind {self.kind!r}")
        if self.span is not None:
            start, end = self.span
            if sample.caption[start:end] != self.text or start < 0:
                raise SampleError("bad_span", f"caption[{start}:{end}] is not {self.text!r}")
        x1, y1, x2, y2 = self.box
        if not (0 <= x1 < x2 <= sample.w and 0 <= y1 < y2 <= sample.h):
            raise SampleError(
                "box_outside", f"box {list(self.box)} in an image of {sample.w} x {sample.h}"
            )
        if list(self.rle.get("size", ())) != [sample.h, sample.w]:
            raise SampleError(
                "rle_size",
                f"mask size {self.rle.get('size')} in an image of {sample.h}, {sample.w}",
            )
        try:
            area = rle_area(self.rle) if mask_px is None else mask_px
        except ValueError as error:
            raise SampleError("bad_rle", str(error)) from error
        if area != self.area or area == 0:
            raise SampleError("bad_area", f"area {self.area}, but the mask has {area} pixels")
        for name in ("score", "sam_iou", "stability", "clip"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise SampleError("bad_score", f"{name} is {value!r}")


@dataclass(frozen=True)
class RegionSample:
    """An image and its regions: one sample of a shard.

    Attributes:
        key: Digits, unique in the data set.
        jpeg: The stored raster: RGB or grey, upright, without EXIF.
        id: The sample's name in its source.
        source: The name of the source, such as `grit`.
        w: Width in pixels.
        h: Height in pixels.
        caption: The caption of the whole image; may be empty.
        regions: At least one.
        reencoded: Whether `jpeg` differs from the input's bytes.
    """

    key: str
    jpeg: bytes
    id: str
    source: str
    w: int
    h: int
    caption: str
    regions: tuple[RegionAnnotation, ...]
    reencoded: bool = False

    def check(self) -> None:
        """Raise `SampleError` if the sample or one of its regions is not sound."""
        if jpeg_size(self.jpeg) != (self.w, self.h):
            raise SampleError(
                "size_mismatch", f"stated {self.w} x {self.h}, stored {jpeg_size(self.jpeg)}"
            )
        self.check_record()

    def check_record(self) -> None:
        """Raise `SampleError` if anything but the picture is not sound."""
        if not (self.key.isascii() and self.key.isdigit()):
            raise SampleError("bad_key", f"a key must be digits, got {self.key!r}")
        if not isinstance(self.caption, str):
            raise SampleError("bad_schema", f"the caption is {self.caption!r}, not a text")
        if not self.regions:
            raise SampleError("no_regions", f"sample {self.key} has no region")
        if len({r.rid for r in self.regions}) != len(self.regions):
            raise SampleError("duplicate_rid", f"sample {self.key} uses a region number twice")
        for region, mask_px in zip(self.regions, self._masks_px(), strict=True):
            region.check(self, mask_px)
        try:
            "".join([self.caption, str(self.id), *(r.text for r in self.regions)]).encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON can carry, UTF-8 can't
            raise SampleError("bad_text", str(error)) from error

    def _masks_px(self) -> Sequence[int | None]:
        """Return the areas of all masks if all are sound; else each tells by itself what it is."""
        if all(isinstance(region.rle, Mapping) for region in self.regions):
            with suppress(ValueError):
                return rle_areas([region.rle for region in self.regions])
        return [None] * len(self.regions)


def pack_sample(sample: RegionSample) -> tuple[bytes, bytes]:
    """Return the checked bytes of `KEY.jpg` and `KEY.json`.

    Raises:
        SampleError: If the sample is not sound.
    """
    sample.check()
    return sample.jpeg, dump_record(to_record(sample))


def parse_sample(key: str, jpeg: bytes, text: bytes) -> RegionSample:
    """Read the two members of a sample, checking everything.

    Args:
        key: Name of the members without extension.
        jpeg: Bytes of `KEY.jpg`.
        text: Bytes of `KEY.json`.

    Raises:
        SampleError: If anything about it is not sound.
    """
    return from_record(key, load_record(text), jpeg)


def to_record(sample: RegionSample) -> dict[str, Any]:
    """Return all of a sample but its key and its picture, as plain JSON values."""
    regions = tuple(dict(vars(region)) for region in sample.regions)
    record: dict[str, Any] = {"v": SCHEMA_VERSION, **vars(sample), "regions": regions}
    del record["key"], record["jpeg"]
    if not record["reencoded"]:
        del record["reencoded"]
    return record


def from_record(key: str, record: dict[str, Any], jpeg: bytes | None) -> RegionSample:
    """Undo `to_record`, checking everything; without `jpeg`, everything but the picture.

    Raises:
        SampleError: If anything about it is not sound.
    """
    if record.pop("v", None) != SCHEMA_VERSION:
        raise SampleError("bad_schema", f"expected an object with v = {SCHEMA_VERSION}")
    try:
        regions = tuple(
            RegionAnnotation(
                **{
                    **region,
                    "box": tuple(float(v) for v in region["box"]),
                    "span": None if region["span"] is None else _span(region["span"]),
                }
            )
            for region in record.pop("regions")
        )
        sample = RegionSample(key=key, jpeg=jpeg or b"", regions=regions, **record)
        sample.check_record() if jpeg is None else sample.check()
        return sample
    except SampleError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SampleError("bad_schema", f"{type(error).__name__}: {error}") from error


def dump_record(record: dict[str, Any]) -> bytes:
    """Return the one way to write a record: sorted keys, no spaces, UTF-8."""
    return json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def load_record(text: bytes) -> dict[str, Any]:
    """Read an object that `dump_record` wrote.

    Raises:
        SampleError: If it is no JSON object.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", str(error)) from error
    if not isinstance(record, dict):
        raise SampleError("bad_schema", f"expected an object with v = {SCHEMA_VERSION}")
    return record


def _span(span: Any) -> tuple[int, int]:
    start, end = span
    if type(start) is not int or type(end) is not int:
        raise SampleError("bad_span", f"expected two whole numbers, got {span!r}")
    return start, end
