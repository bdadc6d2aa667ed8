"""A JSON list that is larger than memory: its elements one by one, and where each of them lies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK = 1 << 20  # bytes read at a time
_MAX_ELEMENT = 1 << 24  # bytes; without a limit one open bracket would bring in the rest of a file
_BLANK = re.compile(r"[ \t\n\r]*")
_AFTER = re.compile(r"[ \t\n\r,\]]")


def scan_list(path: Path) -> Iterator[tuple[int, int, Any]]:
    """Yield each element of a file that is one JSON list.

    Args:
        path: The file, in UTF-8.

    Yields:
        The element's first byte, the byte after its last, and its value. Text in the value is
        decoded as Latin-1, so that a character is a byte: right where it is ASCII. For other text
        decode the element's bytes.

    Raises:
        ValueError: If the file is no JSON list from its beginning to its end.
        OSError: If it can't be read.
    """
    with path.open("rb") as file:
        window = _Window(file)
        try:
            window.take("[")
            if window.next() == "]":
                window.take("]")
            else:
                yield from _elements(window)
            if window.next():
                raise ValueError(f"expected the end of the file, got {window.next()!r}")
        except ValueError as error:
            raise ValueError(f"{path} is no JSON list: byte {window.position}: {error}") from error


def _elements(window: _Window) -> Iterator[tuple[int, int, Any]]:
    """Yield elements up to the bracket that closes the list."""
    mark = ","
    while mark == ",":
        window.next()
        start = window.position
        value = window.value()
        yield start, window.position, value
        mark = window.take(",]")


class _Window:
    """The stretch of a file that is being looked at, and a place in it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0  # in the text
        self._before = 0  # bytes of the file that the text follows

    @property
    def position(self) -> int:
        """The place, counted in bytes of the file."""
        return self._before + self._at

    def next(self) -> str:
        """Go on to the next character that is not blank, and return it; empty at the end."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            self._at = blank.end() if blank else self._at
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def take(self, expected: str) -> str:
        """Go past the next character, which must be one of those expected, and return it."""
        found = self.next()
        if not found or found not in expected:
            what = repr(found) if found else "the end of the file"
            raise ValueError(f"expected {' or '.join(map(repr, expected))}, got {what}")
        self._at += 1
        return found

    def value(self) -> Any:
        """Go past a value, and return it."""
        while True:
            at, fault = self._at, "expected ',' or ']' after a value"
            try:
                value, at = self._decoder.raw_decode(self._text, at)
                if _AFTER.match(self._text, at):
                    self._at = at
                    return value
            except json.JSONDecodeError as error:
                at, fault = error.pos, error.msg
            except (ValueError, RecursionError) as error:  # a number, or a depth, beyond Python's
                fault = str(error)
            # The window's end may have cut it off: a text, a list, or 1.5 into 1 and a full stop.
            if len(self._text) - self._at > _MAX_ELEMENT or not self._read():
                self._at = at
                raise ValueError(fault)

    def _read(self) -> bool:
        """Move the window on to the place; False at the end of the file."""
        block = self._file.read(_BLOCK)
        if block:
            self._before += self._at
            self._text = self._text[self._at :] + block.decode("latin-1")
            self._at = 0
        return bool(block)
