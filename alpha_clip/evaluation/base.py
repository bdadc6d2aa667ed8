"""What a benchmark is: data in the constructor, a model in, columns of outcomes out.

The work falls into parts, which are scored one by one: a run that was stopped goes on with those
that are missing, and several devices share them.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from alpha_clip.drops import Drops
from alpha_clip.evaluation.columns import Columns, join
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.model import AlphaClip

if TYPE_CHECKING:
    from typing_extensions import Self

Scores: TypeAlias = dict[str, float]
Seen: TypeAlias = Callable[[int], object]
"""Told how many more pictures are done."""


class Benchmark(ABC):
    """A benchmark; one file and one class each.

    Attributes:
        settings: What the constructor was given, by name.
        unscored: Names of settings that only say what becomes of the columns: when they change,
            what is scored stays.
        folder: Where the run keeps what is done, of these weights and settings alone; `None` keeps
            nothing. `prepare` may keep there what is dear, such as the features of classes.
    """

    settings: dict[str, Any]
    unscored: frozenset[str] = frozenset()
    folder: Path | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note what the constructor is given: a record of the run, and what tells runs apart."""
        made = super().__new__(cls)
        given = inspect.signature(cls.__init__).bind_partial(made, *args, **kwargs)
        given.apply_defaults()
        made.settings = {k: v for k, v in given.arguments.items() if k != "self"}
        return made

    def variant(self) -> str:
        """Return which of several data sets of one kind this is: their figures do not compare."""
        return ""

    @abstractmethod
    def parts(self) -> dict[str, int]:
        """Return the parts of the work, in order, with the number of pictures in each."""

    def models(self, model: AlphaClip) -> list[AlphaClip]:
        """Return all models that take part: with other weights of any, it is another run."""
        return [model]

    def prepare(self, model: AlphaClip) -> None:  # noqa: B027 - not every benchmark needs it
        """Compute what all parts need, such as features of texts; once in each process."""

    @abstractmethod
    def score(self, model: AlphaClip, part: str, drops: Drops, seen: Seen) -> Columns:
        """Score one part.

        Args:
            model: In eval mode, on its device; `prepare` has had it.
            part: One of `parts`.
            drops: Where to count pictures and regions that can't be used.
            seen: Told of progress.

        Returns:
            Columns; `picture` numbers the pictures of the part from 0. None, if there are no rows.
        """

    @abstractmethod
    def outcomes(self, columns: Columns) -> dict[str, Outcome]:
        """Return the figures, of the columns of all parts.

        Raises:
            ValueError: If there is nothing to measure.
        """

    def counts(self, columns: Columns) -> Scores:
        """Return what was measured on, such as the number of regions."""
        return {}

    def classes(self) -> list[str]:
        """Return the names of the groups of outcomes that are means over classes."""
        return []

    def confusions(self, columns: Columns) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Return the right class and the answer of each row, for a picture of what is mixed up."""
        return None

    def write(self, columns: Columns, file: Path) -> None:  # noqa: B027 - most have no more
        """Write what there is beside figures, such as predictions or examples.

        Args:
            columns: The columns of all parts.
            file: `NAME.json` of the figures; what is written is called `NAME.` and something.
        """

    @torch.inference_mode()
    def run(self, model: AlphaClip) -> Scores:
        """Evaluate a model in this process and keep nothing on disk.

        Args:
            model: In eval mode, on its device.

        Returns:
            Name -> figure; shares lie in 0..1.
        """
        self.prepare(model)
        drops = Drops()
        columns = join(self.score(model, part, drops, lambda _: None) for part in self.parts())
        return scores_of(self, columns, self.outcomes(columns))


def scores_of(benchmark: Benchmark, columns: Columns, outcomes: dict[str, Outcome]) -> Scores:
    """Return counts and figures; figures without any values are left out."""
    means = {name: outcome.mean() for name, outcome in outcomes.items()}
    return {
        **benchmark.counts(columns),
        **{name: mean for name, mean in means.items() if not np.isnan(mean)},
    }
