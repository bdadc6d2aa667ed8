"""What a scorer is: a picture, masks and a class name in, one score a mask out."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from data_pipeline.plugin import Plugin


class Scorer(Plugin):
    """Says how much each candidate is what the picture's class names.

    See `Plugin` for what subclasses are.
    """

    @abstractmethod
    def score(
        self, rgb: NDArray[np.uint8], masks: list[NDArray[np.bool_]], class_name: str
    ) -> list[float]:
        """Score the candidates of a picture.

        Args:
            rgb: Image `[H, W, 3]`.
            masks: Candidates `[H, W]`, none of them empty; at least one.
            class_name: The picture's class, in words.

        Returns:
            A score for each; a higher one is better, and scores of one class are comparable over
            all of its pictures.
        """
