"""What a benchmark is: data in the constructor, a model in, figures out."""

from __future__ import annotations

from abc import ABC, abstractmethod

from alpha_clip.model import AlphaClip

Scores = dict[str, float]


class Benchmark(ABC):
    """A benchmark; one file and one class each."""

    @abstractmethod
    def run(self, model: AlphaClip) -> Scores:
        """Evaluate a model.

        Args:
            model: In eval mode, on its device.

        Returns:
            Name -> figure; shares lie in 0..1.
        """
