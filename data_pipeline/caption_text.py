"""What is done to the words of a caption: the background of a cut-out out, the class name in.

The paper merged the caption of an ImageNet picture's foreground with the class name (Alpha-CLIP,
arXiv 2312.03818, section 3.1); how, it does not say. `strip_background` has a file of its own and
is exported here.
"""

from __future__ import annotations

import re
from functools import lru_cache

from data_pipeline.phrases_about import strip_background

__all__ = [
    "NAME_IF_MISSING",
    "merge",
    "names_class",
    "readable_class_name",
    "strip_background",
    "with_article",
]

NAME_IF_MISSING = "name_if_missing"
"""The default way to `merge`: the class name is added to captions that lack it."""

_WNID = re.compile(r"^n\d{8}\s+")
_SYNSET = re.compile(r"\.[nvasr]\.\d+$")
_BRACKETS = re.compile(r"\s*[(\[][^)\]]*[)\]]")

# Said with yoo- or w-, though spelled with a vowel.
_A = re.compile(
    r"uni(?![nm])|us[aeu]|ut[eio]|ub[io]|eu|ewe|uk[eu]|uran|uria|uro|ural|(?:one|once)\b"
)
_AN = re.compile(r"hour|honest|hono|heir|8|(?:11|18)(?!\d)")
# Said letter by letter: SUV, MP3, X-ray.
_LETTERS = re.compile(r"(?:[A-Z]{1,4}\d*s?|[A-Za-z])(?=-|$)")
_NO_ARTICLE = frozenset(
    "binoculars clippers clothes glasses goggles jeans leggings maracas pajamas pants pliers "
    "pyjamas scissors shears shorts sunglasses tights tongs trousers trunks tweezers".split()
)
_IRREGULAR = {
    **{"child": "children", "foot": "feet", "goose": "geese", "man": "men", "mouse": "mice"},
    **{"ox": "oxen", "person": "people", "tooth": "teeth", "woman": "women"},
}


def readable_class_name(name: str) -> str:
    """Turn a class's name into the words that a person would use.

    Of "n01440764 tench, Tinca tinca" only "tench" stays, of "crane_(bird)" "crane": an ImageNet
    class's first lemma, without its number, what tells it from its namesakes, and underscores.

    Raises:
        ValueError: If nothing is left.
    """
    words = _BRACKETS.sub(" ", _WNID.sub("", name.strip()).replace("_", " "))
    readable = " ".join(_SYNSET.sub("", words.split(",")[0].strip()).split())
    if not readable:
        raise ValueError(f"expected a class name with a word in it, got {name!r}")
    return readable


def merge(caption: str, class_name: str, style: str = NAME_IF_MISSING) -> str:
    """Put a caption and a class name together.

    Args:
        caption: The caption, its background stripped. Where it is empty, the class name with its
            article is all there is, in every style.
        class_name: The class name, readable.
        style: `name_if_missing` adds ", a goldfinch" where the caption does not name the class;
            anything else is a format with `{caption}`, `{class_name}` or `{phrase}`, the class
            name with its article.

    Raises:
        ValueError: If the style is neither, or the class name is empty.
    """
    phrase = with_article(class_name)
    fields = {"caption": caption, "class_name": class_name, "phrase": phrase}
    if style == NAME_IF_MISSING:
        named = names_class(caption, class_name)
        merged = caption if named else f"{caption.rstrip(' .,;')}, {phrase}"
    else:
        try:
            merged = style.format(**fields)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise _no_style(style) from error
        if not any(f"{{{field}}}" in style for field in fields):
            raise _no_style(style)
    return merged if caption.strip() else phrase


def names_class(caption: str, class_name: str) -> bool:
    """Whether a caption names a class: whole words, one or several of them, in any case."""
    return _class_pattern(class_name).search(caption) is not None


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase, by its sound; nothing before "jeans" and the like.

    Raises:
        ValueError: If the phrase is empty.
    """
    words = phrase.split()
    if not words:
        raise ValueError("expected a word to put an article before, got an empty phrase")
    first, last = words[0], words[-1].lower()
    if first.lower() in ("a", "an", "the") or last in _NO_ARTICLE:
        return phrase
    if _LETTERS.match(first):
        vowel = first[0].upper() in "AEFHILMNORSX"
    else:
        sound = first.lower()
        vowel = bool(_AN.match(sound)) or (sound[0] in "aeiou" and not _A.match(sound))
    return f"{'an' if vowel else 'a'} {phrase}"


@lru_cache(maxsize=4096)
def _class_pattern(class_name: str) -> re.Pattern[str]:
    """Return what finds a class name; "teddy bear" is "teddybear" and "teddy-bears", too."""
    *words, last = re.split(r"[\s-]+", class_name.strip())
    forms = [last, f"{last}s", f"{last}es", _IRREGULAR.get(last.lower(), last)]
    if last.lower().endswith("y"):
        forms.append(f"{last[:-1]}ies")
    if last.lower().endswith(("f", "fe")):  # wolves, knives
        forms.append(f"{last.rstrip('eE')[:-1]}ves")
    ending = "|".join(re.escape(form) for form in dict.fromkeys(forms))
    start = "".join(rf"{re.escape(word)}[\s-]*" for word in words)
    return re.compile(rf"(?<![\w-]){start}(?:{ending})(?!\w)", re.IGNORECASE)


def _no_style(style: str) -> ValueError:
    return ValueError(
        f"the style of merging must be {NAME_IF_MISSING!r} or a format with {{caption}}, "
        f"{{class_name}} or {{phrase}}, such as '{{class_name}}: {{caption}}', got {style!r}"
    )
