"""Parses written by hand, as spaCy gives them: its pipeline can't be had without the network."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from alpha_clip.evaluation.relation_syntax import entity_of, spacy_parser
from alpha_clip.evaluation.spatial_relations import Entity


@dataclass(eq=False)
class Token:
    text: str
    i: int
    children: list[Token] = field(default_factory=list)
    head: Any = None


class Chunk(list[Token]):
    """A noun phrase; spaCy's root is the word whose head lies outside."""

    @property
    def start(self) -> int:
        return self[0].i

    @property
    def end(self) -> int:
        return self[-1].i + 1

    @property
    def text(self) -> str:
        return " ".join(token.text for token in self)

    @property
    def root(self) -> Token:
        return next(t for t in self if t.head is t or t.head not in self)


class Doc(list[Token]):
    noun_chunks: list[Chunk]


def parse(*words: str) -> Doc:
    """Build a parse of `word>head` with heads by number; `[`...`]` around noun phrases."""
    doc = Doc()
    heads, chunks, start = [], [], 0
    for number, word in enumerate(words):
        text, _, head = word.strip("[]").partition(">")
        doc.append(Token(text, number))
        heads.append(int(head) if head else number)
        if word.startswith("["):
            start = number
        if word.endswith("]"):
            chunks.append((start, number + 1))
    for token, head in zip(doc, heads, strict=True):
        token.head = doc[head]
        if token.head is not token:
            token.head.children.append(token)
    doc.noun_chunks = [Chunk(doc[a:b]) for a, b in chunks]
    return doc


def test_without_a_word_for_a_place_there_is_nothing_to_say() -> None:
    assert entity_of(parse("[red>1", "car]")) is None


def test_a_path_to_another_phrase_relates() -> None:
    found = entity_of(parse("[man]", "behind>0", "[the>3", "table>1]"))
    assert found == Entity("man", (("above", (Entity("the table"),)),))


def test_a_relation_may_need_several_words() -> None:
    # "the man to the left of the dog": "left" heads a phrase of its own, which is but a place.
    doc = parse("[the>1", "man]", "to>1", "[the>4", "left>2]", "of>4", "[the>7", "dog>5]")
    assert entity_of(doc) == Entity("the man", (("left", (Entity("the dog"),)),))


def test_a_path_that_ends_is_a_superlative() -> None:
    assert entity_of(parse("[left>1", "guy]")) == Entity("left guy", (), ("left",))
    # "the goat on the left"
    found = entity_of(parse("[the>1", "goat]", "on>1", "[the>4", "left>2]"))
    assert found == Entity("the goat", (), ("left",))


def test_entities_nest() -> None:
    # "cup left of the plate behind the vase"
    doc = parse("[cup]", "left>0", "of>1", "[the>4", "plate>2]", "behind>4", "[the>7", "vase>5]")
    plate = Entity("the plate", (("above", (Entity("the vase"),)),))
    assert entity_of(doc) == Entity("cup", (("left", (plate,)),))


def test_other_relations_add_to_the_text() -> None:
    # "left dog with a red ball": whose dog is told by the ball
    doc = parse("[left>1", "dog]", "with>1", "[a>5", "red>5", "ball>2]")
    assert entity_of(doc) == Entity("left dog with a red ball", (), ("left",))


def test_between_takes_two() -> None:
    # "left cup between the plate and the knife"
    words = ["[left>1", "cup]", "between>1", "[the>4", "plate>2]", "and>4", "[the>7", "knife>4]"]
    found = entity_of(parse(*words))
    assert found is not None
    assert found.relations == (("between", (Entity("the plate"), Entity("the knife"))),)


def test_a_sentence_is_about_its_subject() -> None:
    # "the man is behind the table"
    doc = parse("[the>1", "man>2]", "is", "behind>2", "[the>5", "table>3]")
    found = entity_of(doc)
    assert found is not None
    assert found.text == "the man"


def test_without_a_phrase_at_the_head_the_first_one_counts() -> None:
    # "standing left of the man": the verb has no subject
    doc = parse("standing", "left>0", "of>1", "[the>4", "man>2]")
    assert entity_of(doc) == Entity("the man")
    assert entity_of(parse("left", "of>0")) is None


def test_a_missing_package_or_pipeline_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match=r"pip install 'alpha-clip\[spacy\]'; or .*keywords"):
        spacy_parser()

    def load(name: str) -> Any:
        if name == "en":
            return lambda text: parse(*text.split())
        raise OSError

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(ValueError, match="spacy download en_core_web_sm"):
        spacy_parser()
    assert spacy_parser("en")("[left>1 guy]") == Entity("left guy", (), ("left",))
