import pytest

from alpha_clip.evaluation.relation_keywords import parse_by_keywords
from alpha_clip.evaluation.spatial_relations import Entity


@pytest.mark.parametrize("text", ["man", "red stop sign", "guy in blue", "", "dog with a ball"])
def test_without_a_word_for_a_place_there_is_nothing_to_say(text):
    assert parse_by_keywords(text) is None


@pytest.mark.parametrize(
    ("text", "look_for", "superlatives"),
    [
        ("left guy", "left guy", ("left",)),
        ("Top LEFT pizza", "top left pizza", ("above", "left")),
        ("the biggest cat", "the biggest cat", ("bigger",)),
        ("front car", "front car", ("below",)),
        ("cup on the left side of the picture", "cup", ("left",)),
        ("boy on left in the white shirt", "boy in the white shirt", ("left",)),
        ("guy standing on the far right", "guy", ("right",)),
        ("the small dog on the left half", "the small dog", ("left",)),
        ("man on right hand side", "man", ("right",)),
        ("second cup from the left", "second cup", ("left",)),
        ("leftmost", "leftmost", ("left",)),
        ("left of the picture", "left of the picture", ("left",)),
        ("right, in red", "right in red", ("right",)),
    ],
)
def test_a_keyword_without_an_object_is_a_superlative(text, look_for, superlatives):
    assert parse_by_keywords(text) == Entity(look_for, (), superlatives)


@pytest.mark.parametrize(
    ("text", "look_for", "relation", "other"),
    [
        ("man left of the woman", "man", "left", "woman"),
        ("man on the left side of the table", "man", "left", "table"),
        ("dog to the right of a tree", "dog", "right", "tree"),
        ("bowl on top of the table", "bowl", "above", "table"),
        ("person in front of the red car", "person", "below", "red car"),
        ("woman behind man in red", "woman", "above", "man in red"),
        ("horse under the bridge", "horse", "below", "bridge"),
        ("horse underneath the bridge", "horse", "below", "bridge"),
        ("cat inside the box", "cat", "within", "box"),
        ("cat that is larger than his dog", "cat", "bigger", "dog"),
        ("the bike closer to the wall", "the bike", "bigger", "wall"),
    ],
)
def test_a_keyword_with_an_object_relates(text, look_for, relation, other):
    assert parse_by_keywords(text) == Entity(look_for, ((relation, (Entity(other),)),))


def test_relations_follow_one_another():
    found = parse_by_keywords("the man to the left of the dog behind the biggest table")
    table = Entity("biggest table", (), ("bigger",))
    assert found == Entity("the man", (("left", (Entity("dog", (("above", (table,)),)),)),))


def test_between_takes_two():
    found = parse_by_keywords("cup between the plate and the left knife")
    knife = Entity("left knife", (), ("left",))
    assert found == Entity("cup", (("between", (Entity("plate"), knife)),))
    assert parse_by_keywords("dog between two cars") == Entity("dog between two cars")
    assert parse_by_keywords("between") == Entity("between")


@pytest.mark.parametrize("text", ["left of", "of left of", "behind", "the on left", "than bigger"])
def test_scraps_of_language_do_no_harm(text):
    found = parse_by_keywords(text)
    assert found is not None
    assert found.text
