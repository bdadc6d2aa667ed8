"""Regions without names: what pseudo-labels are made for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from alpha_clip.evaluation.annotations import FolderRegions, box_of, inside, read_json
from alpha_clip.regions import Box, Region, SampleError

_IMAGES = 'a COCO or LVIS file: a JSON object with images ({"id", "file_name" or "coco_url"})'
_PROPOSALS = 'a list as COCO\'s results: {"image_id", "bbox", "segmentation"[, "score"]} in px'
_NAMES = "a COCO or LVIS file with categories, a list of names, or an object {id: name}"


def image_file(folder: Path, picture: dict[str, Any]) -> Path:
    """Return the file of a picture: the first that exists of the names it may have.

    Args:
        folder: Of the pictures: by `file_name`, or by the end of `coco_url` (LVIS), with or without
            its split.
        picture: Its entry in COCO's or LVIS's `images`.

    Raises:
        SampleError: If it has no name, or one outside the folder.
    """
    url = PurePosixPath(str(picture.get("coco_url", "")))
    names = [str(picture.get("file_name", "")), "/".join(url.parts[-2:]), url.name]
    files = [inside(folder, name) for name in names if name]
    if not files:
        raise SampleError("missing_image", f"image {picture['id']} has no file_name")
    return next((f for f in files if f.is_file()), files[0])


def image_size(picture: dict[str, Any]) -> tuple[int, int] | None:
    """Return the width and height that an entry says its picture has, if it does."""
    width, height = picture.get("width"), picture.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def read_categories(file: str) -> list[dict[str, Any]]:
    """Read what regions may be called, in the order of their ids.

    Args:
        file: A COCO or LVIS file, a list of names (ids from 1), or an object `{id: name}`.

    Returns:
        Categories `{"id", "name", ...}`.

    Raises:
        ValueError: If it is none of these, or says a thing twice.
    """
    record = read_json(file, _NAMES)
    try:
        if isinstance(record, list):
            found = [{"id": i, "name": name} for i, name in enumerate(record, 1)]
        elif "categories" in record:
            found = list(record["categories"])
        else:
            found = [{"id": int(key), "name": name} for key, name in record.items()]
        found = sorted(found, key=lambda category: int(category["id"]))
        sound = all(isinstance(category["name"], str) for category in found)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is something else than {_NAMES}: {error}") from error
    if not sound or not found:
        raise ValueError(f"{file} is something else than {_NAMES}")
    if len({category["id"] for category in found}) < len(found):
        raise ValueError(f"{file} has two categories with one id")
    return found


class Proposals(FolderRegions):
    """Regions numbered from 0 over the whole file; their label is that number.

    Args:
        annotations: A COCO or LVIS file: its images, and its objects as regions.
        images: Folder of the pictures.
        proposals: Results as COCO has them, instead of the file's own objects.
        max_images: Most images to read; `None` reads all.

    Attributes:
        images: The entries of all pictures, by id.
        regions: The regions: entries of either file.

    Raises:
        ValueError: If a file is of another format, or speaks of images that are not there.
    """

    def __init__(
        self, annotations: str, images: str, proposals: str | None, max_images: int | None
    ) -> None:
        record = read_json(annotations, _IMAGES)
        try:
            self.images: dict[Any, Any] = {picture["id"]: picture for picture in record["images"]}
            found = record["annotations"] if proposals is None else read_json(proposals, _PROPOSALS)
            self.regions: list[dict[str, Any]] = [r for r in found if not r.get("iscrowd")]
            owners = [region["image_id"] for region in self.regions]
            wrong = [r["score"] for r in self.regions if not _is_score(r.get("score", 1.0))]
        except (KeyError, TypeError, AttributeError) as error:
            file, expected = (
                (annotations, _IMAGES) if proposals is None else (proposals, _PROPOSALS)
            )
            raise ValueError(f"{file} is something else than {expected}: {error}") from error
        if wrong:
            raise ValueError(
                f"{proposals or annotations} has scores that are no number of 0 or more, such as "
                f"{wrong[0]!r}"
            )
        lost = set(owners) - self.images.keys()
        if lost:
            raise ValueError(
                f"{proposals or annotations} has regions of images that {annotations} lacks, such "
                f"as {sorted(map(str, lost))[0]}; give the file of the same split"
            )
        if not Path(images).is_dir():
            raise ValueError(f"{images} is no folder; give that of the split's pictures")
        self._folder = Path(images)
        numbers: dict[Any, list[int]] = {}
        for number, owner in enumerate(owners):
            numbers.setdefault(owner, []).append(number)
        chosen = [
            (self.images[key], [(n, self.regions[n]) for n in numbers[key]])
            for key in list(numbers)[:max_images]
        ]
        super().__init__(chosen, [])

    def file_of(self, entry: Any) -> tuple[Path, tuple[int, int] | None]:
        """Return the picture's file and size."""
        return image_file(self._folder, entry[0]), image_size(entry[0])

    def regions_of(self, entry: Any) -> Iterator[tuple[int, Region, Box | None]]:
        """Yield the regions of a picture, with their numbers."""
        for number, found in entry[1]:
            box = box_of(found.get("bbox"))
            mask = found.get("segmentation") or box
            if mask is None:
                raise SampleError("bad_area", f"region {number} has no mask and no box")
            yield number, mask, box


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0
