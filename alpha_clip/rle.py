"""COCO run-length masks, checked before any of their content reaches C code.

`pycocotools` trusts the run lengths it is given and writes past its buffer when they lie; here the
runs are parsed with NumPy, compared with the stated size, and only then decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

_MAX_PIXELS = 1 << 28  # 16k x 16k; pycocotools counts in 32 bits
_MAX_BYTES_A_RUN = 7  # 5 bits each: enough for any 32-bit run
_GROUPS = np.arange(64) & 31  # of a character: five bits, those of a run's last one signed
_GROUPS[16:32] -= 32


def encode_rle(mask: NDArray[Any]) -> dict[str, Any]:
    """Encode a mask as COCO's compressed RLE with text counts.

    Args:
        mask: Array `[H, W]`; every non-zero pixel belongs to the region.

    Returns:
        `{"size": [H, W], "counts": str}`, ready for JSON.

    Raises:
        ValueError: If `mask` is not two-dimensional.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask must have shape [H, W], got {list(mask.shape)}")
    inside = mask if mask.dtype == bool else mask != 0
    rle = coco_mask.encode(np.asfortranarray(inside.view(np.uint8)))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Decode a COCO RLE, compressed or not, after checking every run.

    Args:
        rle: `{"size": [H, W], "counts": str | bytes | list[int]}`.

    Returns:
        The mask `[H, W]`.

    Raises:
        ValueError: If the size is not two positive integers, or the runs are malformed, negative,
            or do not sum to `H * W`.
    """
    height, width = _size(rle)
    runs = rle_runs(rle)
    inside = np.arange(len(runs)) % 2 == 1
    mask: NDArray[np.bool_] = np.repeat(inside, runs).reshape(width, height).T
    return mask


def rle_area(rle: Mapping[str, Any]) -> int:
    """Return the number of pixels inside a COCO RLE; raises as `decode_rle` does."""
    return int(rle_runs(rle)[1::2].sum())


def rle_areas(rles: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return what `rle_area` does, of several masks at once, which is quicker.

    Raises:
        ValueError: As `decode_rle` does, because of any one of them.
    """
    return [int(runs[1::2].sum()) for runs in all_runs(rles)]


def rle_runs(rle: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return the checked run lengths (column-major, first outside); raises as `decode_rle` does."""
    return all_runs([rle])[0]


def all_runs(rles: Sequence[Mapping[str, Any]]) -> list[NDArray[np.int64]]:
    """Return what `rle_runs` does, of several masks at once, which is quicker.

    Raises:
        ValueError: As `decode_rle` does, because of any one of them.
    """
    sizes = [_size(rle) for rle in rles]
    counts = [rle.get("counts") for rle in rles]
    texts = iter(_parse_texts([c for c in counts if isinstance(c, str | bytes)]))
    runs = [next(texts) if isinstance(c, str | bytes) else _read_list(c) for c in counts]
    for lengths, (height, width) in zip(runs, sizes, strict=True):
        if (lengths < 0).any():
            raise ValueError(f"RLE runs must not be negative, got {int(lengths.min())}")
        if int(lengths.sum()) != height * width:
            raise ValueError(
                f"RLE runs must sum to height * width = {height} * {width} = {height * width}, "
                f"got {int(lengths.sum())}; the mask is damaged or belongs to another image"
            )
    return runs


def _size(rle: Mapping[str, Any]) -> tuple[int, int]:
    size = rle.get("size")
    if (
        not isinstance(size, Sequence)
        or len(size) != 2
        or not all(isinstance(v, int | np.integer) and v > 0 for v in size)
        or int(size[0]) * int(size[1]) > _MAX_PIXELS
    ):
        raise ValueError(
            f"RLE size must be [height, width], whole numbers above 0 with a product of at most "
            f"{_MAX_PIXELS}, got {_brief(size)}"
        )
    return int(size[0]), int(size[1])


def _read_list(counts: Any) -> NDArray[np.int64]:
    if isinstance(counts, Sequence) and all(type(c) is int and abs(c) < 1 << 32 for c in counts):
        return np.array(counts, np.int64)
    raise ValueError(
        f"RLE counts must be a string or a list of whole numbers, got {_brief(counts)}"
    )


def _parse_texts(texts: Sequence[str | bytes]) -> list[NDArray[np.int64]]:
    """Undo COCO's text code: 5-bit groups, sign extended, differences two runs back."""
    raws = [t.encode("utf-8", "surrogatepass") if isinstance(t, str) else t for t in texts]
    if not raws:
        return []
    code = np.frombuffer(b"".join(raws), np.uint8) - np.uint8(48)  # below 48, it wraps around
    ends = np.cumsum([len(raw) for raw in raws])
    if not all(raws) or code.max() > 63 or (code[ends - 1] & 32).any():
        got = _brief(texts if len(texts) > 1 else texts[0])
        raise ValueError(f"RLE counts are not COCO's compressed text, got {got}")
    last = np.flatnonzero(code < 32)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if int(length.max()) > _MAX_BYTES_A_RUN:
        raise ValueError("RLE counts hold a run of more than 32 bits; the mask is damaged")
    place = np.arange(code.size) - np.repeat(first, length)
    values = np.add.reduceat(_GROUPS[code] << (5 * place), first)
    stops = np.searchsorted(last, ends).tolist()
    parts = [values[i:j] for i, j in pairwise([0, *stops])]
    for part in parts:  # from the fourth run on, the text holds differences
        part[1::2] = np.cumsum(part[1::2])
        part[2::2] = np.cumsum(part[2::2])
    return parts


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
