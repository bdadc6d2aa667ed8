"""Region matching: is a region closest to its own phrase, of all phrases and of its picture's?

One metric for validation during training and for benchmarks, so that both give the same figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

# Similarities held at a time (4 bytes each). Pictures hold few regions, so a large block of rows
# sorted by picture would mostly compare regions of different pictures, for nothing.
_ALL = 1 << 24
_ONE_PICTURE = 1 << 18


class RegionMatching(Metric):
    """Accuracy of regions against phrases, and how alike the regions of one picture look.

    Features and ids of all rows are kept until `reset`, in fp32. Over several processes the figures
    are those of the joined rows; a process may have any number of rows, also none.
    """

    is_differentiable = False
    full_state_update = False

    image_features: list[Tensor]
    text_features: list[Tensor]
    phrase_ids: list[Tensor]
    image_ids: list[Tensor]

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=_gather_rows)
        for state in ("image_features", "text_features", "phrase_ids", "image_ids"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(
        self,
        image_features: Float[Tensor, "rows dim"],
        text_features: Float[Tensor, "rows dim"],
        phrase_ids: Int[Tensor, " rows"],
        image_ids: Int[Tensor, " rows"],
    ) -> None:
        """Add regions.

        Args:
            image_features: Features of regions, of length 1.
            text_features: Features of their phrases, of length 1.
            phrase_ids: A number for each phrase; equal numbers are equal phrases.
            image_ids: A number for the picture of each region, unique over all processes.

        Raises:
            ValueError: If the rows do not belong together.
        """
        rows, ids = image_features.shape, (len(image_features),)
        if image_features.ndim != 2 or text_features.shape != rows:
            raise ValueError(
                "expected image and text features of one shape [rows, dim], got "
                f"{list(rows)} and {list(text_features.shape)}"
            )
        if phrase_ids.shape != ids or image_ids.shape != ids:
            raise ValueError(
                f"expected a phrase id and an image id for each of {len(image_features)} rows, got "
                f"shapes {list(phrase_ids.shape)} and {list(image_ids.shape)}"
            )
        self.image_features.append(image_features.detach().float())
        self.text_features.append(text_features.detach().float())
        self.phrase_ids.append(phrase_ids.long())
        self.image_ids.append(image_ids.long())

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the figures; one that there are no rows for is NaN.

        Returns:
            `region_top1`: share of regions that are closest to their own phrase, of all distinct
            phrases of the set.
            `within_image_top1`: the same among the distinct phrases of the region's picture; only
            pictures with at least two count.
            `within_image_chance`: what blind guessing would reach there.
            `within_image_cosine`: mean cosine between two regions of one picture with different
            phrases. Features that tell what alpha marks are far from 1.

        Raises:
            ValueError: If a feature is NaN or infinite.
        """
        states = (self.image_features, self.text_features, self.phrase_ids, self.image_ids)
        if not len(states[0]) or not len(dim_zero_cat(states[0])):
            nothing = torch.full((), torch.nan, device=self.device)
            return dict.fromkeys(_FIGURES, nothing)
        images, texts, phrase_ids, image_ids = (dim_zero_cat(state) for state in states)
        bad = int((~(images.isfinite() & texts.isfinite()).all(1)).sum())
        if bad:
            raise ValueError(
                f"{bad} of {len(images)} rows have NaN or infinite features; a diverged training "
                "or an overflow in fp16 does that"
            )
        image_ids, order = image_ids.sort()
        images, texts, phrase_ids = images[order], texts[order], phrase_ids[order]
        with torch.autocast(images.device.type, enabled=False):
            candidates, phrase = _distinct(phrase_ids)
            everywhere = torch.zeros_like(phrase), torch.full_like(phrase, len(candidates))
            right = _own_is_closest(images, texts[candidates], phrase, *everywhere, _ALL)
            within = match_within_images(images, texts, phrase, image_ids)
        several = within.phrases > 1
        figures = (
            right.float().mean(),
            within.right[several].float().mean(),
            (1 / within.phrases[several].float()).mean(),
            within.cosines.sum() / within.others.sum(),
        )
        return dict(zip(_FIGURES, figures, strict=True))


_FIGURES = ("region_top1", "within_image_top1", "within_image_chance", "within_image_cosine")


