"""Where objects lie to one another, and how that narrows down which one is meant.

ReCLIP's heuristics (arXiv 2204.05991, section 3.2): an expression becomes an entity with relations
to others and with superlatives. CLIP says how likely each box is for a text; relations between
boxes multiply that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float64]

# ReCLIP's words, as its code and that of Alpha-CLIP have them.
RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left", "west"),
    "right": ("right", "east"),
    "above": ("above", "north", "top", "back", "behind"),
    "below": ("below", "south", "under", "front"),
    "bigger": ("bigger", "larger", "closer"),
    "smaller": ("smaller", "tinier", "further"),
    "within": ("inside", "within", "contained"),
}
BETWEEN = "between"
SUPERLATIVES: dict[str, tuple[str, ...]] = {
    "left": ("left", "west", "leftmost", "western"),
    "right": ("right", "rightmost", "east", "eastern"),
    "above": ("above", "north", "top"),
    "below": ("below", "south", "underneath", "front"),
    "bigger": ("bigger", "biggest", "larger", "largest", "closer", "closest"),
    "smaller": ("smaller", "smallest", "tinier", "tiniest", "further", "furthest"),
}
EMPTY_WORDS = ("part", "image", "side", "picture", "half", "region", "section")
"""What has no place of its own: "the left side of the picture"."""


@dataclass(frozen=True)
class Entity:
    """An object as an expression describes it.

    Attributes:
        text: What to look for.
        relations: Name of a relation, and the entities that it is to: one, or two for `between`.
        superlatives: Names of relations that it has to all others like it.
    """

    text: str
    relations: tuple[tuple[str, tuple[Entity, ...]], ...] = ()
    superlatives: tuple[str, ...] = ()

    def texts(self) -> Iterator[str]:
        """Yield the texts to look for, its own and those of what it relates to."""
        yield self.text
        for _, others in self.relations:
            for other in others:
                yield from other.texts()


def relation_of(words: list[str], table: Mapping[str, tuple[str, ...]]) -> str | None:
    """Return the first relation of a table that one of the words stands for."""
    return next((name for name, known in table.items() if any(w in known for w in words)), None)


def locate(
    entity: Entity, likeness: Mapping[str, Probabilities], boxes_xyxy_px: NDArray[np.float64]
) -> Probabilities:
    """Return how likely each box is to be an entity.

    Args:
        entity: What is looked for.
        likeness: For each of its `texts`, how likely each box is by its looks alone.
        boxes_xyxy_px: The boxes `[N, 4]`.

    Returns:
        Probabilities `[N]`.
    """
    found = likeness[entity.text]
    for name, others in entity.relations:
        where = [locate(other, likeness, boxes_xyxy_px) for other in others]
        if name == BETWEEN:
            found = _renormalised(found * _between(boxes_xyxy_px, where[0], where[1]), found)
        else:
            found = _renormalised(found * (related(name, boxes_xyxy_px) @ where[0]), found)
    for name in entity.superlatives:
        found = _renormalised(found * (related(name, boxes_xyxy_px) @ found), found)
    return found


def _renormalised(found: Probabilities, before: Probabilities) -> Probabilities:
    """Return probabilities of sum 1; where no box is left, the relation says nothing."""
    total = found.sum()
    return found / total if total > 0 else before


def related(name: str, boxes_xyxy_px: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how much each box has a relation to each other one, `[N, N]` in 0..1."""
    x1, y1, x2, y2 = boxes_xyxy_px.T
    if name == "within":
        corners = boxes_xyxy_px[:, None], boxes_xyxy_px[None]
        inside: NDArray[np.float64] = _overlap(*corners) / _area(boxes_xyxy_px)[:, None]
        return inside
    size = {"left": -(x1 + x2), "right": x1 + x2, "above": -(y1 + y2), "below": y1 + y2}
    area = _area(boxes_xyxy_px)
    order: NDArray[np.float64] = {**size, "bigger": area, "smaller": -area}[name]
    more: NDArray[np.bool_] = order[:, None] > order[None]
    return more.astype(np.float64)


def _between(boxes: NDArray[np.float64], one: Probabilities, other: Probabilities) -> Probabilities:
    """Return how much of each box lies in the box around two others, by where those may be."""
    first, second = boxes[:, None], boxes[None]
    low, high = np.minimum(first, second)[..., :2], np.maximum(first, second)[..., 2:]
    around = np.concatenate([low, high], -1)
    weights = one[:, None] * other[None]
    np.fill_diagonal(weights, 0)
    found = np.empty(len(boxes))
    for i, box in enumerate(boxes):
        share = _overlap(box, around) / _area(box)
        share[i] = share[:, i] = 0  # a box is not between itself and another
        found[i] = (share * weights).sum()
    return found


def _area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    sides: NDArray[np.float64] = (boxes[..., 2:] - boxes[..., :2]).clip(min=0)
    area: NDArray[np.float64] = sides[..., 0] * sides[..., 1]
    return area


def _overlap(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])
    return _area(np.concatenate([low, high], -1))
