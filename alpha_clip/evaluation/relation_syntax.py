"""Spatial relations of a referring expression, from its dependency parse (spaCy), as in ReCLIP.

The noun phrase at the head is the object. A path of words down the tree to another noun phrase
relates the two; one that ends in a keyword is a superlative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from alpha_clip.evaluation.spatial_relations import (
    BETWEEN,
    EMPTY_WORDS,
    RELATIONS,
    SUPERLATIVES,
    Entity,
    relation_of,
)

_RELATING = {word for known in RELATIONS.values() for word in known}
_RANKING = {word for known in SUPERLATIVES.values() for word in known}


def spacy_parser(name: str = "en_core_web_sm") -> Callable[[str], Entity | None]:
    """Return a function that says what an expression tells about places.

    Args:
        name: spaCy's pipeline; the published figures used this one.

    Raises:
        ValueError: If spaCy or the pipeline is not installed.
    """
    try:
        import spacy
    except ImportError as error:
        raise ValueError(
            "relations: spacy needs its package: pip install 'alpha-clip[spacy]'; or choose "
            "relations: keywords"
        ) from error
    try:
        pipeline = spacy.load(name)
    except OSError as error:
        raise ValueError(
            f"spaCy has no pipeline {name!r}: python -m spacy download {name}; or choose "
            "relations: keywords"
        ) from error
    return lambda text: entity_of(pipeline(text))


def entity_of(doc: Any) -> Entity | None:
    """Return what a parsed expression tells about places; `None` if there is no word for one.

    Args:
        doc: spaCy's `Doc`, with heads and noun chunks.
    """
    if not any(token.text in _RELATING | _RANKING | {BETWEEN} for token in doc):
        return None
    tree = _Tree.of(doc)
    root = next((token for token in doc if token.head.i == token.i), None)
    found = None if root is None else tree.entity(root)
    if found is None and (chunks := list(doc.noun_chunks)):
        found = tree.entity(chunks[0].root.head)
    return found


@dataclass(frozen=True)
class _Tree:
    """A parse, and the noun phrase that each word belongs to.

    Attributes:
        chunks: Word's number -> its noun phrase.
    """

    chunks: dict[int, Any]

    @classmethod
    def of(cls, doc: Any) -> _Tree:
        return cls({i: chunk for chunk in doc.noun_chunks for i in range(chunk.start, chunk.end)})

    def chunk(self, token: Any) -> Any:
        return self.chunks.get(token.i)

    def entity(self, head: Any) -> Entity | None:
        """Return the entity of a word in a noun phrase, or of a verb whose subject is one."""
        if self.chunk(head) is None:
            subject = next(iter(head.children), None)
            if subject is None or self.chunk(subject) is None:
                return None
            head = subject
        own = self.chunk(head)
        text: str = own.text
        relations: list[tuple[str, tuple[Entity, ...]]] = []
        superlatives: list[str] = []
        for path, other in self._paths(head, own, []):
            words = [token.text for token in sorted(path, key=lambda token: token.i)]
            if other is None:
                if name := relation_of(words, SUPERLATIVES):
                    superlatives.append(name)
                continue
            name = relation_of(words, RELATIONS)
            partner = self.entity(other) if name else None
            if name and partner:
                relations.append((name, (partner,)))
            elif BETWEEN in words and (second := self._joined(other)):
                relations.append((BETWEEN, (Entity(self.chunk(other).text), Entity(second.text))))
            elif not name:  # "dog with a ball": what it has tells what to look for
                text = _described(own, self.chunk(other))
        return Entity(text, tuple(relations), tuple(superlatives))

    def _paths(self, token: Any, own: Any, path: list[Any]) -> Iterator[tuple[list[Any], Any]]:
        """Yield the words on each way down the tree, and the word of another phrase at its end."""
        chunk = self.chunk(token)
        place = token.text in _RELATING or token.text in EMPTY_WORDS
        if chunk is not None and chunk is not own and not place:
            yield path, token
            return
        children = list(token.children)
        if not children:
            yield [*path, token], None
        tells = chunk is None or place or token.text in _RANKING
        for child in children:
            if chunk is None or self.chunk(child) is not chunk or child.text in _RANKING:
                yield from self._paths(child, own, [*path, token] if tells else path)
            elif len(children) == 1:  # "the left"
                yield [*path, token], None

    def _joined(self, other: Any) -> Any:
        """Return the noun phrase that "and" joins to another one, if there is one."""
        head = self.chunk(other).root
        children = list(head.children)
        if not any(child.text == "and" for child in children):
            return None
        own = self.chunk(head)
        return next((self.chunk(c) for c in children if self.chunk(c) not in (None, own)), None)


def _described(own: Any, other: Any) -> str:
    """Return a noun phrase with another that it leads to, and all words between and below."""
    words = {token.i: token.text for token in own}
    for target in other:
        above = list(_ancestors(target))
        if any(token.i in words for token in above):
            words |= {token.i: token.text for token in (*above, *_subtree(target))}
    return " ".join(words[i] for i in sorted(words))


def _ancestors(token: Any) -> Iterator[Any]:
    while token.head.i != token.i:
        token = token.head
        yield token


def _subtree(token: Any) -> Iterator[Any]:
    yield token
    for child in token.children:
        yield from _subtree(child)
