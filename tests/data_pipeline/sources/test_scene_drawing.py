"""Drawn scenes: enough objects, all different, all in sight, and the same every time."""

import numpy as np
import pytest

from data_pipeline.sources.scene_drawing import (
    COLOURS,
    HELD_OUT_NAMES,
    NAMES,
    SHAPES,
    Scene,
    SceneConfig,
    SceneObject,
    draw_scene,
)

PAIRS = ("seen", "held_out", "all")


def draw(pairs, count=40, **settings):
    config = SceneConfig(pairs=pairs, **settings)
    return [draw_scene(np.random.default_rng([7, i]), config) for i in range(count)]


@pytest.fixture(scope="module")
def scenes():
    return {pairs: draw(pairs) for pairs in PAIRS}


def test_names_are_every_colour_with_every_shape():
    assert len(set(NAMES)) == len(COLOURS) * len(SHAPES) == 36
    assert set(HELD_OUT_NAMES) <= set(NAMES)


def test_one_name_is_held_out_for_each_colour_and_each_shape():
    colours, shapes = zip(*(name.split(" ") for name in HELD_OUT_NAMES), strict=True)
    assert sorted(colours) == sorted(COLOURS)
    assert sorted(shapes) == sorted(SHAPES)


@pytest.mark.parametrize("pairs", PAIRS)
def test_objects_are_at_least_three_and_never_two_of_one_name(scenes, pairs):
    for scene in scenes[pairs]:
        names = [item.name for item in scene.objects]
        assert len(names) >= 3
        assert len(set(names)) == len(names)
        assert set(names) <= set(NAMES)


def test_held_out_names_are_where_they_belong(scenes):
    def held_out(pairs):
        return [sum(o.name in HELD_OUT_NAMES for o in s.objects) for s in scenes[pairs]]

    assert max(held_out("seen")) == 0
    assert min(held_out("held_out")) >= 1
    assert min(held_out("all")) == 0
    assert max(held_out("all")) >= 1


def test_every_seen_name_is_drawn_and_every_held_out_one(scenes):
    assert {o.name for s in draw("seen", 150) for o in s.objects} == set(NAMES) - set(
        HELD_OUT_NAMES
    )
    assert {o.name for s in draw("held_out", 60) for o in s.objects} >= set(HELD_OUT_NAMES)


@pytest.mark.parametrize("pairs", PAIRS)
def test_masks_are_disjoint_and_of_the_size_of_the_picture(scenes, pairs):
    for scene in scenes[pairs]:
        masks = np.stack([item.mask for item in scene.objects])
        assert masks.dtype == bool
        assert masks.shape[1:] == scene.rgb.shape[:2]
        assert masks.sum(0).max() == 1


def test_every_object_is_in_sight(scenes):
    shares = [o.mask.mean() for pairs in PAIRS for s in scenes[pairs] for o in s.objects]
    assert min(shares) > 0.015


def test_under_the_mask_is_the_colour_of_the_name(scenes):
    names = list(COLOURS)
    hues = np.array([COLOURS[n] for n in names], float)
    hues /= np.linalg.norm(hues, axis=1, keepdims=True)
    for scene in scenes["all"]:
        for item in scene.objects:
            tone = np.median(scene.rgb[item.mask].astype(float), axis=0)
            assert names[int(np.argmax(hues @ tone))] == item.name.split(" ")[0]


def test_objects_are_kin_often_enough_to_need_both_words(scenes):
    def of_one(word):
        return sum(len({o.name.split(" ")[word] for o in s.objects}) == 1 for s in scenes["seen"])

    assert of_one(0) >= 4
    assert of_one(1) >= 2
    assert of_one(0) + of_one(1) <= 36


def test_same_state_same_picture_and_another_state_another():
    config = SceneConfig(pairs="all")
    a, b, other = (draw_scene(np.random.default_rng(seed), config) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.rgb, b.rgb)
    assert a.caption == b.caption
    for one, two in zip(a.objects, b.objects, strict=True):
        np.testing.assert_array_equal(one.mask, two.mask)
    assert a.rgb.shape != other.rgb.shape or (a.rgb != other.rgb).any()


@pytest.mark.parametrize("size_px", [64, 200])
def test_sides_lie_between_four_fifths_of_the_size_and_the_size(size_px):
    sides = [side for s in draw("seen", 8, size_px=size_px) for side in s.rgb.shape[:2]]
    assert size_px * 4 // 5 <= min(sides)
    assert max(sides) <= size_px
    assert len(set(sides)) > 1


@pytest.mark.parametrize("pairs", PAIRS)
def test_number_of_objects_is_as_asked(pairs):
    assert {len(s.objects) for s in draw(pairs, 12, objects_min=4, objects_max=4)} == {4}
    assert {len(s.objects) for s in draw(pairs, 20, objects_min=3, objects_max=4)} == {3, 4}


def test_most_objects_that_are_allowed_can_be_drawn():
    scenes = draw("seen", 1, objects_min=5, objects_max=5)
    assert len(scenes[0].objects) == 5


def test_caption_lists_the_objects_with_their_articles():
    mask = np.ones((2, 2), bool)
    names = ("red ring", "orange bar", "blue cross")
    objects = tuple(SceneObject(name, "", "small", mask) for name in names)
    scene = Scene(np.zeros((2, 2, 3), np.uint8), objects)
    assert scene.caption == "a red ring, an orange bar and a blue cross"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "at least 1, got 0"),
        ({"shard_size": 0}, "at least 1, got 1000 and 0"),
        ({"objects_min": 2}, "got 2 and 3"),
        ({"objects_max": 2}, "got 3 and 2"),
        ({"objects_max": 6}, "got 3 and 6"),
        ({"size_px": 63}, "64..1024, got 63"),
        ({"size_px": 1025}, "64..1024, got 1025"),
        ({"pairs": "none"}, "seen, held_out or all, got 'none'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SceneConfig(**settings)
