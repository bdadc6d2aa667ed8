"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg): which object of a picture is meant.

Read from ReCLIP's lines of JSON (arXiv 2204.05991) or from the folders of the `refer` package.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpha_clip.evaluation.annotations import box_of, read_json
from alpha_clip.regions import Box, Region

_LINES = (
    'lines of JSON as ReCLIP has them: {"image_id", "file_name", "ann_id", "anns": [{"id", "bbox": '
    '[x, y, width, height]}], "sentences": [{"raw"}]}'
)
_FOLDER = "a folder of the refer package: refs(SPLIT_BY).p or .json, and instances.json"


@dataclass(frozen=True)
class Expression:
    """A text and the boxes that are right; one of them is to be found."""

    text: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class ReferredPicture:
    """A picture with what is said of its objects.

    Attributes:
        image_id: What COCO calls it.
        files: The names that its file may have.
        objects: The annotated objects: box, and mask where it is known.
        expressions: What is said.
    """

    image_id: int
    files: tuple[str, ...]
    objects: tuple[tuple[Box, Region], ...]
    expressions: tuple[Expression, ...]


def read_expressions(
    annotations: str, split: str | None = None, split_by: str = "unc"
) -> list[ReferredPicture]:
    """Read referring expressions, gathered by picture.

    Args:
        annotations: ReCLIP's `.jsonl`, or a folder of the `refer` package.
        split: Such as `val`, `testA`; `None` takes all that there are.
        split_by: Who split it, of the `refer` package: `unc`, `google` or `umd`.

    Raises:
        ValueError: If it is of another format, or has no such split.
    """
    folder = Path(annotations).is_dir()
    try:
        found = _refer(Path(annotations), split_by) if folder else _reclip(annotations)
        chosen = [ref for ref in found if split in (None, ref.split)]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        expected = _FOLDER if folder else _LINES
        raise ValueError(
            f"{annotations} is of another format ({type(error).__name__}: {error}); expected "
            f"{expected}"
        ) from error
    if not chosen:
        splits = sorted({str(ref.split) for ref in found})
        raise ValueError(
            f"{annotations} has no expressions of split {split!r}; it has {', '.join(splits)}"
        )
    return _by_picture(chosen)


@dataclass(frozen=True)
class _Reference:
    """An object and what is said of it."""

    image_id: int
    files: tuple[str, ...]
    split: str | None
    objects: tuple[tuple[Box, Region], ...]
    texts: list[str]
    boxes: tuple[Box, ...]


def _by_picture(references: list[_Reference]) -> list[ReferredPicture]:
    """Gather what is said of a picture: it is read and shown to the model once."""
    groups: dict[int, list[_Reference]] = {}
    for reference in references:
        groups.setdefault(reference.image_id, []).append(reference)
    return [
        ReferredPicture(
            image_id,
            group[0].files,
            group[0].objects,
            tuple(Expression(text, ref.boxes) for ref in group for text in ref.texts),
        )
        for image_id, group in groups.items()
    ]


def _reclip(file: str) -> list[_Reference]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} can't be read, expected {_LINES} or {_FOLDER}: {error}"
        ) from error
    return list(map(_of_line, _parsed(file, lines)))


def _parsed(file: str, lines: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}; expected {_LINES}") from error


def _of_line(record: dict[str, Any]) -> _Reference:
    meant = record["ann_id"] if isinstance(record["ann_id"], list) else [record["ann_id"]]
    boxes = {ann["id"]: _box(ann) for ann in record["anns"]}
    return _Reference(
        int(record["image_id"]),
        _files(record["file_name"]),
        record.get("split"),
        tuple((box, None) for box in boxes.values()),
        _texts(record),
        tuple(boxes[key] for key in meant),
    )


def _refer(folder: Path, split_by: str) -> list[_Reference]:
    instances = read_json(str(folder / "instances.json"), _FOLDER)
    objects: dict[int, list[dict[str, Any]]] = {}
    for ann in instances["annotations"]:
        if not ann.get("iscrowd"):
            objects.setdefault(ann["image_id"], []).append(ann)
    known = {ann["id"]: _box(ann) for ann in instances["annotations"]}
    names = {image["id"]: str(image["file_name"]) for image in instances["images"]}
    shown = {
        image_id: tuple((known[ann["id"]], ann.get("segmentation") or None) for ann in anns)
        for image_id, anns in objects.items()
    }
    return [
        _Reference(
            ref["image_id"],
            (names[ref["image_id"]],),
            ref["split"],
            shown[ref["image_id"]],
            _texts(ref),
            (known[ref["ann_id"]],),
        )
        for ref in _refs(folder, split_by)
    ]


def _refs(folder: Path, split_by: str) -> list[dict[str, Any]]:
    """Read the list of references, of JSON or of the package's pickle of plain values."""
    file = folder / f"refs({split_by}).json"
    if file.exists():
        return list(read_json(str(file), _FOLDER))
    file = file.with_suffix(".p")
    try:
        with file.open("rb") as stream:
            found = _PlainUnpickler(stream, encoding="utf-8", errors="replace").load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError) as error:
        there = sorted(path.name for path in folder.glob("refs(*"))
        raise ValueError(
            f"{file} can't be read ({error}); expected {_FOLDER}; there are {there}"
        ) from error
    return list(found)


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, numbers and text; what could run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}, expected plain values only")


def _files(name: str) -> tuple[str, ...]:
    """Return the names of a picture's file: ReCLIP's ends in the object's number, `_16.jpg`."""
    path = Path(name)
    stem, _, number = path.stem.rpartition("_")
    shorter = stem + path.suffix
    return (name, shorter) if number.isdigit() and stem.count("_") > 1 else (name,)


def _texts(record: dict[str, Any]) -> list[str]:
    """Return sentences as the published script takes them: as they were typed, in lower case."""
    return [str(sentence["raw"]).lower().strip() for sentence in record["sentences"]]


def _box(annotation: dict[str, Any]) -> Box:
    box = box_of(annotation["bbox"])
    if box is None:
        raise ValueError(
            f"object {annotation['id']}: {annotation['bbox']} is no [x, y, width, height] in px"
        )
    return box
