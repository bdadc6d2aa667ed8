"""Several stored masks of one image at once: measured and cut as runs, decoded four at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpha_clip.rle import all_runs

_STRIP = 64  # columns turned at a time: what is read and what is written stays in the cache


@dataclass(frozen=True)
class MaskStack:
    """Stored masks of one image, left as runs: measured and cut by these, then decoded together.

    Attributes:
        edges: Of each mask, where its runs of pixels inside start and end, column-major.
        image_height: Height of the image, in pixels.
        window: What is cut out of the image, in pixels: top, left, height, width.
    """

    edges: tuple[NDArray[np.int64], ...]
    image_height: int
    window: tuple[int, int, int, int]

    @classmethod
    def of(
        cls, rles: Sequence[Mapping[str, Any] | None], height: int, width: int
    ) -> MaskStack | None:
        """Return the masks of an image; `None` if one is unsound, empty or of another size.

        Args:
            rles: COCO RLEs, or `None` for the whole image; at least one.
            height: Height of the image, in pixels.
            width: Width of the image, in pixels.
        """
        whole = {"size": [height, width], "counts": [0, height * width]}
        stored = [whole if rle is None else rle for rle in rles]
        try:
            ends = [runs.cumsum() for runs in all_runs(stored)]
        except ValueError:
            return None
        edges = tuple(end[: len(end) // 2 * 2] for end in ends)
        stack = cls(edges, height, (0, 0, height, width))
        fits = all(list(rle["size"]) == [height, width] for rle in stored)
        return stack if fits and all(map(len, edges)) and stack.areas().all() else None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the decoded masks: masks, 1, height, width."""
        return (len(self.edges), 1, *self.window[2:])

    def crop(self, top: int, left: int, height: int, width: int) -> MaskStack:
        """Return the same masks in a window that lies in the image, in pixels of the image."""
        return replace(self, window=(top, left, height, width))

    def areas(self) -> NDArray[np.int64]:
        """Return how many pixels of each mask lie in the window."""
        top, left, height, width = self.window
        columns, rows = np.divmod(np.concatenate(self.edges), self.image_height)
        before = (columns - left) * height + np.clip(rows - top, 0, height)
        before = np.clip(before, 0, height * width)  # pixels of the window that precede each edge
        runs = before[1::2] - before[::2]
        firsts = np.cumsum([0, *(len(edges) // 2 for edges in self.edges[:-1])])
        areas: NDArray[np.int64] = np.add.reduceat(runs, firsts)
        return areas

    def fours(self) -> Iterator[NDArray[np.uint8]]:
        """Yield alphas `[4, height, width]`, 0 or 255; the last mask is repeated up to four.

        The four values of a pixel lie together: so torch resizes them as fast as one.
        """
        for first in range(0, len(self.edges), 4):
            yield self._decode(self.edges[first : first + 4])

    def _decode(self, edges: Sequence[NDArray[np.int64]]) -> NDArray[np.uint8]:
        """Decode up to four masks at once: a pixel is one number of four bytes."""
        top, left, height, width = self.window
        bytes_of = np.eye(4, dtype=np.uint8)[: len(edges)] * np.uint8(255)
        bytes_of[-1, len(edges) :] = 255
        flips = np.repeat(bytes_of.view(np.uint32)[:, 0], [len(e) for e in edges])
        places = np.concatenate(edges)
        order = places.argsort(kind="stable")
        values = np.concatenate([[np.uint32(0)], np.bitwise_xor.accumulate(flips[order])])
        begin, end = left * self.image_height, (left + width) * self.image_height
        seen = np.concatenate([[begin], np.clip(places[order], begin, end), [end]])
        columns = np.repeat(values, seen[1:] - seen[:-1]).reshape(width, self.image_height)
        pixels = np.empty((height, width), np.uint32)
        for x in range(0, width, _STRIP):
            pixels[:, x : x + _STRIP] = columns[x : x + _STRIP, top : top + height].T
        alphas: NDArray[np.uint8] = pixels.view(np.uint8).reshape(height, width, 4)
        return np.moveaxis(alphas, 2, 0)
