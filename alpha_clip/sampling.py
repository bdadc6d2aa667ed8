"""What of an image goes into a batch: which regions, and when the whole image instead."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alpha_clip.regions import RegionAnnotation, RegionSample, SampleError


@dataclass(frozen=True)
class Sampling:
    """What of an image goes into a batch.

    Attributes:
        regions_per_image: Regions drawn of each image; they share its decode and, in the loss, are
            negatives of each other.
        whole_image_ratio: Probability that a region is replaced by the whole image with its full
            caption (paper, section 3.2: 0.1).
        kinds: Kinds of phrases to take; `None` takes all.
    """

    regions_per_image: int = 1
    whole_image_ratio: float = 0.1
    kinds: list[str] | None = None

    def __post_init__(self) -> None:
        if self.regions_per_image < 1 or not 0 <= self.whole_image_ratio <= 1:
            raise ValueError(
                "expected regions_per_image >= 1 and whole_image_ratio in 0..1, got "
                f"{self.regions_per_image} and {self.whole_image_ratio}"
            )

    def every(self, sample: RegionSample) -> list[tuple[RegionAnnotation | None, str]]:
        """Return every region of the wanted kinds with its text.

        Raises:
            SampleError: If the sample has none.
        """
        return [(region, region.text) for region in self._wanted(sample)]

    def draw(
        self, sample: RegionSample, rng: np.random.Generator
    ) -> list[tuple[RegionAnnotation | None, str]]:
        """Draw regions with their texts; `None` stands for the whole image.

        Raises:
            SampleError: If the sample has nothing of what is wanted.
        """
        regions = self._wanted(sample)
        order = [int(i) for i in rng.permutation(len(regions))]
        chosen: list[tuple[RegionAnnotation | None, str]] = []
        for i in range(self.regions_per_image):
            region = regions[order[i % len(order)]]
            whole = bool(sample.caption) and rng.random() < self.whole_image_ratio
            chosen.append((None, sample.caption) if whole else (region, region.text))
        return chosen

    def _wanted(self, sample: RegionSample) -> list[RegionAnnotation]:
        regions = [r for r in sample.regions if self.kinds is None or r.kind in self.kinds]
        if not regions:
            raise SampleError("no_wanted_kind", f"{sample.key} has no phrase of {self.kinds}")
        return regions
