"""Pairs of rows that one set of features takes for the same and another tells apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from alpha_clip.evaluation.columns import Columns

_SIMILARITIES = 1 << 24  # held at a time, 4 bytes each
_KEPT = 1_000_000  # most pairs to list; all are counted
_PAIR = np.dtype([("first", "i8"), ("second", "i8"), ("clip", "f4"), ("other", "f4")])


class MinedPairs(NamedTuple):
    """Pairs as `_PAIR`s, the widest gap first; how many there are; which pictures are in one."""

    pairs: NDArray[Any]
    number: int
    paired: NDArray[np.bool_]


def mine_pairs(
    columns: Columns, clip_above: float, other_below: float, device: torch.device
) -> MinedPairs:
    """Find the pairs of rows that are alike in `columns["clip"]` and not in `columns["other"]`.

    Similarities are held block by block, and so are features, which may be mapped from a file.
    """
    clip, other = columns["clip"], columns["other"]
    paired, number = np.zeros(len(clip), bool), 0
    kept, floor = [np.empty(0, _PAIR)], -math.inf
    starts = range(0, len(clip), side := max(1, math.isqrt(_SIMILARITIES)))
    for top, left in ((top, left) for top in starts for left in starts if left >= top):
        ours, theirs = (_tensor(clip[k : k + side], device) for k in (top, left))
        alike = ours @ theirs.T
        close = (alike > clip_above).triu(1 + top - left)  # the second comes after the first
        # The other model is asked about rows and columns with a hit alone, which are few.
        i, j = close.any(1).nonzero()[:, 0], close.any(0).nonzero()[:, 0]
        first, second = top + i.cpu().numpy(), left + j.cpu().numpy()
        apart = _tensor(other[first], device) @ _tensor(other[second], device).T
        alike, close = alike[i][:, j], close[i][:, j]
        blind = (close & (apart < other_below)).cpu().numpy()
        number += int(blind.sum())
        paired[first[blind.any(1)]] = paired[second[blind.any(0)]] = True
        similar, different = alike.cpu().numpy(), apart.cpu().numpy()
        row, column = np.nonzero(blind & (similar - different >= floor))
        found = np.empty(len(row), _PAIR)
        found["first"], found["second"] = first[row], second[column]
        found["clip"], found["other"] = similar[row, column], different[row, column]
        kept.append(found)
        if sum(map(len, kept)) > 2 * _KEPT:
            kept = [_widest(kept)]
            floor = float(kept[0]["clip"][-1] - kept[0]["other"][-1])
    return MinedPairs(_widest(kept), number, paired)


def disjoint(pairs: list[tuple[int, int, float, float]], most: int) -> Iterator[Any]:
    """Yield up to `most` pairs, in order, that share no picture with one before them."""
    used: set[int] = set()
    for pair in islice((p for p in pairs if used.isdisjoint(p[:2])), most):
        used.update(pair[:2])
        yield pair


def _widest(several: list[NDArray[Any]]) -> NDArray[Any]:
    pairs = np.concatenate(several)
    gap = pairs["clip"] - pairs["other"]
    return pairs[np.lexsort((pairs["second"], pairs["first"], -gap))[:_KEPT]]


def _tensor(features: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(features)).to(device)  # a copy: what is mapped is read-only
