"""What readers drop, counted where every process can see it."""

from __future__ import annotations

import logging
from collections import Counter

import torch

log = logging.getLogger(__name__)

REASONS = (
    "bad_area",
    "bad_json",
    "bad_key",
    "bad_kind",
    "bad_rle",
    "bad_schema",
    "bad_score",
    "bad_span",
    "bad_text",
    "box_outside",
    "corrupt_image",
    "damaged_tar",
    "duplicate_rid",
    "empty_phrase",
    "huge_image",
    "incomplete",
    "lost_in_tar",
    "missing_image",
    "no_regions",
    "no_wanted_kind",
    "other_image",
    "rle_size",
    "size_mismatch",
    "other",
)
_TOLD = 3  # drops for one reason that are logged one by one; the rest are counted


class Drops:
    """Counts by reason, in memory that data loader workers share with their parent.

    Args:
        readers: How many processes count; each has a row of its own, so that none waits.
    """

    def __init__(self, readers: int = 1) -> None:
        self._counts = torch.zeros(readers, len(REASONS), dtype=torch.int64).share_memory_()
        self._row = 0

    def reader(self, row: int) -> Drops:
        """Return the same counts, for one of the processes to add to."""
        mine = Drops.__new__(Drops)
        mine._counts, mine._row = self._counts, row
        return mine

    def add(self, reason: str, detail: str, times: int = 1) -> None:
        """Count a drop; the first few of each reason are logged."""
        column = REASONS.index(reason) if reason in REASONS else len(REASONS) - 1
        before = int(self._counts[self._row, column])
        self._counts[self._row, column] += times
        if before < _TOLD:
            more = "; further ones are only counted" if before + 1 == _TOLD else ""
            log.warning("dropped (%s): %s%s", reason, detail, more)

    def counts(self) -> Counter[str]:
        """Return reason -> how often, over all processes."""
        sums = self._counts.sum(0).tolist()
        return Counter({name: n for name, n in zip(REASONS, sums, strict=True) if n})
