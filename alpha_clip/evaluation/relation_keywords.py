"""Spatial relations of a referring expression, found by its words alone: no parser is needed.

Expressions are short: "man in red left of the dog", "second cup from the left", "bigger cat". A
keyword with an object after it ("left of X", "behind X", "bigger than X") relates; one without is a
superlative ("left cup", "cup on the left side").
"""

from __future__ import annotations

import re

from alpha_clip.evaluation.spatial_relations import (
    BETWEEN,
    EMPTY_WORDS,
    RELATIONS,
    SUPERLATIVES,
    Entity,
    relation_of,
)

_WORD = re.compile(r"[^\s,.;:!?()\"]+")
_KEYWORDS = {
    word for table in (RELATIONS, SUPERLATIVES) for known in table.values() for word in known
}
_RELATION = {word: name for name, known in RELATIONS.items() for word in known}
_RELATION["underneath"] = "below"  # ReCLIP knows it as a superlative only
_DEGREES = ("far", "very", "most", "hand", "corner")
_ARTICLES = ("the", "a", "an", "his", "her", "its", "their", "this", "that")
# What may stand between the object and what it is related to.
_PREPOSITIONS = ("above", "behind", "under", "underneath", "inside", "within", "below")
_LINKS = {
    **dict.fromkeys(("left", "right", "west", "east", "north", "south"), ("of", "to", "from")),
    **dict.fromkeys(("top", "back", "front"), ("of",)),
    **dict.fromkeys(("bigger", "larger", "smaller", "tinier"), ("than",)),
    **dict.fromkeys(("closer", "further"), ("than", "to", "from")),
    "contained": ("in", "by", "within"),
}
_BEFORE = ("on", "at", "in", "to", "from", "of", "is", "are", "standing", "sitting", "who", "which")


def parse_by_keywords(text: str) -> Entity | None:
    """Return what an expression says about places; `None` if it has no word for one.

    Args:
        text: The expression.
    """
    words = _WORD.findall(text.lower())
    if not any(word in _KEYWORDS or word == BETWEEN for word in words):
        return None
    return _entity(words)


def _entity(words: list[str]) -> Entity:
    for place, word in enumerate(words):
        start = _object_after(words, place)
        if start is None:
            continue
        own, rest = _trimmed(words[:place]), words[start:]
        if word == BETWEEN:
            relations = _between(rest)
        else:
            relations = ((_RELATION[word], (_entity(rest),)),)
        if own and relations:
            found = _simple(own)
            return Entity(found.text, relations, found.superlatives)
    return _simple(words)


def _object_after(words: list[str], place: int) -> int | None:
    """Return where the object of a keyword begins, if it has one: "left of the dog", 3."""
    word = words[place]
    start = place + 1
    while start < len(words) and words[start] in (*EMPTY_WORDS, "hand"):
        start += 1  # "left side of", "right hand side of"
    if word in _LINKS:
        if start >= len(words) or words[start] not in _LINKS[word]:
            return None
        start += 1
    elif word not in (*_PREPOSITIONS, BETWEEN):
        return None
    while start < len(words) and words[start] in _ARTICLES:
        start += 1
    noun = start
    while noun < len(words) and words[noun] in _KEYWORDS:
        noun += 1
    # "left of the picture" has nothing to be left of; "3rd from right" counts from a side
    return None if noun >= len(words) or words[noun] in EMPTY_WORDS else start


def _between(rest: list[str]) -> tuple[tuple[str, tuple[Entity, ...]], ...]:
    """Return the relation to what stands on both sides of the first "and", if there is one."""
    if "and" not in rest[1:-1]:
        return ()
    middle = rest.index("and", 1)
    other = rest[middle + 1 :]
    while len(other) > 1 and other[0] in _ARTICLES:
        other = other[1:]
    return ((BETWEEN, (_entity(rest[:middle]), _entity(other))),)


def _simple(words: list[str]) -> Entity:
    """Return an entity of words without relations: what it is like, and which of its kind."""
    names = (relation_of([word], SUPERLATIVES) for word in words)
    superlatives = tuple(dict.fromkeys(name for name in names if name))
    return Entity(" ".join(_without_place(words)), (), superlatives)


def _without_place(words: list[str]) -> list[str]:
    """Cut out a place: "cup on the left side of the picture in white" is a cup in white."""
    for place, word in enumerate(words):
        if word not in _KEYWORDS:
            continue
        start = place
        while start and words[start - 1] in (*_ARTICLES, *_DEGREES, *_KEYWORDS):
            start -= 1
        own = _trimmed(words[: start - 1]) if start and words[start - 1] in _BEFORE else []
        if own:
            return own + words[_end_of_place(words, place + 1) :]
    return words


def _end_of_place(words: list[str], stop: int) -> int:
    """Return where a place ends: behind "left", "left hand side" or "left side of the image"."""
    while stop < len(words) and words[stop] in (*_KEYWORDS, *_DEGREES, *EMPTY_WORDS):
        stop += 1
    end = stop
    while end < len(words) and words[end] in ("of", "in", *_ARTICLES):
        end += 1
    return end + 1 if end > stop and end < len(words) and words[end] in EMPTY_WORDS else stop


def _trimmed(words: list[str]) -> list[str]:
    """Cut off words at the end that only lead to a place."""
    while words and words[-1] in (*_BEFORE, *_ARTICLES):
        words = words[:-1]
    return words
