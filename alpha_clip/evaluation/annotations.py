"""Pictures in a folder with regions from an annotation file, in pieces of bounded size."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alpha_clip.drops import Drops
from alpha_clip.evaluation.labelled import LabelledPicture, LabelledRegion, LabelledRegions
from alpha_clip.regions import (
    IMAGE_EXTENSIONS,
    Box,
    Region,
    SampleError,
    encode_rle,
    read_picture,
    region_to_alpha,
)

_PART = 256  # pictures in a part


class FolderRegions(LabelledRegions):
    """Pictures in files, each with an entry that tells its regions.

    Args:
        entries: One for each picture, of any kind; a subclass knows it.
        names: The names of the classes.
    """

    def __init__(self, entries: list[Any], names: list[str]) -> None:
        self._entries = entries
        self._names = names
        stretches = range(0, len(entries), _PART)
        self._parts = {named(i, entries[i : i + _PART]): i for i in stretches}

    @property
    def names(self) -> list[str]:
        """The names of the classes, in order."""
        return self._names

    def parts(self) -> dict[str, int]:
        """Return stretches of the list of pictures."""
        count = len(self._entries)
        return {part: min(_PART, count - first) for part, first in self._parts.items()}

    def pictures(self, part: str, drops: Drops) -> Iterator[LabelledPicture]:
        """Yield the pictures of a stretch."""
        for entry in self._entries[(first := self._parts[part]) : first + _PART]:
            try:
                file, size = self.file_of(entry)
                image = open_picture(file, size)
                found = list(self.regions_of(entry))
            except SampleError as error:
                drops.add(error.reason, error.detail)
                continue
            regions = []
            for label, region, box in found:
                try:
                    regions.append(labelled(label, region, box, image))
                except (TypeError, ValueError) as error:
                    drops.add("bad_rle", f"{file}: {error}")
            yield LabelledPicture(image, regions)

    @abstractmethod
    def file_of(self, entry: Any) -> tuple[Path, tuple[int, int] | None]:
        """Return where the picture of an entry is, and the width and height it should have.

        Raises:
            SampleError: If the entry can't be used.
        """

    @abstractmethod
    def regions_of(self, entry: Any) -> Iterator[tuple[int, Region, Box | None]]:
        """Yield class, region and box (`None`: the region's own) of an entry.

        Raises:
            SampleError: If the entry can't be used.
        """


def named(number: int, entries: list[Any]) -> str:
    """Return the name of a part: entries that were edited are another one, and scored again."""
    digest = hashlib.sha256(json.dumps(entries, default=str).encode()).hexdigest()
    return f"{number:08d}-{digest[:8]}"


def pictures_in(folder: Path) -> list[str]:
    """Return the pictures in a folder, at any depth, by name; none that is hidden.

    Raises:
        ValueError: If there is none.
    """
    paths = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    seen = (path for path in paths if not any(part.startswith(".") for part in path.parts))
    found = sorted(p.as_posix() for p in seen if p.suffix.lower()[1:] in IMAGE_EXTENSIONS)
    if not found:
        raise ValueError(f"{folder} has no picture; expected some ({', '.join(IMAGE_EXTENSIONS)})")
    return found


def file_stamp(file: Path) -> list[int]:
    """Return what changes when a file is edited: its size and time."""
    return [file.stat().st_size, file.stat().st_mtime_ns]


def inside(folder: Path, name: str) -> Path:
    """Return a file of a folder by the name that an annotation gives.

    Raises:
        SampleError: If it would lie elsewhere.
    """
    if not name or name.startswith(("/", "\\")) or ".." in Path(name).parts:
        raise SampleError("missing_image", f"{name!r} is no file inside {folder}")
    return folder / name


def open_picture(file: Path, size: tuple[int, int] | None) -> Image.Image:
    """Read a picture, RGB; see `read_picture`.

    Raises:
        SampleError: If it is missing, damaged, too large or of another size; it names the file.
    """
    try:
        return read_picture(file.read_bytes(), size)
    except OSError as error:
        raise SampleError("missing_image", f"{file}: {error.strerror}") from error
    except SampleError as error:
        raise SampleError(error.reason, f"{file}: {error.detail}") from error


def labelled(label: int, region: Region, box: Box | None, image: Image.Image) -> LabelledRegion:
    """Rasterise a region of a picture; its box is what was given or that of its pixels.

    Raises:
        TypeError, ValueError: If the region is malformed, empty, or does not fit the picture.
    """
    alpha: NDArray[np.uint8] = region_to_alpha(region, image.height, image.width)
    mask = alpha > 127
    if not mask.any():
        raise ValueError("the region selects no pixel")
    if box is None:
        ys, xs = np.nonzero(mask)
        box = Box(float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
    box.pixels(image.height, image.width)
    return LabelledRegion(label, encode_rle(mask), box)


def box_of(xywh: Any) -> Box | None:
    """Return COCO's `[x, y, width, height]` in px as a box; `None` if it is none or has no area."""
    if not isinstance(xywh, list) or len(xywh) != 4:
        return None
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in xywh):
        return None
    x, y, width, height = xywh
    return Box(x, y, x + width, y + height) if width > 0 and height > 0 else None


def read_json(file: str, expected: str) -> Any:
    """Return the content of an annotation file.

    Raises:
        ValueError: If there is none, or it is no JSON.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            return json.load(stream)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read, expected {expected}: {error}") from error
