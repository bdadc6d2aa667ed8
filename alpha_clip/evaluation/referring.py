"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg): which region of the picture is meant?

Zero-shot as in the paper (section 4.2, after ReCLIP, arXiv 2204.05991): CLIP compares a text with
views of each candidate; logits are summed over views and models, and spatial relations multiply
what comes of them. Right is a box with an IoU of 0.5 or more with one that is meant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alpha_clip.drops import Drops
from alpha_clip.evaluation.annotations import inside, named, open_picture
from alpha_clip.evaluation.base import Benchmark, Scores, Seen
from alpha_clip.evaluation.candidates import Candidates, Objects
from alpha_clip.evaluation.columns import PICTURE, Columns
from alpha_clip.evaluation.expressions import ReferredPicture, read_expressions
from alpha_clip.evaluation.focus_baselines import check_focus
from alpha_clip.evaluation.inputs import encode_texts
from alpha_clip.evaluation.labelled import LabelledPicture
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.evaluation.referring_answers import RIGHT, answer, draw_answers
from alpha_clip.evaluation.region_texts import region_text_logits, with_all_views
from alpha_clip.evaluation.relation_keywords import parse_by_keywords
from alpha_clip.evaluation.relation_syntax import spacy_parser
from alpha_clip.evaluation.spatial_relations import Entity
from alpha_clip.factory import create_model
from alpha_clip.geometry import SharedGeometry
from alpha_clip.model import AlphaClip
from alpha_clip.regions import SampleError

_PART = 64  # pictures in a part
_AT_A_TIME = 8  # pictures whose candidates are shown together


@dataclass(frozen=True)
class ModelChoice:
    """A further model.

    Attributes:
        checkpoint: As of `alpha-clip eval`.
        name: As of `alpha-clip eval`.
        pretrained: As of `alpha-clip eval`.
    """

    checkpoint: str | None = None
    name: str | None = None
    pretrained: str | None = None


