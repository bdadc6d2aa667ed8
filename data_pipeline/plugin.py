"""What segmenters, scorers and captioners share: settings, and weights that come late."""

from __future__ import annotations

from abc import ABC
from dataclasses import fields
from typing import Any, Protocol


class Plugin(ABC):  # noqa: B024 - its subclasses have abstract methods
    """A part of the pipeline that can be exchanged.

    Subclasses are dataclasses: their fields are the settings that the config hash covers, and they
    must be cheap to build and to pickle. Heavy weights are loaded by `load`, once a process.
    """

    def load(self) -> None:  # noqa: B027 - most have nothing to load
        """Load weights; called before any work.

        Raises:
            ValueError: If they are missing or damaged.
        """

    def place(self, worker: int) -> None:  # noqa: B027 - most need no device
        """Be told, before `load`, which of several workers on this machine this is.

        Args:
            worker: Its number; with several GPUs, each worker is to take another one.
        """

    def settings(self) -> dict[str, Any]:
        """Return what decides the results, for the config hash; by default every public field."""
        shown: Any = self
        return {f.name: getattr(self, f.name) for f in fields(shown) if not f.name.startswith("_")}


class HasSettings(Protocol):
    """A part that decides what comes out."""

    def settings(self) -> dict[str, Any]:
        """Return what decides it."""


def identity(part: HasSettings) -> dict[str, Any]:
    """Return a part's settings, and whose they are, for the config hash."""
    return {"class": f"{type(part).__module__}.{type(part).__qualname__}", **part.settings()}
