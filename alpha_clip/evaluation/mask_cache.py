"""Masks on disk: a segmenter is asked once for each picture, whatever is measured afterwards."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alpha_clip.regions import rle_area

log = logging.getLogger(__name__)

Masks = list[dict[str, Any]]
"""COCO RLEs with text counts."""


class MaskCache:
    """A folder with a JSON file for each picture; JSON, because nothing read back may run code.

    Args:
        folder: Where; it is made. `None` keeps nothing.
        made_by: What decides the masks, such as the segmenter's settings: with others, they are
            made anew, beside.
    """

    def __init__(self, folder: str | None, made_by: Mapping[str, Any]) -> None:
        text = json.dumps(made_by, sort_keys=True, default=str)
        self._made_by = text
        self._folder = None
        if folder is not None:
            self._folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:8]
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "made_by.json").write_text(text + "\n")

    def get(
        self, picture: str, asked: Any, size: tuple[int, int], make: Callable[[], Masks]
    ) -> Masks:
        """Return the masks of a picture, from disk or else made now.

        Args:
            picture: Its name.
            asked: What they are the answer to, such as boxes; JSON can hold it.
            size: Height and width of the picture.
            make: Makes them.
        """
        if self._folder is None:
            return make()
        key = hashlib.sha256(json.dumps([picture, asked, size]).encode()).hexdigest()[:12]
        file = self._folder / f"{Path(picture).stem[:80]}-{key}.json"
        if (found := _read(file, size)) is not None:
            return found
        masks = make()
        half = file.with_suffix(f".{os.getpid()}.tmp")
        half.write_text(json.dumps(masks))
        half.replace(file)
        return masks


def _read(file: Path, size: tuple[int, int]) -> Masks | None:
    """Return what a file holds; `None` if there is none or it is damaged."""
    try:
        masks: Masks = json.loads(file.read_text())
        for mask in masks:
            rle_area(mask)  # checks the runs
            if tuple(mask["size"]) != size:
                raise ValueError(f"a mask of {mask['size']}, expected {size}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged and made anew: %s", file, error)
        return None
    return masks
