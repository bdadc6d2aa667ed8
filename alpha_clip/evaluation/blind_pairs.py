"""CLIP-blind pairs: two pictures that CLIP takes for the same, and a statement true of each.

MMVP-VLM ("Eyes Wide Shut?", arXiv 2401.06209): nine visual patterns of fifteen pairs. A pair counts
if both statements find their picture, so guessing reaches a quarter.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alpha_clip.drops import Drops
from alpha_clip.evaluation.annotations import (
    inside,
    labelled,
    named,
    open_picture,
    read_json,
)
from alpha_clip.evaluation.base import Benchmark, Scores, Seen
from alpha_clip.evaluation.columns import PICTURE, Columns
from alpha_clip.evaluation.focus_baselines import FOCUS
from alpha_clip.evaluation.inputs import encode_texts
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.geometry import SharedGeometry
from alpha_clip.model import AlphaClip
from alpha_clip.regions import Box, Region, SampleError, decode_rle

_FOLDERS = ("MLLM_VLM Images", "MMVP_VLM_Images")
_EXPECTED = (
    "MMVP-VLM's folder: Questions.csv (Question ID, Type, Statement; two rows a pair, an odd "
    f"number and the next) and {_FOLDERS[0]}/TYPE/ID.jpg"
)
_REGIONS = 'a JSON object {"12": [x1, y1, x2, y2] in px, or a COCO RLE, ...} by question'


@dataclass(frozen=True)
class _Pair:
    pattern: int
    questions: tuple[int, int]
    statements: tuple[str, str]


class BlindPairs(Benchmark):
    """Do two statements find their pictures, of two?

    Args:
        directory: MMVP-VLM's folder, or another of its format.
        regions: JSON file with regions to point at, by question: boxes `[x1, y1, x2, y2]` in pixels
            or COCO RLEs. A picture without one is shown as a whole.
        focus: How to point at them, of `focus_baselines.FOCUS`.
        template: The prompt; `{}` stands for the statement.
        geometry: How images become squares.

    Raises:
        ValueError: If the folder or the file is of another format, or the way of pointing unknown.
    """

    def __init__(
        self,
        directory: str,
        regions: str | None = None,
        focus: str = "alpha",
        template: str = "a photo of {}",
        geometry: SharedGeometry = "center_crop",
    ) -> None:
        if focus not in FOCUS:
            raise ValueError(f"unknown focus {focus!r}; expected one of {list(FOCUS)}")
        root = Path(directory)
        self.focus = focus
        self._images = next((root / f for f in _FOLDERS if (root / f).is_dir()), root / _FOLDERS[0])
        self._patterns, self._pairs = _read_pairs(root / "Questions.csv")
        self._regions = _read_regions(regions) if regions else {}
        self._parts: dict[str, list[_Pair]] = {}
        for number in range(len(self._patterns)):
            pairs = [pair for pair in self._pairs if pair.pattern == number]
            shown = [[pair, *map(self._region_of, pair.questions)] for pair in pairs]
            self._parts[named(number, shown)] = pairs
        self.template = template
        self.geometry: SharedGeometry = geometry

    def parts(self) -> dict[str, int]:
        """Return the patterns."""
        return {part: 2 * len(pairs) for part, pairs in self._parts.items()}

    def score(self, model: AlphaClip, part: str, drops: Drops, seen: Seen) -> Columns:
        """Return, for each pair, whether statements and pictures found each other."""
        transform = model.transform.replace(geometry=self.geometry)
        device = model.logit_scale.device
        found: list[tuple[bool, bool, bool, bool]] = []
        for pair in self._parts[part]:
            seen(2)
            try:
                shown = [self._view(pair, question, transform) for question in pair.questions]
            except SampleError as error:
                drops.add(error.reason, error.detail)
                continue
            images = FOCUS[self.focus].encode(model, torch.stack(shown).to(device))
            prompts = [self.template.replace("{}", statement) for statement in pair.statements]
            similarity = (encode_texts(model, prompts) @ images.T).float()
            found.append((*_finds(similarity), *_finds(similarity.T)))
        if not found:
            return {}
        outcome = np.array(found, float)
        return {
            PICTURE: np.arange(len(found)),
            "pattern": np.full(len(found), self._parts[part][0].pattern),
            "text to image": outcome[:, :2],
            "image to text": outcome[:, 2:],
        }

    def _region_of(self, question: int) -> Region:
        return self._regions.get(str(question))

    def _view(self, pair: _Pair, question: int, transform: Any) -> Tensor:
        file = inside(self._images, f"{self._patterns[pair.pattern]}/{question}.jpg")
        image = open_picture(file, None)
        view: Tensor
        if (region := self._region_of(question)) is None:
            view = transform(image)
            return view
        try:
            pointed = labelled(0, region, region if isinstance(region, Box) else None, image)
        except (TypeError, ValueError) as error:
            raise SampleError("bad_rle", f"{file}: {error}") from error
        view = transform(*FOCUS[self.focus].show(image, decode_rle(pointed.rle), pointed.box))
        return view

    def outcomes(self, columns: Columns) -> dict[str, Outcome]:
        """Return the share of pairs with both right, and of single questions, both ways.

        `pairs/text to image` is what is published: each statement chooses a picture. `mean per
        class/...` is the mean over patterns.

        Raises:
            ValueError: If no pair could be used.
        """
        if not columns:
            raise ValueError(f"no pair could be used; expected {_EXPECTED}")
        pictures, pattern = columns[PICTURE], columns["pattern"]
        found: dict[str, Outcome] = {}
        for way in ("text to image", "image to text"):
            right = columns[way]
            found[f"pairs/{way}"] = Outcome(right.all(1).astype(float), pictures)
            found[f"questions/{way}"] = Outcome(right.mean(1), pictures)
            both = right.all(1).astype(float)
            found[f"mean per class/{way}"] = Outcome(both, pictures, pattern)
        return found

    def counts(self, columns: Columns) -> Scores:
        """Return the number of pairs."""
        return {"pairs": float(len(columns[PICTURE]))}

    def classes(self) -> list[str]:
        """Return the visual patterns."""
        return self._patterns


def _finds(similarity: Tensor) -> tuple[bool, bool]:
    """Say of each of two rows whether its own column is closer than the other; not if equal."""
    first = bool(similarity[0, 0] > similarity[0, 1])
    return first, bool(similarity[1, 1] > similarity[1, 0])


def _read_pairs(file: Path) -> tuple[list[str], list[_Pair]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            _, *rows = csv.reader(stream)
        patterns = list(dict.fromkeys(row[1] for row in rows))
        pairs = []
        for (first, kind, one), (second, _, two) in zip(rows[::2], rows[1::2], strict=True):
            questions = int(first), int(second)
            if questions[0] % 2 == 0 or questions[1] != questions[0] + 1:
                raise ValueError(f"questions {first} and {second} are no pair")
            pairs.append(_Pair(patterns.index(kind), questions, (one, two)))
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{file} can't be read ({error}); expected {_EXPECTED}") from error
    if not pairs:
        raise ValueError(f"{file} holds no pairs; expected {_EXPECTED}")
    return patterns, pairs


def _read_regions(file: str) -> dict[str, Region]:
    record = read_json(file, _REGIONS)
    if not isinstance(record, dict):
        raise ValueError(f"{file} is something else than {_REGIONS}")
    return {question: _region(file, region) for question, region in record.items()}


def _region(file: str, region: Any) -> Region:
    if isinstance(region, Mapping):
        return region
    sound = isinstance(region, list) and len(region) == 4
    if not sound or not all(isinstance(v, int | float) and math.isfinite(v) for v in region):
        raise ValueError(f"{file}: {region!r} is no region; expected {_REGIONS}")
    return Box(*region)
