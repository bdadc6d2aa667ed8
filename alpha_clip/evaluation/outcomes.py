"""Figures with their uncertainty: a mean of outcomes, and the bootstrap over pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

_AT_A_TIME = 1 << 22  # numbers of a bootstrap held at a time


@dataclass(frozen=True)
class Outcome:
    """What a figure is the mean of.

    Attributes:
        values: One for each region, query or pair; NaN where the question does not arise.
        pictures: The picture of each, numbered from 0: what the bootstrap draws.
        groups: The class of each, numbered from 0, where the figure is the mean over classes of
            their means ("mean per class"); classes without values do not count.
        weights: How much each counts; by default as much as any other.
    """

    values: Float64[NDArray[np.float64], " rows"]
    pictures: Int64[NDArray[np.int64], " rows"]
    groups: Int64[NDArray[np.int64], " rows"] | None = None
    weights: Float64[NDArray[np.float64], " rows"] | None = None

    def mean(self) -> float:
        """Return the figure; NaN without any values."""
        values, groups, weights, _ = self._rows()
        return float(_means(values * weights, weights, groups)[0])

    def interval(
        self, replicates: int = 1000, level: float = 0.95, seed: int = 0
    ) -> tuple[float, float]:
        """Say between which bounds the figure would lie, had other pictures been drawn.

        Whole pictures are drawn, with replacement: regions of one picture are not independent.
        Each picture is drawn a Poisson number of times, which for many pictures is the same and
        needs no more memory than the rows themselves.

        Args:
            replicates: How often to draw.
            level: Share of the replicates between the bounds, which are percentiles.
            seed: Of the draws.

        Returns:
            Lower and upper bound; NaN without any values.
        """
        values, groups, weights, pictures = self._rows()
        if not len(values):
            return float("nan"), float("nan")
        which, pictures = np.unique(pictures, return_inverse=True)
        rng = np.random.default_rng(seed)
        rounds = max(1, _AT_A_TIME // len(values))
        drawn: list[NDArray[np.float64]] = []
        for first in range(0, replicates, rounds):
            size = (min(rounds, replicates - first), len(which))
            times = rng.poisson(1.0, size)[:, pictures] * weights
            drawn.append(_means(times * values, times, groups))
        tail = 50 * (1 - level)
        low, high = np.nanpercentile(np.concatenate(drawn), [tail, 100 - tail])
        return float(low), float(high)

    def by_group(self) -> dict[int, tuple[float, int]]:
        """Return class -> mean and number of values, for the classes that have some."""
        values, groups, weights, _ = self._rows()
        if groups is None:
            raise ValueError("this figure is no mean over classes")
        found = np.bincount(groups)
        sums, total = (np.bincount(groups, w) for w in (values * weights, weights))
        return {int(g): (float(sums[g] / total[g]), int(found[g])) for g in np.flatnonzero(found)}

    def _rows(
        self,
    ) -> tuple[
        NDArray[np.float64], NDArray[np.int64] | None, NDArray[np.float64], NDArray[np.int64]
    ]:
        """Return values, groups, weights and pictures where there is a value."""
        there = ~np.isnan(self.values)
        weights = np.ones(len(self.values)) if self.weights is None else self.weights
        groups = None if self.groups is None else self.groups[there]
        return self.values[there], groups, weights[there], self.pictures[there]


def _means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], groups: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """Return the mean of each replicate: over its rows, or over its groups' means.

    Args:
        sums: Weighted values, `[rows]` or `[replicates, rows]`.
        counts: Weights, of the same shape.
        groups: The group of each row.
    """
    sums, counts = np.atleast_2d(sums), np.atleast_2d(counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        if groups is None:
            total: NDArray[np.float64] = sums.sum(1) / counts.sum(1)
            return total
        _, groups = np.unique(groups, return_inverse=True)
        number = int(groups.max()) + 1 if len(groups) else 0
        means = [
            np.bincount(groups, s, number) / np.bincount(groups, c, number)
            for s, c in zip(sums, counts, strict=True)
        ]
        found = [m[np.isfinite(m)] for m in means]  # a class that was not drawn does not count
        return np.array([m.mean() if len(m) else np.nan for m in found])