class ReferringExpressions(Benchmark):
    """Which of the candidates does an expression mean?

    Args:
        annotations: ReCLIP's `.jsonl`, or a folder of the `refer` package.
        images: Folder of the pictures (COCO's `train2014`).
        candidates: Where candidates come from: `candidates.Detections`, `Objects` or `Everything`;
            null takes the annotated objects.
        split: Which split of the file; null takes all.
        split_by: Who split it, of the `refer` package: `unc`, `google` or `umd`.
        focus: Views of each candidate, of `focus_baselines.FOCUS`; their logits are put together.
        aggregate: How: their sum, or the largest.
        relations: How spatial relations are found: by `keywords`, by spaCy's parser as in ReCLIP
            (`spacy`), or `none`.
        summed_with: Further models whose logits are added.
        template: The prompt; `{}` stands for the text.
        geometry: How images become squares.
        batch_size: Images that go through the tower at a time.
        max_images: Most images to read; null reads all.

    Raises:
        ValueError: If a file is of another format, or a way of pointing is unknown.
    """

    def __init__(
        self,
        annotations: str,
        images: str,
        candidates: Candidates | None = None,
        split: str | None = None,
        split_by: str = "unc",
        focus: tuple[str, ...] = ("alpha", "alpha blur"),
        aggregate: Literal["sum", "max"] = "sum",
        relations: Literal["keywords", "spacy", "none"] = "keywords",
        summed_with: tuple[ModelChoice, ...] = (),
        template: str = "a photo of {}",
        geometry: SharedGeometry = "squash",
        batch_size: int = 64,
        max_images: int | None = None,
    ) -> None:
        check_focus(focus)
        if not Path(images).is_dir():
            raise ValueError(f"{images} is no folder; give that of the pictures")
        self._pictures = read_expressions(annotations, split, split_by)[:max_images]
        self.candidates = candidates or Objects()
        self.candidates.check(self._pictures)
        self._images = Path(images)
        self._variant = f"{Path(annotations).stem}{f'_{split}' if split else ''}".lower()
        given = [[p, self.candidates.given(p)] for p in self._pictures]
        stretches = range(0, len(self._pictures), _PART)
        self._parts = {named(i, given[i : i + _PART]): i for i in stretches}
        self.focus, self.aggregate, self.relations = focus, aggregate, relations
        self.summed_with = summed_with
        self.template = template
        self.geometry: SharedGeometry = geometry
        self.batch_size = batch_size
        self._others: list[AlphaClip] = []
        self._models: list[AlphaClip] = []
        self._parse: Callable[[str], Entity | None] = _no_relations

    def __getstate__(self) -> dict[str, Any]:
        """Leave models behind: a process on another device loads its own."""
        return {**self.__dict__, "_others": [], "_models": [], "_parse": _no_relations}

    def variant(self) -> str:
        """Return the name of the data, such as `refcoco_val`."""
        return self._variant

    def parts(self) -> dict[str, int]:
        """Return stretches of the list of pictures."""
        count = len(self._pictures)
        return {part: min(_PART, count - first) for part, first in self._parts.items()}

    def models(self, model: AlphaClip) -> list[AlphaClip]:
        """Return the model and those that it is summed with."""
        if not self._others and self.summed_with:
            device = model.logit_scale.device
            chosen = [(m.name, m.pretrained, m.checkpoint) for m in self.summed_with]
            self._others = [create_model(*about, device=str(device))[0] for about in chosen]
        return [model, *self._others]

    def prepare(self, model: AlphaClip) -> None:
        """Load what makes masks, what parses, and the other models."""
        self._models = self.models(model)
        self._parse = _parser(self.relations)
        self.candidates.load(model.logit_scale.device.index or 0)

    def score(self, model: AlphaClip, part: str, drops: Drops, seen: Seen) -> Columns:
        """Return, for each expression, whether each way of choosing is right; see `Benchmark`."""
        first = self._parts[part]
        pictures = self._shown(self._pictures[first : first + _PART], drops, seen)
        rows: list[dict[str, Any]] = []
        number = 0
        while batch := list(islice(pictures, _AT_A_TIME)):
            answered = self._answered(batch)
            rows += [
                {PICTURE: number + i, **row} for i, found in enumerate(answered) for row in found
            ]
            number += len(batch)
        return {name: np.array([row[name] for row in rows]) for name in (rows or [{}])[0]}

    def _shown(
        self, pictures: list[ReferredPicture], drops: Drops, seen: Seen
    ) -> Iterator[tuple[ReferredPicture, str, LabelledPicture]]:
        """Yield pictures, with their file and their candidates."""
        for picture in pictures:
            seen(1)
            try:
                files = [inside(self._images, name) for name in picture.files]
                file = next((f for f in files if f.is_file()), files[0])
                image = open_picture(file, None)
                regions = self.candidates.of(picture, image)
            except SampleError as error:
                drops.add(error.reason, error.detail)
                continue
            name = str(file.relative_to(self._images))
            yield picture, name, LabelledPicture(image, regions)

    def _answered(
        self, batch: list[tuple[ReferredPicture, str, LabelledPicture]]
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield, for each picture, a row for each of its expressions."""
        said = [[(e, self._parse(e.text)) for e in picture.expressions] for picture, _, _ in batch]
        of_entities = (e.texts() if e else () for told in said for _, e in told)
        of_expressions = (e.text for told in said for e, _ in told)
        texts = list(dict.fromkeys([*of_expressions, *chain.from_iterable(of_entities)]))
        prompts = [self.template.replace("{}", text) for text in texts]
        logits = region_text_logits(
            self._models,
            [shown for _, _, shown in batch],
            [encode_texts(model, prompts) for model in self._models],
            self.focus,
            self.geometry,
            self.batch_size,
        )
        logits = with_all_views(logits, self.aggregate)
        start = 0
        for (_, file, shown), told in zip(batch, said, strict=True):
            stop = start + len(shown.regions)
            own = {
                way: dict(zip(texts, values[start:stop].T, strict=True))
                for way, values in logits.items()
            }
            corners = [[r.box.x1, r.box.y1, r.box.x2, r.box.y2] for r in shown.regions]
            boxes = np.array(corners, np.float64)
            rows = [answer(expression, entity, own, boxes) for expression, entity in told]
            yield [{"file": file, **row} for row in rows]
            start = stop

    def outcomes(self, columns: Columns) -> dict[str, Outcome]:
        """Return the share of expressions whose object was found, in each way; see `Benchmark`.

        `all views` is what is published. `without relations/...` is what CLIP alone chooses,
        `candidates/guess` what guessing reaches, `candidates/largest` what always taking the
        largest does, and `candidates/best` how many objects are among the candidates at all.

        Raises:
            ValueError: If no picture could be used.
        """
        if not columns:
            raise ValueError("no picture could be used; is the folder that of the annotations?")
        pictures = columns[PICTURE]
        return {
            name.removeprefix(RIGHT): Outcome(column, pictures)
            for name, column in columns.items()
            if name.startswith(RIGHT)
        }

    def counts(self, columns: Columns) -> Scores:
        """Return the number of expressions and of candidates per picture."""
        _, first = np.unique(columns[PICTURE], return_index=True)
        return {
            "expressions": float(len(columns[PICTURE])),
            "candidates a picture": float(columns["candidates"][first].mean()),
        }

    def write(self, columns: Columns, file: Path) -> None:
        """Write every answer as a line of JSON, and draw some; see `Benchmark`.

        `NAME.answers.jsonl` has file, expression, the box that was chosen, one that is right, the
        probability, and which ways were right; `NAME.examples.png` draws some spread over the data.
        """
        names = ["file", "expression", "chosen_xyxy_px", "meant_xyxy_px", "probability"]
        ways = [name for name in columns if name.startswith(RIGHT)]
        with file.with_suffix(".answers.jsonl").open("w", encoding="utf-8") as stream:
            for row in range(len(columns["file"])):
                about = {name: columns[name][row].tolist() for name in names}
                right = {way.removeprefix(RIGHT): float(columns[way][row]) for way in ways}
                stream.write(json.dumps({**about, "right": right}, ensure_ascii=False) + "\n")
        draw_answers(columns, self._images, file.with_suffix(".examples.png"))


def _parser(relations: str) -> Callable[[str], Entity | None]:
    if relations == "keywords":
        return parse_by_keywords
    return spacy_parser() if relations == "spacy" else _no_relations


def _no_relations(text: str) -> None:
    return None
