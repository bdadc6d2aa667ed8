"""GRIT (Kosmos-2's grounded image-text pairs) as img2dataset stores it: `KEY.jpg/.txt/.json` tars.

`ref_exps` and `noun_chunks` are lists of `[start, end, x1, y1, x2, y2, score]`: the phrase's
characters in the caption, then its box as shares of width and height.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tarfile import EOFHeaderError, HeaderError, ReadError  # type: ignore[attr-defined]
from typing import Any, ClassVar, Literal, cast

from alpha_clip.regions import MAX_IMAGE_PX, PhraseKind, SampleError
from data_pipeline.images import StoredImage, read_image
from data_pipeline.sources.base import BadShardError, BoxedPhrase, Reject, Source, SourceSample

_IMAGES = ("jpg", "jpeg", "png", "webp")
_EDGE = 0.01  # boxes that overshoot by less, as rounding makes them, are cut to the image


@dataclass(frozen=True)
class GritSource(Source):
    """Reads GRIT tars.

    Attributes:
        phrases: Which phrases to take; one that both lists hold with the same box counts once.
        min_score: Phrases whose boxes GRIT trusts less are rejected.
        max_image_px: Larger pictures are rejected by their header, before memory is spent.
    """

    name: ClassVar[str] = "grit"  # type: ignore[misc]
    phrases: Literal["ref_exps", "noun_chunks", "both"] = "ref_exps"
    min_score: float = 0.0
    max_image_px: int = MAX_IMAGE_PX

    def read(self, shard: Path) -> Iterator[SourceSample | Reject]:
        """Yield every sample of a tar; see `Source.read`."""
        seen: set[str] = set()
        for key, members in _group(shard):
            if key is None:
                yield Reject("", None, "truncated_tar", f"{shard} ends early or is damaged")
                continue
            record: dict[str, Any] = {}
            try:
                record = _record(key, members)
                _check(key, record, seen)
                seen.add(key)
                image = read_image(_image_bytes(members), self.max_image_px)
                yield self._sample(key, record, image)
            except SampleError as error:
                lost = len(self._tuples(record))
                yield Reject(key, None, error.reason, str(error), lost)

    def _tuples(self, record: dict[str, Any]) -> list[tuple[PhraseKind, Any]]:
        """Return the chosen phrases as they stand in the record, without repetitions."""
        chosen: list[tuple[PhraseKind, Any]] = []
        seen: set[str] = set()
        for name, kind in (("ref_exps", "ref_exp"), ("noun_chunks", "noun_chunk")):
            entries = record.get(name) if self.phrases in (name, "both") else None
            for entry in entries if isinstance(entries, list) else ():
                if (text := repr(entry)) not in seen:
                    seen.add(text)
                    chosen.append((cast(PhraseKind, kind), entry))
        return chosen

    def _sample(self, key: str, record: dict[str, Any], image: StoredImage) -> SourceSample:
        caption = record["caption"]
        height, width = image.rgb.shape[:2]
        phrases: list[BoxedPhrase] = []
        rejects: list[Reject] = []
        for rid, (kind, entry) in enumerate(self._tuples(record)):
            try:
                phrases.append(self._phrase(rid, kind, entry, caption, (height, width)))
            except SampleError as error:
                rejects.append(Reject(key, rid, error.reason, str(error)))
        if not phrases and not rejects:
            raise SampleError("no_phrases", f"no {self.phrases} in the sample's json")
        name = str(record.get("id", key))
        return SourceSample(key, name, caption, image, tuple(phrases), tuple(rejects))

    def _phrase(
        self, rid: int, kind: PhraseKind, entry: Any, caption: str, size: tuple[int, int]
    ) -> BoxedPhrase:
        if not isinstance(entry, list) or len(entry) < 6 or not all(map(_is_number, entry)):
            raise SampleError(
                "bad_phrase", f"expected [start, end, x1, y1, x2, y2, score]: {entry}"
            )
        start, end, x1, y1, x2, y2 = entry[:6]
        score = float(entry[6]) if len(entry) > 6 else None
        if not 0 <= start <= end <= len(caption) or start % 1 or end % 1:
            raise SampleError("bad_span", f"[{start}, {end}] in {len(caption)} characters")
        text = caption[int(start) : int(end)]
        if not text.strip():
            raise SampleError("empty_phrase", f"caption[{start}:{end}] is blank")
        if x2 <= x1 or y2 <= y1:
            raise SampleError("bad_box", f"{[x1, y1, x2, y2]} has no area")
        if min(x1, y1) < -_EDGE or max(x2, y2) > 1 + _EDGE:
            raise SampleError("box_outside", f"{[x1, y1, x2, y2]} leaves the image")
        if score is not None and score < self.min_score:
            raise SampleError("low_score", f"{score} < {self.min_score}")
        height, width = size
        box = [min(max(v, 0.0), 1.0) for v in (x1, y1, x2, y2)]
        box = [round(v * s, 2) for v, s in zip(box, (width, height, width, height), strict=True)]
        if box[2] <= box[0] or box[3] <= box[1]:
            raise SampleError("bad_box", f"{[x1, y1, x2, y2]} has no area in {width} x {height} px")
        lead = len(text) - len(text.lstrip())
        text = text.strip()
        span = (int(start) + lead, int(start) + lead + len(text))
        return BoxedPhrase(rid, text, kind, span, (box[0], box[1], box[2], box[3]), score)


class _StrictTarInfo(tarfile.TarInfo):
    """Raises where a tar stops without its end mark, which `tarfile` takes for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:  # the end mark
            raise
        except HeaderError as error:
            raise ReadError(f"no sound header: {error}") from error


def _group(shard: Path) -> Iterator[tuple[str | None, dict[str, bytes]]]:
    """Yield neighbouring members with one key, as `key, {extension: bytes}`.

    The key is `None`, once and last, where the tar ends early; an unfinished sample goes with it.
    """
    key, members = "", dict[str, bytes]()
    try:
        with tarfile.open(shard, "r|*", tarinfo=_StrictTarInfo) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                path = PurePosixPath(member.name)
                extension = path.suffix[1:].lower()
                if path.stem != key or extension in members:
                    if members:
                        yield key, members
                    key, members = path.stem, {}
                file = tar.extractfile(member)
                data = file.read() if file else b""
                if len(data) != member.size:
                    raise ReadError("unexpected end of data")
                members[extension] = data
    except (tarfile.TarError, OSError, EOFError) as error:
        if not key:
            raise BadShardError(f"{shard} is no readable tar: {error}") from error
        if "json" in members and not members.keys().isdisjoint(_IMAGES):
            yield key, members
        yield None, {}
        return
    if members:
        yield key, members


def _record(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        raise SampleError("missing_json", f"{key} has only {sorted(members)}")
    try:
        record = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", str(error)) from error
    if not isinstance(record, dict):
        raise SampleError("bad_json", f"expected an object, got {type(record).__name__}")
    return record


def _check(key: str, record: dict[str, Any], seen: set[str]) -> None:
    if not (key.isascii() and key.isdigit()):
        raise SampleError("bad_key", f"a key must be digits, got {key!r}")
    if key in seen:
        raise SampleError("duplicate_key", f"{key} was there before")
    if not isinstance(record.get("caption"), str):
        raise SampleError("missing_caption", f"{key}.json has no text under 'caption'")


def _image_bytes(members: dict[str, bytes]) -> bytes:
    for extension in _IMAGES:
        if extension in members:
            return members[extension]
    raise SampleError("missing_image", f"the sample has only {sorted(members)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e12  # false for NaN, too
