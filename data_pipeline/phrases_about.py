"""Phrases about what is not the object: the background of a cut-out, the picture as a picture.

A captioner that is shown a cut-out describes the white around it, too. The paper stripped such
phrases (Alpha-CLIP, arXiv 2312.03818, section 3.1); it does not say by which rules, so these are
ours.
"""

from __future__ import annotations

import re
from functools import lru_cache

_PLAIN = (
    r"(?:plain|solid|blank|clean|clear|pure|bright|simple|empty|flat|smooth|seamless|light|dark"
    r"|pale|off|snow|all|very)"
)
_BACKDROP = r"(?:(?:studio|wall|room|screen|photo) )?back ?(?:ground|drop)s?"
# What a captioner takes the empty ground for. "a white plate" or "white sand" is another matter.
_SURFACE = r"(?:surface|wall|floor|ground|room|space|screen|(?:table|counter)(?: ?top)?)"
_AT = (
    r"(?:on(?: top of)?|(?:up )?against|over|upon|in(?: front of| the middle of)?|inside|next to"
    r"|near|beside|by)"
)
_BEHIND = r" (?:in the background|in back|behind (?:it|him|her|them)|around (?:it|them))"
# Ways to be there that say nothing of the object; sitting, standing and lying do.
_SHOWN = (
    r"(?:shown|displayed|isolated|set|placed|put|pictured|photographed|seen|depicted|featured"
    r"|presented|mounted|hanging|hung|leaning|attached|resting|floating)"
)
_IS = r"(?:(?:(?:that|which|who) )?(?:is|are|was|were) )?"
# The phrase must end there: "on a white table cloth" is not "on a white table".
_END = (
    r"(?= *(?:$|[,.;:!]|(?:with|and|in|on|of|behind|that|which|while|who|is|are|as|to|from|by|at"
    r"|near|next|under|above|for|looking|facing|holding|wearing|eating|has|its)\b))"
)
_STOP = r"(?= *(?:$|[,.;]))"

_PICTURE = r"(?:close ?(?:- ?)?up|picture|image|photo|photograph|pic|shot|view|cut ?(?:- ?)?out)"
_LEAD = re.compile(
    rf"^(?:(?:there (?:is|are)|this is|it is) )?(?:(?:an?|the) )?"
    rf"(?:(?:cropped|blurry|stock|zoomed[- ]in|{_PICTURE}) )*{_PICTURE} of "
    r"|^there (?:is|are) |^araf+ed ",  # BLIP-large's "arafed" means nothing
    re.IGNORECASE,
)
_TAIL = re.compile(
    r"(?:[\s,;:.-]|(?<![\w'-])(?:and|or|with|a|an|the|of|that|which|who|is|are|was|were|while|as"
    r"|its|but|isolated)(?![\w'-]))+$",
    re.IGNORECASE,
)
_REPEATED = re.compile(r"(?<![\w'-])((?:[\w'-]+ ){0,3}?[\w'-]+)(?:,? \1(?![\w'-]))+", re.IGNORECASE)
_SAME_AND_SAME = re.compile(
    r"\b(?!(?:over|more|round|again)\b)(\w{3,})(?: and \1\b)+", re.IGNORECASE
)
# Words that are written twice.
_DOUBLES = frozenset("aye bora can cha choo dik pom ylang yo".split())


def strip_background(caption: str, colours: tuple[str, ...] = ("white",)) -> str:
    """Take out of a caption what it says of the background of a cut-out.

    "there is a small dog sitting on a white surface" becomes "a small dog sitting". Openings such
    as "a picture of", words said several times and loose ends go, too, a full stop among them; the
    case of letters stays. What is white about the object stays. Only a thing with a white
    background of its own, such as a sign, can't be told apart.

    Args:
        caption: A captioner's words.
        colours: What the background may be called; "grey" is "gray", too.

    Returns:
        What is left; nothing, if there was nothing else.

    Raises:
        ValueError: If no colour is given, or an empty one.
    """
    if not colours or not all(colour.strip() for colour in colours):
        raise ValueError(f"expected names of the background's colours, got {colours}")
    text = _once(" ".join(caption.split()))
    for phrase, rest in _background(colours):
        text = phrase.sub(rest, text)
    text = re.sub(r"\s*([,;])(?:\s*[,;])*", r"\1", text.strip(" ,;."))
    while (shorter := _LEAD.sub("", text)) != text:
        text = shorter
    return _TAIL.sub("", text)


def _once(text: str) -> str:
    """Say once what is said several times in a row."""

    def keep(found: re.Match[str]) -> str:
        words = found[1]
        return f"{words} {words}" if words.lower() in _DOUBLES else words

    return _SAME_AND_SAME.sub(r"\1", _REPEATED.sub(keep, text))


@lru_cache(maxsize=16)
def _background(colours: tuple[str, ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Return what to look for, in order, and what is left of it."""
    names = "|".join(re.escape(name.strip()) for name in colours)
    names = re.sub("gr[ae]y", "gr[ae]y", names, flags=re.IGNORECASE)
    name = rf"(?:{names})(?:[ -]colou?red)?"
    some = rf"(?:{_PLAIN}[ ,-]+)*{name}(?:(?: and|,) {name})*(?:,? {_PLAIN})*"
    ground = rf"(?:(?:an?|the|its) )?{some}"
    empty = rf"(?:(?:an?|the|its) )?(?:{_PLAIN},? )*{_PLAIN}"
    shown = rf",?(?: {_IS}(?:{_SHOWN} )*|^)"
    has = r"(?:with|and|has|having)"
    rules = (
        (rf"^{ground} {_BACKDROP} (?:with|and|behind) (.+?)(?: (?:on|in|against) it)?$", r"\1"),
        (rf" with {ground} {_BACKDROP}(?:{_BEHIND})? and(?= )", " with"),
        (rf"{shown}(?:{_AT}|{has}) (?:{ground}|{empty}) {_BACKDROP}(?:{_BEHIND})?{_END}", ""),
        (rf"{shown}{_AT} {ground} {_SURFACE}(?:{_BEHIND})?{_END}", ""),
        (rf"{shown}{has} {ground}(?: {_SURFACE})?{_BEHIND}{_END}", ""),
        (rf"(?:,? |^){ground} {_BACKDROP}{_STOP}", ""),
        (rf"{shown}(?:on|against|over) {ground}{_STOP}", ""),
    )
    return tuple((re.compile(pattern, re.IGNORECASE), rest) for pattern, rest in rules)
