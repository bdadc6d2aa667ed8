from itertools import product

import numpy as np
import pytest

from alpha_clip.evaluation.spatial_relations import (
    RELATIONS,
    SUPERLATIVES,
    Entity,
    locate,
    related,
    relation_of,
)

BOXES = np.random.default_rng(0).uniform(1, 50, (7, 4)).cumsum(1)[:, [0, 1, 2, 3]]
RULES = {
    "left": lambda a, b: a[0] + a[2] < b[0] + b[2],
    "right": lambda a, b: a[0] + a[2] > b[0] + b[2],
    "above": lambda a, b: a[1] + a[3] < b[1] + b[3],
    "below": lambda a, b: a[1] + a[3] > b[1] + b[3],
    "bigger": lambda a, b: area(a) > area(b),
    "smaller": lambda a, b: area(a) < area(b),
    "within": lambda a, b: overlap(a, b) / area(a),
}


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def random_likeness(*texts):
    rng = np.random.default_rng(1)
    return {text: rng.dirichlet(np.ones(len(BOXES))) for text in texts}


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_are_what_their_rules_say(name):
    expected = [[float(RULES[name](a, b)) for b in BOXES] for a in BOXES]
    assert related(name, BOXES) == pytest.approx(np.array(expected))
    assert 0 < np.sum(expected) < len(BOXES) ** 2


def test_a_relation_multiplies_by_where_the_other_may_be():
    likeness = random_likeness("cup", "plate")
    found = locate(Entity("cup", (("left", (Entity("plate"),)),)), likeness, BOXES)
    weight = [
        sum(p for p, b in zip(likeness["plate"], BOXES, strict=True) if RULES["left"](a, b))
        for a in BOXES
    ]
    expected = likeness["cup"] * weight
    assert found == pytest.approx(expected / expected.sum())


def test_a_superlative_compares_with_others_that_are_alike():
    likeness = random_likeness("cup")
    found = locate(Entity("cup", (), ("bigger",)), likeness, BOXES)
    cup = likeness["cup"]
    expected = np.array(
        [
            p * sum(q for q, b in zip(cup, BOXES, strict=True) if area(a) > area(b))
            for p, a in zip(cup, BOXES, strict=True)
        ]
    )
    assert found == pytest.approx(expected / expected.sum())


def test_between_weighs_pairs_of_others():
    likeness = random_likeness("cup", "plate", "knife")
    found = locate(
        Entity("cup", (("between", (Entity("plate"), Entity("knife"))),)), likeness, BOXES
    )
    expected = np.zeros(len(BOXES))
    for i, j, k in product(range(len(BOXES)), repeat=3):
        if len({i, j, k}) == 3:
            low, high = np.minimum(BOXES[j], BOXES[k])[:2], np.maximum(BOXES[j], BOXES[k])[2:]
            share = overlap(BOXES[i], [*low, *high]) / area(BOXES[i])
            expected[i] += likeness["plate"][j] * likeness["knife"][k] * share
    expected *= likeness["cup"]
    assert found == pytest.approx(expected / expected.sum())


def test_relations_nest_and_follow_one_another():
    likeness = random_likeness("cup", "plate", "table")
    plate = Entity("plate", (("above", (Entity("table"),)),))
    inner = locate(plate, likeness, BOXES)
    found = locate(Entity("cup", (("right", (plate,)),), ("smaller",)), likeness, BOXES)
    step = likeness["cup"] * (related("right", BOXES) @ inner)
    step = step / step.sum()
    step = step * (related("smaller", BOXES) @ step)
    assert found == pytest.approx(step / step.sum())
    assert list(Entity("cup", (("right", (plate,)),)).texts()) == ["cup", "plate", "table"]


def test_a_relation_that_no_box_has_says_nothing():
    same = np.array([[0.0, 0, 4, 4], [0, 0, 4, 4]])
    likeness = {"a": np.array([0.3, 0.7]), "b": np.array([0.5, 0.5])}
    found = locate(Entity("a", (("left", (Entity("b"),)),), ("bigger",)), likeness, same)
    assert found.tolist() == [0.3, 0.7]


def test_the_first_relation_in_the_table_counts():
    assert relation_of(["in", "front", "left"], RELATIONS) == "left"
    assert relation_of(["on"], RELATIONS) is None
    assert relation_of(["biggest"], SUPERLATIVES) == "bigger"
    assert relation_of(["biggest"], RELATIONS) is None
