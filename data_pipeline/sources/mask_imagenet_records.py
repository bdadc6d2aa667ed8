"""What a record of MaskImageNet says: a picture, a mask, a box and a caption.

The published annotations are lists, of which the paper's own reader uses four elements: `[2]` the
picture's path, `[3]` the mask as COCO RLE, `[4]` the box `[x, y, width, height]` in pixels and
`[6]` the caption (SunzeY/AlphaCLIP, train/dataset/mask_image.py). Objects that name the same things
are read as well.
"""

from __future__ import annotations

import re
from typing import Any, TypeAlias

from alpha_clip.regions import SampleError, decode_rle, encode_rle, rle_area
from data_pipeline.filters import box_around
from data_pipeline.sources.masked import MaskedRegion

_Box: TypeAlias = tuple[float, float, float, float]

# Place in a list, names in an object.
_PATH = (2, ("image_pth", "image_path", "path", "image"))
_MASK = (3, ("mask", "segmentation"))
_BOX = (4, ("bbox", "box"))
_CAPTION = (6, ("caption", "text"))

# A class and a file's name: no "..", nothing hidden, nothing that leads elsewhere.
_PICTURE = re.compile(r"(?:.*/)?(n\d{8}/(?!\.)[\w.-]+)", re.ASCII | re.DOTALL)
_ROUNDING_PX = 1.5  # boxes that overshoot by less are rounded ones


def picture_of(record: Any) -> str:
    """Return a record's picture, such as `n01440764/n01440764_10026.JPEG`.

    Only the last two parts of its path count, so that no record leads out of a folder of pictures.

    Raises:
        SampleError: `bad_json` if it is neither a list nor an object with a path, `bad_path` if
            the path does not end in a class and a file.
    """
    path = _field(record, _PATH)
    if not isinstance(path, str):
        raise SampleError(
            "bad_json",
            f"expected a list with a path as its third element, got {repr(record)[:200]}",
        )
    match = _PICTURE.fullmatch(path)
    if match is None:
        raise SampleError(
            "bad_path", f"expected .../n01440764/n01440764_10026.JPEG, got {path[:200]!r}"
        )
    return match[1]


def region_of(record: Any, rid: int, name: str, size: tuple[int, int]) -> MaskedRegion:
    """Return a record's region.

    The box is the record's own, or, where that is missing, outside the picture by rounding or
    without area, as SAM's box of a line is, that of the mask. A full stop at the caption's end is
    taken off, so that the class name can be put behind it.

    Args:
        record: The record.
        rid: The region's number in the picture.
        name: What it shows, in words.
        size: The picture's width and height in pixels.

    Raises:
        SampleError: `bad_rle`, `rle_size` (another picture's mask), `bad_box`, `bad_caption` if it
            is no text, or `empty_caption`.
    """
    counts, area = _mask(_field(record, _MASK), size)
    rle = {"size": [size[1], size[0]], "counts": counts}
    box = _box(_field(record, _BOX), size) or box_around(decode_rle(rle))
    return MaskedRegion(rid, name, box, rle, area, caption=_caption(_field(record, _CAPTION)))


def _field(record: Any, field: tuple[int, tuple[str, ...]]) -> Any:
    place, names = field
    if isinstance(record, list):
        return record[place] if place < len(record) else None
    if isinstance(record, dict):
        return next((record[name] for name in names if name in record), None)
    return None


def _mask(given: Any, size: tuple[int, int]) -> tuple[str, int]:
    """Return a checked mask's counts, compressed, and its area."""
    if not isinstance(given, dict):
        raise SampleError("bad_rle", f"expected a COCO RLE, got {repr(given)[:200]}")
    try:
        area = rle_area(given)
    except ValueError as error:
        raise SampleError("bad_rle", str(error)) from error
    if tuple(given["size"]) != size[::-1]:
        raise SampleError("rle_size", f"mask size {given['size']} of a picture of {size} (W, H)")
    if area == 0:
        raise SampleError("bad_rle", "the mask is empty")
    counts = given["counts"]
    return counts if isinstance(counts, str) else encode_rle(decode_rle(given))["counts"], area


def _box(given: Any, size: tuple[int, int]) -> _Box | None:
    """Return a box xywh as xyxy, or `None` if the mask has to tell."""
    if given is None:
        return None
    if not (isinstance(given, list) and len(given) == 4 and all(map(_is_number, given))):
        raise SampleError("bad_box", f"expected [x, y, width, height], got {repr(given)[:200]}")
    x1, y1, wide, high = map(float, given)
    x2, y2, (width, height) = x1 + wide, y1 + high, size
    outside = max(-x1, -y1, x2 - width, y2 - height)
    if min(wide, high) < 0 or outside > _ROUNDING_PX:
        raise SampleError("bad_box", f"{given} (x, y, width, height) in a picture of {size} (W, H)")
    return (x1, y1, x2, y2) if outside <= 0 and x1 < x2 and y1 < y2 else None


def _caption(given: Any) -> str:
    if given is not None and not isinstance(given, str):
        raise SampleError("bad_caption", f"expected a text, got {repr(given)[:200]}")
    caption = " ".join((given or "").split()).rstrip(" .")
    if not caption:
        raise SampleError("empty_caption", f"nothing is said: {given!r}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can carry, UTF-8 can't
        raise SampleError("bad_caption", str(error)) from error
    return caption


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e12  # false for NaN, too
