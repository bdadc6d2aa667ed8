"""What a GRIT record says (Kosmos-2's grounded image-text pairs): a caption, phrases, boxes.

`ref_exps` and `noun_chunks` are lists of `[start, end, x1, y1, x2, y2, score]`: the phrase's
characters in the caption, then its box as shares of width and height.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from alpha_clip.regions import MAX_IMAGE_PX, PhraseKind, SampleError, upright_size
from data_pipeline.sources.base import BoxedPhrase, Reject, Source, SourceSample

ORIGINAL_SIZE = ("original_width", "original_height")  # as img2dataset calls it
_KINDS: dict[str, PhraseKind] = {"ref_exps": "ref_exp", "noun_chunks": "noun_chunk"}
_EDGE = 0.01  # boxes that overshoot by less, as rounding makes them, are cut to the image
_SAME_SHAPE = 0.05  # aspect ratios that differ by less are one
_ROUNDING_PX = 1.5  # resizing rounds both sides to whole pixels
_KEY_DIGITS = 64  # KEY.json is a file name, too


@dataclass(frozen=True)
class GritRecords(Source):
    """What the readers of GRIT share: the choice of phrases, and their checks.

    Attributes:
        phrases: Which phrases to take; one that both lists hold with the same box counts once.
        min_score: Phrases whose boxes GRIT trusts less are rejected.
        max_phrases: Only the best-scored are taken of an image; `None` takes all.
        max_image_px: Larger pictures are rejected by their header, before memory is spent.
    """

    name: ClassVar[str] = "grit"
    phrases: Literal["ref_exps", "noun_chunks", "both"] = "ref_exps"
    min_score: float = 0.0
    max_phrases: int | None = None
    max_image_px: int = MAX_IMAGE_PX

    def __post_init__(self) -> None:
        if self.phrases not in (*_KINDS, "both"):
            raise ValueError(f"phrases must be {', '.join(_KINDS)} or both, got {self.phrases!r}")
        if self.max_phrases is not None and self.max_phrases < 1:
            raise ValueError(f"max_phrases must be at least 1 or null, got {self.max_phrases}")

    @property
    def lists(self) -> tuple[str, ...]:
        """The fields of a record that hold the chosen phrases."""
        return tuple(_KINDS) if self.phrases == "both" else (self.phrases,)

    def build(
        self,
        key: str,
        record: dict[str, Any],
        load: Callable[[], bytes],
        seen: set[str],
    ) -> SourceSample | Reject:
        """Make a sample of a record and its picture.

        Args:
            key: The sample's key.
            record: What GRIT says of it.
            load: Returns the picture's bytes; may raise `SampleError`.
            seen: Keys before this one in the shard; a good one is added.
        """
        try:
            if not (key.isascii() and key.isdigit() and len(key) <= _KEY_DIGITS):
                raise SampleError(
                    "bad_key", f"a key must be 1 to {_KEY_DIGITS} digits, got {key[:80]!r}"
                )
            if key in seen:
                raise SampleError("duplicate_key", f"{key} was there before")
            if not isinstance(record.get("caption"), str):
                raise SampleError("missing_caption", f"{key} has no text under 'caption'")
            seen.add(key)
            image = load()
            size = upright_size(image, self.max_image_px)
            _check_shape(record, size)
            return self._sample(key, record, image, size)
        except SampleError as error:
            return Reject(key, None, error.reason, error.detail, len(self._entries(record)))

    def _entries(self, record: dict[str, Any]) -> list[tuple[PhraseKind, Any]]:
        """Return the chosen phrases as they stand in the record, without repetitions."""
        chosen: list[tuple[PhraseKind, Any]] = []
        seen: set[str] = set()
        for name in self.lists:
            entries = record.get(name)
            for entry in entries if isinstance(entries, list) else ():
                if (text := repr(entry)) not in seen:
                    seen.add(text)
                    chosen.append((_KINDS[name], entry))
        return chosen

    def _sample(
        self, key: str, record: dict[str, Any], image: bytes, size: tuple[int, int]
    ) -> SourceSample:
        phrases: list[BoxedPhrase] = []
        rejects: list[Reject] = []
        for rid, (kind, entry) in enumerate(self._entries(record)):
            try:
                phrases.append(self._phrase(rid, kind, entry, record["caption"], size))
            except SampleError as error:
                rejects.append(Reject(key, rid, error.reason, error.detail))
        if not phrases and not rejects:
            raise SampleError("no_phrases", f"{key} has no {' or '.join(self.lists)}")
        ranked = sorted(phrases, key=lambda p: -(p.score or 0.0))  # stable: the first of equals
        if left := {p.rid for p in ranked[self.max_phrases :]} if self.max_phrases else set():
            detail = f"{len(phrases)} phrases, the best {self.max_phrases} are taken"
            rejects += [Reject(key, rid, "not_best", detail) for rid in sorted(left)]
            phrases = [p for p in phrases if p.rid not in left]
        name = key if record.get("id") is None else as_text(record["id"])
        return SourceSample(
            key, name, record["caption"], image, *size, tuple(phrases), tuple(rejects)
        )

    def _phrase(
        self, rid: int, kind: PhraseKind, entry: Any, caption: str, size: tuple[int, int]
    ) -> BoxedPhrase:
        if not isinstance(entry, list) or len(entry) < 6 or not all(map(_is_number, entry)):
            raise SampleError(
                "bad_phrase",
                f"expected [start, end, x1, y1, x2, y2, score], got {str(entry)[:200]}",
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
        box = [min(max(v, 0.0), 1.0) for v in (x1, y1, x2, y2)]
        box = [round(v * s, 2) for v, s in zip(box, (*size, *size), strict=True)]
        if box[2] <= box[0] or box[3] <= box[1]:
            raise SampleError("bad_box", f"{[x1, y1, x2, y2]} has no area in {size} px")
        lead = len(text) - len(text.lstrip())
        text = text.strip()
        span = (int(start) + lead, int(start) + lead + len(text))
        return BoxedPhrase(rid, text, kind, span, (box[0], box[1], box[2], box[3]), score)


def as_text(value: Any) -> str:
    """Return a value of a record as text; 12.0, which pandas makes of 12 beside a null, as 12."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _check_shape(record: dict[str, Any], size: tuple[int, int]) -> None:
    """Refuse a picture that was cropped, padded or squeezed after its boxes were drawn.

    img2dataset does that when it is told to resize with `center_crop`, `border` or `fixed`, and
    writes down the size that it found. Turned by 90 degrees is no crop: that size knows no EXIF.
    """
    original: list[Any] = [record.get(name) for name in ORIGINAL_SIZE]
    if not all(_is_number(v) and v >= 1 for v in original):
        return
    before, now = (max(s) / min(s) for s in (original, size))
    if abs(now / before - 1) > _SAME_SHAPE + _ROUNDING_PX / min(size):
        raise SampleError(
            "cropped_image",
            f"{original[0]} x {original[1]} px became {size[0]} x {size[1]}, so its boxes do not "
            "fit; tell img2dataset to resize with keep_ratio or no",
        )


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e12  # false for NaN, too
