"""Captions of the class name alone, and of the object's colour if asked: they need no weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.caption_text import with_article
from data_pipeline.captioners.base import Captioner
from data_pipeline.foreground import Foreground

# The eleven basic colour terms (Berlin and Kay, 1969), each with shades that people call so: RGB
# from the colour survey of xkcd.com, 2010, which is in the public domain (CC0).
_SHADES = {
    "black": ["000000", "343837"],
    "white": ["ffffff", "ffffe4"],
    "grey": ["929591", "7d7f7c"],
    "red": ["e50000", "840000", "8f1402", "650021"],
    "green": ["15b01a", "033500", "96f97b", "677a04", "6e750e", "74a662", "029386"],
    "yellow": ["ffff14", "d5b60a", "fffe7a", "ceb301", "a88905"],
    "blue": ["0343df", "00035b", "95d0fc", "75bbfd", "6b8ba4"],
    "brown": ["653700", "341c02", "ad8150", "7f2b0a", "d1b26f"],
    "orange": ["f97306", "c65102", "fdaa48"],
    "pink": ["ff81c0", "ffd1df", "ff796c"],
    "purple": ["7e1e9c", "35063e", "bf77f6", "cea2fd"],
}
_MOST_PX = 1024


@dataclass(frozen=True)
class TemplateCaptioner(Captioner):
    """Fills a template with the class name: "a photo of an hourglass".

    Attributes:
        template: A sentence with one `{}`, which the class name takes with its article.
        colour: Whether to name the object's colour, too, if most of it has one: "a red umbrella".
        least_share: Share of the object that must be of one colour for it to be named. Colours are
            told apart by rule, without regard to light and shade:
            white and yellow things in shade often count as grey and brown.

    Raises:
        ValueError: If the template has not one `{}`, or the share is not in [0, 1].
    """

    template: str = "a photo of {}"
    colour: bool = False
    least_share: float = 0.5

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ValueError(
                f"template must have one {{}} for the class name, got {self.template!r}; write "
                "'a photo of {}': the article comes with the name"
            )
        if not 0 <= self.least_share <= 1:
            raise ValueError(f"least_share must be in [0, 1], got {self.least_share}")

    def caption(self, foreground: Foreground, class_name: str) -> str:
        """Name the class; see `Captioner.caption`."""
        colour = None
        if self.colour:
            colour = dominant_colour(foreground.rgb[foreground.mask], self.least_share)
        phrase = with_article(f"{colour} {class_name}" if colour else class_name)
        return self.template.replace("{}", phrase)


def dominant_colour(pixels: NDArray[np.uint8], least_share: float = 0.5) -> str | None:
    """Return the basic colour that most pixels are nearest to, in CIELAB.

    Args:
        pixels: RGB `[N, 3]`, at least one; of many, about a thousand are looked at.
        least_share: Share of the pixels that it must have.

    Returns:
        Its name, or `None` if no colour has that share.

    Raises:
        ValueError: If there is no pixel.
    """
    if not len(pixels):
        raise ValueError("expected the pixels of an object, got none")
    names, shades = _palette()
    some = _lab(pixels[:: -(-len(pixels) // _MOST_PX)])
    nearest = ((some[:, None] - shades) ** 2).sum(-1).argmin(1)
    found, counts = np.unique(names[nearest], return_counts=True)
    best = int(counts.argmax())
    return str(found[best]) if counts[best] >= least_share * len(some) else None


@lru_cache(maxsize=1)
def _palette() -> tuple[NDArray[np.str_], NDArray[np.float32]]:
    """Return the name of each shade, and the shade in CIELAB."""
    rows = [(name, bytes.fromhex(shade)) for name, some in _SHADES.items() for shade in some]
    rgb = np.frombuffer(b"".join(shade for _, shade in rows), np.uint8).reshape(-1, 3)
    return np.array([name for name, _ in rows]), _lab(rgb)


def _lab(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turn sRGB `[N, 3]` into CIELAB."""
    scaled = pixels[:, None].astype(np.float32) / 255
    lab: NDArray[np.float32] = cv2.cvtColor(scaled, cv2.COLOR_RGB2LAB)[:, 0]
    return lab