class WithinImage(NamedTuple):
    """How regions do among those of their own picture, row by row.

    Attributes:
        right: Whether a region's own phrase is the closest of its picture's phrases.
        phrases: How many distinct phrases its picture has.
        cosines: Sum of its cosines with the picture's regions that have another phrase.
        others: How many those are.
    """

    right: Bool[Tensor, " rows"]
    phrases: Int[Tensor, " rows"]
    cosines: Float[Tensor, " rows"]
    others: Int[Tensor, " rows"]


def match_within_images(
    images: Float[Tensor, "rows dim"],
    texts: Float[Tensor, "rows dim"],
    phrase: Int[Tensor, " rows"],
    image_ids: Int[Tensor, " rows"],
) -> WithinImage:
    """Compare the regions of each picture with one another.

    Args:
        images: Features of regions, of length 1.
        texts: Features of their phrases.
        phrase: The phrases, numbered from 0.
        image_ids: The pictures, ascending.
    """
    _, picture, regions = torch.unique_consecutive(
        image_ids, return_inverse=True, return_counts=True
    )
    phrases = int(phrase.max()) + 1
    chosen, own = _distinct(picture * phrases + phrase)  # sorted by picture, like the rows
    in_picture = torch.bincount(picture[chosen], minlength=len(regions))
    start, stop = _ranges(in_picture, picture)
    right = _own_is_closest(images, texts[chosen], own, start, stop, _ONE_PICTURE)

    start, stop = _ranges(regions, picture)
    cosines, others = [], []
    for rows, columns in _blocks(start, stop, _ONE_PICTURE):
        other = _inside(start[rows], stop[rows], columns)
        other &= phrase[rows, None] != phrase[columns]
        cosines.append((images[rows] @ images[columns].T).masked_fill(~other, 0).sum(1))
        others.append(other.sum(1))
    return WithinImage(right, in_picture[picture], torch.cat(cosines), torch.cat(others))


def _own_is_closest(
    images: Tensor, candidates: Tensor, own: Tensor, start: Tensor, stop: Tensor, limit: int
) -> Tensor:
    """Say of each row whether its own candidate is the closest of `start..stop`."""
    right = []
    for rows, columns in _blocks(start, stop, limit):
        scores = images[rows] @ candidates[columns].T
        scores.masked_fill_(~_inside(start[rows], stop[rows], columns), -torch.inf)
        right.append(scores.argmax(-1) + columns.start == own[rows])
    return torch.cat(right)


def _distinct(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each distinct number occurs first, ascending by number, and which each is."""
    distinct, which = numbers.unique(return_inverse=True)
    places = torch.arange(len(numbers), device=numbers.device)
    first = torch.full_like(distinct, len(numbers)).scatter_reduce(0, which, places, "amin")
    return first, which


def _ranges(sizes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range of each row's group, where groups of these sizes lie one after another."""
    ends = sizes.cumsum(0)
    return (ends - sizes)[group], ends[group]


def _inside(start: Tensor, stop: Tensor, columns: slice) -> Tensor:
    place = torch.arange(columns.start, columns.stop, device=start.device)
    return (place >= start[:, None]) & (place < stop[:, None])


def _blocks(start: Tensor, stop: Tensor, limit: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows with the columns they need, ascending, at most `limit` of rows x columns.

    A single row may need more than that.
    """
    starts, stops = start.tolist(), stop.tolist()
    first = 0
    for row in range(1, len(starts) + 1):
        wanted = (row + 1 - first) * (stops[row] - starts[first]) if row < len(starts) else limit
        if row == len(starts) or wanted > limit:
            yield slice(first, row), slice(starts[first], stops[row - 1])
            first = row


def _gather_rows(rows: Tensor, group: Any = None) -> list[Tensor]:
    """Gather rows of all processes.

    torchmetrics takes a process without rows to have an empty fp32 vector, which fits neither
    features, which have a width, nor ids.
    """
    width = rows.shape[1] if rows.ndim == 2 else 0
    whole = int(rows.dtype == torch.int64)
    kind = torch.tensor([width, whole], device=rows.device)
    dist.all_reduce(kind, dist.ReduceOp.MAX, group)
    width, whole = (int(v) for v in kind)
    if not len(rows):
        rows = rows.new_empty(
            (0, width) if width else (0,), dtype=torch.int64 if whole else rows.dtype
        )
    gathered: list[Tensor] = gather_all_tensors(rows, group)
    return gathered
