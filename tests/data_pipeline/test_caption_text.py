"""What is taken out of captions, what must stay, and how class names are put in."""

import time

import pytest

from data_pipeline.caption_text import (
    merge,
    names_class,
    readable_class_name,
    strip_background,
    with_article,
)

STRIPPED = {
    "a dog on a white background": "a dog",
    "a cat against a white backdrop": "a cat",
    "a dog with a plain background": "a dog",
    "a red car with a white background": "a red car",
    "a red apple isolated on white": "a red apple",
    "a black cat on white": "a black cat",
    "a cat, white background": "a cat",
    "a cat and white background": "a cat",
    "a man standing in front of a plain white wall": "a man standing",
    "a blue vase is shown on a white surface": "a blue vase",
    "a turtle is shown in front of a white background": "a turtle",
    "a parrot is displayed against a solid white background": "a parrot",
    "a bottle of wine set against a white backdrop": "a bottle of wine",
    "a clock hanging on a white wall": "a clock",
    "a fish is on a white background": "a fish",
    "a snake is curled up on a white surface": "a snake is curled up",
    "there is a small dog sitting on a white surface": "a small dog sitting",
    "there is a dog that is sitting on a white surface": "a dog that is sitting",
    "there are two dogs on a white background": "two dogs",
    "a dog on a white background with a red collar": "a dog with a red collar",
    "a white bird with a white background and a black beak": "a white bird with a black beak",
    "a bird with a black beak and a white background": "a bird with a black beak",
    "the dog is laying on a white floor and looking up": "the dog is laying and looking up",
    "a white background with a dog on it": "a dog",
    "a bird flying in the air with a white wall in the background": "a bird flying in the air",
    "a dog with white in the background": "a dog",
    "a tie with a white background behind it": "a tie",
    "a shark in the middle of a white background": "a shark",
    "a light bulb on a pure white background": "a light bulb",
    "a spider on a plain, white background": "a spider",
    "a bird on an off - white background": "a bird",
    "a toy car on a white table top": "a toy car",
    "a jellyfish in a white room": "a jellyfish",
    "a bunch of bananas on a white background and a": "a bunch of bananas",
    "a mushroom with a white background, isolated": "a mushroom",
    "a goldfinch on a branch, isolated on a white background.": "a goldfinch on a branch",
    "A Dog On A White Background": "A Dog",
    "a white vase on a white background": "a white vase",
    "a white dog sitting in front of a white background": "a white dog sitting",
    "a picture of a dog": "a dog",
    "a close up of a bird with a white background": "a bird",
    "a close - up of a fish on a white background": "a fish",
    "an image of a close up view of a cat": "a cat",
    "there is a picture of a cat": "a cat",
    "arafed dog sitting on a white surface with a red collar": "dog sitting with a red collar",
    "a cat cat cat": "a cat",
    "a dog a dog a dog": "a dog",
    "a black and white black and white cat": "a black and white cat",
    "a white and white and white dog": "a white dog",
    "  a   dog ,, on a white background ,": "a dog",
    "on a white background": "",
    "a white background": "",
    "": "",
}
KEPT = [
    "a white dog",
    "a dog with a white face on its back",
    "a woman in a white dress",
    "a cat on a white blanket",
    "a white plate with food on it",
    "a black and white cat",
    "a black and white photo of a dog",
    "a drawing of a lion",
    "a crab on white sand",
    "a white wall clock",
    "a clock with a white face",
    "a laptop with a white screen",
    "a house with a white wall",
    "a dog on a white table cloth",
    "a bird with white wings on a branch",
    "a polar bear walking in the snow",
    "a woman dressed in white",
    "a room with white walls",
    "an isolated tree",
    "a yo yo on a string",
    "a choo choo train",
    "a mountain with trees in the background",
    "a man with a white beard and a white hat",
    "a dog with black spots on white fur",
    "a light that is on",
    "a bobcat cat",
    "a close up",
    "a dog on a grey background",
]


@pytest.mark.parametrize("caption", STRIPPED)
def test_background_is_taken_out(caption):
    assert strip_background(caption) == STRIPPED[caption]


@pytest.mark.parametrize("caption", KEPT)
def test_the_object_stays(caption):
    assert strip_background(caption) == caption


@pytest.mark.parametrize("caption", [*STRIPPED.values(), *KEPT])
def test_what_is_left_has_nothing_more_to_strip(caption):
    assert strip_background(caption) == caption


@pytest.mark.parametrize(
    ("caption", "rest"),
    [
        ("a dog on a gray background", "a dog"),
        ("a dog on a dark grey background", "a dog"),
        ("a dog on a grey and brown background", "a dog"),
        ("a dog in front of a brown wall", "a dog"),
        ("a grey dog on grey", "a grey dog"),
        ("a dog on a white background", "a dog on a white background"),
        ("an elephant with grey skin", "an elephant with grey skin"),
    ],
)
def test_background_of_other_colours(caption, rest):
    assert strip_background(caption, ("grey", "brown")) == rest


@pytest.mark.parametrize("colours", [(), ("",), ("white", " ")])
def test_a_background_has_a_colour(colours):
    with pytest.raises(ValueError, match="names of the background's colours"):
        strip_background("a dog", colours)


