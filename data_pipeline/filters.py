"""What is kept: limits on pictures, phrases and masks, each with the reason it rejects under."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from alpha_clip.regions import Box, RegionAnnotation, SampleError
from data_pipeline.truth import box_iou

_ARTICLES = ("a", "an", "the")
_COUNTS = ("min_side_px", "min_words", "max_words", "min_characters", "max_characters")
_SHARES = (
    "min_mask_share",
    "max_mask_share",
    "min_box_iou",
    "min_predicted_iou",
    "min_stability",
    "duplicate_mask_iou",
)


@dataclass(frozen=True)
class Filters:
    """Decides which pictures, phrases and masks are kept.

    Every filter is off by default (`None`, in YAML `null`, or an empty list); only an empty mask is
    always rejected. What lies exactly on a limit is kept.

    Attributes:
        min_side_px: Smallest length of a picture's shorter side, at least 1.
        max_aspect_ratio: Greatest ratio of a picture's longer side to its shorter one, at least 1.
        near_duplicate_bits: A picture repeats an earlier one *of the same shard* if at most so many
            bits of their 64-bit difference hashes differ (and their colours agree), 0 to 32; 4
            finds most copies of another size or JPEG quality. Copies in other shards are not
            found: shards are made apart, so that any one can be made anew.
        min_words: Fewest words of a phrase, at least 1. A word is what spaces separate and holds a
            letter or digit; for languages without spaces use the characters.
        max_words: Most words of a phrase, at least 1.
        min_characters: Fewest characters of a phrase, at least 1, spaces at its ends not counted.
        max_characters: Most characters of a phrase, at least 1.
        blocked_phrases: Phrases that are rejected where they are the whole text; case, punctuation
            and a leading a, an or the make no difference.
        blocked_words: Words, or several in a row, that a phrase may hold nowhere; whole words,
            whatever their case: "man" blocks "a man's hat", not "a woman".
        min_mask_share: Smallest share of the picture that a mask covers, 0 to 1.
        max_mask_share: Greatest share of the picture that a mask covers, 0 to 1.
        min_box_iou: Smallest IoU of the box around the mask with the box it was made for, 0 to 1.
        min_predicted_iou: Smallest IoU that the segmenter itself expects of its mask, 0 to 1; masks
            of segmenters that expect nothing are kept.
        min_stability: Smallest stability score of a mask, 0 to 1; masks without one are kept.
        duplicate_mask_iou: Of two regions of a picture with the same words, whatever their case,
            whose masks have at least this IoU, 0 to 1, the one with the higher score is kept, of
            equals the earlier; a region without a score comes last.

    Raises:
        ValueError: If a limit is out of range, a smallest one is above its greatest one, or a
            blocked phrase or word has neither letter nor digit.
    """

    min_side_px: int | None = None
    max_aspect_ratio: float | None = None
    near_duplicate_bits: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    blocked_phrases: list[str] = field(default_factory=list)
    blocked_words: list[str] = field(default_factory=list)
    min_mask_share: float | None = None
    max_mask_share: float | None = None
    min_box_iou: float | None = None
    min_predicted_iou: float | None = None
    min_stability: float | None = None
    duplicate_mask_iou: float | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            self._check_limit(name, 1, math.inf, whole=True)
        self._check_limit("near_duplicate_bits", 0, 32, whole=True)
        self._check_limit("max_aspect_ratio", 1, math.inf)
        for name in _SHARES:
            self._check_limit(name, 0, 1)
        for name in ("words", "characters", "mask_share"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise ValueError(
                    f"min_{name} must not be above max_{name}, got {low} and {high}; nothing could "
                    "pass: swap them, or leave one out"
                )
        for name in ("blocked_phrases", "blocked_words"):
            texts = getattr(self, name)
            if not isinstance(texts, list | tuple) or not all(
                isinstance(text, str) and _words(text) for text in texts
            ):
                raise ValueError(
                    f"{name} must be a list of texts with a letter or digit in each, got "
                    f"{texts!r}; write ['image', 'photo'], and leave it out to block nothing"
                )

    def _check_limit(self, name: str, low: int, high: float, whole: bool = False) -> None:
        value = getattr(self, name)
        if value is None:
            return
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or value == math.inf:
            bounds = f"of at least {low}" if high == math.inf else f"in {low}..{high}"
            raise ValueError(
                f"{name} must be a {'whole ' if whole else ''}number {bounds}, got {value!r}; "
                "to switch it off leave it out, or give None (null in YAML)"
            )

    def check_image(self, width: int, height: int) -> None:
        """Check the size of a picture, in pixels.

        Raises:
            SampleError: `image_too_small` or `image_aspect`.
        """
        short, long = sorted((width, height))
        size = f"{width} x {height} px (W x H)"
        if self.min_side_px is not None and short < self.min_side_px:
            raise SampleError("image_too_small", f"{size}, min_side_px is {self.min_side_px}")
        if self.max_aspect_ratio is not None and long / short > self.max_aspect_ratio:
            limit = f"max_aspect_ratio is {self.max_aspect_ratio}"
            raise SampleError("image_aspect", f"{size}, {limit}")

    def check_phrase(self, text: str) -> None:
        """Check a phrase.

        Raises:
            SampleError: `phrase_too_short`, `phrase_too_long` or `blocked_phrase`.
        """
        characters = len(text.strip())
        words = sum(any(map(str.isalnum, piece)) for piece in text.split())
        for name, count, low, high in (
            ("words", words, self.min_words, self.max_words),
            ("characters", characters, self.min_characters, self.max_characters),
        ):
            if low is not None and count < low:
                raise SampleError(
                    "phrase_too_short", f"{count} {name}, min_{name} is {low}: {text!r}"
                )
            if high is not None and count > high:
                raise SampleError(
                    "phrase_too_long", f"{count} {name}, max_{name} is {high}: {text!r}"
                )
        if not (self.blocked_phrases or self.blocked_words):
            return
        found = _words(text)
        if _without_article(found) in self._blocked_phrases:
            raise SampleError("blocked_phrase", f"{text!r} is in blocked_phrases")
        row = f" {' '.join(found)} "
        for word in self._blocked_words:
            if word in row:
                raise SampleError("blocked_phrase", f"{text!r} holds {word.strip()!r}")

    def check_mask(
        self,
        mask: NDArray[np.bool_],
        area: int,
        box_xyxy_px: tuple[float, float, float, float],
        iou: float | None,
        stability: float | None,
    ) -> None:
        """Check a mask.

        Args:
            mask: True inside the region, `[H, W]`.
            area: Pixels inside it.
            box_xyxy_px: The box it was made for, inside the picture.
            iou: The segmenter's estimate of the mask's IoU, if it has one.
            stability: The segmenter's stability score, if it has one.

        Raises:
            SampleError: `empty_mask`, `mask_too_small`, `mask_too_large`, `mask_leaves_box`,
                `low_predicted_iou` or `unstable_mask`.
        """
        if area == 0:
            raise SampleError("empty_mask", "the mask has no pixel")
        share = area / mask.size
        if self.min_mask_share is not None and share < self.min_mask_share:
            limit = f"min_mask_share is {self.min_mask_share}"
            raise SampleError("mask_too_small", f"{share:.4g} of the picture, {limit}")
        if self.max_mask_share is not None and share > self.max_mask_share:
            limit = f"max_mask_share is {self.max_mask_share}"
            raise SampleError("mask_too_large", f"{share:.4g} of the picture, {limit}")
        if self.min_box_iou is not None:
            # The box in whole pixels: a mask that fills it has IoU 1.
            asked = Box(*box_xyxy_px).pixels(*mask.shape)
            found = box_around(mask)
            if (overlap := box_iou(found, asked)) < self.min_box_iou:
                raise SampleError(
                    "mask_leaves_box",
                    f"box {list(found)} around the mask, asked for {list(asked)}: IoU "
                    f"{overlap:.4g}, min_box_iou is {self.min_box_iou}",
                )
        for reason, name, value, least in (
            ("low_predicted_iou", "min_predicted_iou", iou, self.min_predicted_iou),
            ("unstable_mask", "min_stability", stability, self.min_stability),
        ):
            if least is not None and value is not None and not value >= least:  # NaN goes, too
                raise SampleError(reason, f"{value:.4g}, {name} is {least}")

    def duplicates(self, regions: Sequence[RegionAnnotation]) -> dict[int, int]:
        """Find regions of a picture that say the same words of the same pixels.

        Args:
            regions: All regions of one picture, with masks as `encode_rle` or `parse_sample`
                give them: pycocotools takes their runs on trust.

        Returns:
            `rid` of each region that goes -> `rid` of the one that stays for it, in the order of
            `regions`.
        """
        if self.duplicate_mask_iou is None:
            return {}
        ranked = sorted(regions, key=lambda r: math.inf if r.score is None else -r.score)
        by_words: dict[str, list[RegionAnnotation]] = {}
        for region in ranked:
            by_words.setdefault(" ".join(region.text.casefold().split()), []).append(region)
        gone: dict[int, int] = {}
        for group in by_words.values():
            if len(group) > 1:
                gone.update(_repetitions(group, self.duplicate_mask_iou))
        return {r.rid: gone[r.rid] for r in regions if r.rid in gone}

    @cached_property
    def _blocked_phrases(self) -> frozenset[str]:
        return frozenset(_without_article(_words(text)) for text in self.blocked_phrases)

    @cached_property
    def _blocked_words(self) -> tuple[str, ...]:
        return tuple(f" {' '.join(_words(text))} " for text in self.blocked_words)


def _words(text: str) -> list[str]:
    """Return the words of a text, case folded: runs of letters and digits of any script."""
    kept = [" "]
    for char in unicodedata.normalize("NFC", text).casefold():
        kind = unicodedata.category(char)
        # Marks belong to the letter before, as vowels do in Hindi; on their own they are no word.
        if kind[0] in "LN" or (kind[0] == "M" and kept[-1] != " "):
            kept.append(char)
        elif kind != "Cf":  # soft hyphens and joiners stand inside words, unseen
            kept.append(" ")
    return "".join(kept).split()


def _without_article(words: list[str]) -> str:
    return " ".join(words[1:] if len(words) > 1 and words[0] in _ARTICLES else words)


def box_around(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Return `x1, y1, x2, y2` in pixels (exclusive) around a mask `[H, W]` that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _repetitions(ranked: list[RegionAnnotation], limit: float) -> dict[int, int]:
    """Return `rid` -> `rid` of the better region, among those kept, that it overlaps."""
    rles = [{**region.rle, "counts": region.rle["counts"].encode("ascii")} for region in ranked]
    areas = [region.area for region in ranked]
    kept: list[int] = []
    gone: dict[int, int] = {}
    for index, region in enumerate(ranked):
        # No IoU is above the smaller area over the larger one: most pairs need no look.
        near = [k for k in kept if min(areas[k], region.area) / max(areas[k], region.area) >= limit]
        others = [rles[k] for k in near]
        ious = coco_mask.iou(others, [rles[index]], [False])[:, 0] if others else []
        better = next((k for k, iou in zip(near, ious, strict=True) if iou >= limit), None)
        if better is None:
            kept.append(index)
        else:
            gone[region.rid] = ranked[better].rid
    return gone
