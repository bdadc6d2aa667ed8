"""Pictures that come twice in a shard: other size, other JPEG quality, same picture.

A picture is cut into 9 x 8 fields. Its difference hash (N. Krawetz, "Kind of Like That", 2013) has
a bit for each pair of neighbours in a row: whether the right one is brighter. Bits that are close
make a candidate; then the fields' mean colours must agree, too, because a plain picture has hardly
a bit set and would match every other plain picture. All of it is whole-number arithmetic, so
every platform finds the same repetitions.

On 96 photographs, encoded again at quality 30 to 90 and 0.2 to 1.5 times the size, at most 4 bits
changed in 471 of 480 copies and at most 9 in all of them; two different photographs differed in at
least 11, their colours by at least 0.7 of the contrast (copies: at most 0.15).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from alpha_clip.regions import SampleError

HASH_BITS = 64
_ROWS, _COLUMNS = 8, 9
_LUMA = np.array([299, 587, 114])  # ITU-R BT.601, in thousandths
_UNIT = 256  # mean colours are kept in this fraction of a level: 255 * 256 fits 16 bits
_CONTRAST_SHARE = 3  # colours may differ by a third of the picture's own contrast ...
_LEVELS = 2  # ... and by so much in a flat picture, as JPEG changes it


class NearDuplicates:
    """Remembers the pictures of one shard, to tell when one comes again.

    Args:
        bits: Bits of 64 that may differ in a repetition; `None` finds none and remembers nothing.
    """

    def __init__(self, bits: int | None) -> None:
        self.bits = bits
        self._hashes = b""  # 8 bytes a picture
        self._fields: list[NDArray[np.uint16]] = []

    def check(self, rgb: NDArray[np.uint8]) -> None:
        """Remember a picture, unless it repeats one that is remembered.

        Args:
            rgb: Picture `[H, W, 3]`.

        Raises:
            SampleError: `near_duplicate_image`.
        """
        if self.bits is None:
            return
        fields = mean_colours(rgb)
        code = difference_hash(fields)
        earlier = np.frombuffer(self._hashes, np.uint8).reshape(-1, HASH_BITS // 8)
        distances = np.unpackbits(earlier ^ code, axis=1).sum(axis=1, dtype=np.uint8)
        for index in np.flatnonzero(distances <= self.bits):
            if _same_colours(fields, self._fields[index]):
                raise SampleError(
                    "near_duplicate_image",
                    f"{distances[index]} of {HASH_BITS} bits from picture {index} of those kept "
                    f"before in this shard, near_duplicate_bits is {self.bits}",
                )
        self._hashes += code.tobytes()
        self._fields.append(fields)


def mean_colours(rgb: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Return the mean colour of each field of a picture.

    Args:
        rgb: Picture `[H, W, 3]`, at least 1 x 1.

    Returns:
        Fields `[8, 9, 3]`, in 1/256 of a level, rounded down.
    """
    height, width = rgb.shape[:2]
    tops = np.arange(_ROWS + 1) * height // _ROWS
    lefts = np.arange(_COLUMNS + 1) * width // _COLUMNS
    # A picture smaller than the grid gives some of its pixels to several fields.
    bands = [rgb[y : max(end, y + 1)] for y, end in pairwise(tops)]
    sums = np.stack([band.sum(axis=0, dtype=np.uint32) for band in bands])
    sums = np.add.reduceat(sums, lefts[:-1], axis=1, dtype=np.int64)
    pixels = np.outer(np.maximum(np.diff(tops), 1), np.maximum(np.diff(lefts), 1))
    fields: NDArray[np.uint16] = (sums * _UNIT // pixels[..., None]).astype(np.uint16)
    return fields


def difference_hash(fields: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Return the 64 bits of a picture's fields `[8, 9, 3]`, as 8 bytes."""
    grey = fields.astype(np.int64) @ _LUMA
    return np.packbits(grey[:, 1:] > grey[:, :-1])


def _same_colours(fields: NDArray[np.uint16], others: NDArray[np.uint16]) -> bool:
    levels = fields.astype(np.int64)
    contrast = int(((levels - levels.sum(axis=(0, 1)) // (_ROWS * _COLUMNS)) ** 2).sum())
    allowed = max(contrast // _CONTRAST_SHARE**2, levels.size * (_LEVELS * _UNIT) ** 2)
    return int(((levels - others) ** 2).sum()) <= allowed