def test_signs_in_colours_are_no_patterns():
    assert strip_background("a dog on a (light background", ("(light",)) == "a dog"


@pytest.mark.parametrize(
    "caption",
    [
        "a " * 3000,
        "white " * 3000,
        " ".join(f"w{i}" for i in range(2000)),
        "plain light " * 1000 + "white",
        ", " * 3000,
        "there is a picture of " * 500,
    ],
    ids=lambda caption: caption[:12],
)
def test_no_caption_takes_long(caption):
    start = time.perf_counter()
    strip_background(caption)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("name", "readable"),
    [
        ("n01440764 tench, Tinca tinca", "tench"),
        ("goldfinch, Carduelis carduelis", "goldfinch"),
        ("black-footed_ferret", "black-footed ferret"),
        ("crane_(bird)", "crane"),
        ("crane (bird, wading), a bird", "crane"),
        ("  great   white\tshark ", "great white shark"),
        ("tench.n.01", "tench"),
        ("drilling_platform.n.02", "drilling platform"),
        ("Egyptian cat", "Egyptian cat"),
        ("St. Bernard, St Bernard", "St. Bernard"),
        ("n02119789", "n02119789"),
    ],
)
def test_class_names_are_words(name, readable):
    assert readable_class_name(name) == readable


@pytest.mark.parametrize("name", ["", "  ", "_", "(bird)", ", tench"])
def test_class_name_needs_a_word(name):
    with pytest.raises(ValueError, match="expected a class name with a word in it"):
        readable_class_name(name)


AN = """hourglass umbrella Egyptian|cat SUV MP3|player X-ray American|egret unimproved|road
heirloom onion urn usher ox Ibizan|hound iPod ATM 8-ball Old|English|sheepdog otter uncle
umpire electric|ray upright honest|man 11|year|old F1|car underwater|cave"""
A = """cat unicycle European|gallinule UFO T-shirt U-boat ukulele honeycomb one-armed|bandit
uniform user CD|player yurt utensil utility ewe US|flag eucalyptus hotel herb 12|pounder
hummingbird uniform universal|joint B52 C|clamp"""


def test_articles_go_by_sound():
    for article, words in (("an", AN), ("a", A)):
        for phrase in (word.replace("|", " ") for word in words.split()):
            assert with_article(phrase) == f"{article} {phrase}"


@pytest.mark.parametrize("phrase", ["jeans", "blue jeans", "the sea", "a dog", "An owl"])
def test_some_phrases_take_no_article(phrase):
    assert with_article(phrase) == phrase


def test_nothing_has_no_article():
    with pytest.raises(ValueError, match="got an empty phrase"):
        with_article(" ")


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("a goldfinch on a branch", "goldfinch"),
        ("two Goldfinches", "goldfinch"),
        ("tennis balls", "tennis ball"),
        ("a teddybear", "teddy bear"),
        ("a teddy - bear", "teddy bear"),
        ("a red t - shirt", "T-shirt"),
        ("butterflies", "butterfly"),
        ("some wolves", "wolf"),
        ("knives", "knife"),
        ("three mice", "mouse"),
        ("the dog's ear", "dog"),
        ("st. bernard", "St. Bernard"),
        ("a pair of jeans", "jeans"),
    ],
)
def test_class_names_are_found(caption, name):
    assert names_class(caption, name)


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("a catfish", "cat"),
        ("a bobcat", "cat"),
        ("a small bird", "goldfinch"),
        ("a bear with a teddy", "teddy bear"),
        ("a hot-dog", "dog"),
        ("a dogged man", "dog"),
        ("", "dog"),
    ],
)
def test_other_words_are_not_taken_for_the_class(caption, name):
    assert not names_class(caption, name)


@pytest.mark.parametrize(
    ("caption", "name", "merged"),
    [
        ("a small bird on a branch", "goldfinch", "a small bird on a branch, a goldfinch"),
        ("a small clock.", "hourglass", "a small clock, an hourglass"),
        ("Goldfinches on a branch", "goldfinch", "Goldfinches on a branch"),
        ("blue trousers", "jeans", "blue trousers, jeans"),
        ("", "goldfinch", "a goldfinch"),
        (" ", "owl", "an owl"),
    ],
)
def test_class_name_is_added_where_it_is_missing(caption, name, merged):
    assert merge(caption, name) == merged


@pytest.mark.parametrize(
    ("style", "merged"),
    [
        ("{caption}", "a small bird"),
        ("{class_name}: {caption}", "owl: a small bird"),
        ("{caption}, {class_name}", "a small bird, owl"),
        ("{phrase}, {caption}", "an owl, a small bird"),
        ("{phrase}", "an owl"),
    ],
)
def test_other_styles(style, merged):
    assert merge("a small bird", "owl", style) == merged
    assert merge("", "owl", style) == "an owl"


@pytest.mark.parametrize(
    "style", ["", "plain words", "{}", "{0}", "{caption", "{name}", "{caption.x}", "{caption[x]}"]
)
@pytest.mark.parametrize("caption", ["a bird", ""])
def test_style_must_be_one(style, caption):
    with pytest.raises(ValueError, match="the style of merging must be 'name_if_missing' or"):
        merge(caption, "owl", style)
