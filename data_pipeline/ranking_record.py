"""What a finished ranking says, `ranking.json`: its settings, its classes, its shards.

Beside it lies a file for each shard, `NNNNN.kept.parquet`: `row`, the rows of the shard's candidate
file that are kept, rising; `rank`, theirs in their class, 1 for the best; `class_size`, how many
compete in it. Readers believe `ranking.json` alone, which has the digests of these files.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RANKING_FILE = "ranking.json"
QUANTILES = {"worst": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}
QUANTILES["best"] = 1.0


@dataclass(frozen=True)
class Keep:
    """What is kept of each class; of several limits all must hold.

    A candidate competes if it is among the best `max_per_image` of its picture in its class. Ranks,
    shares and the size of a class are of those that compete.

    Attributes:
        top_k: So many, at least 1.
        top_share: This share, above 0 and up to 1; rounded up, so that a class with one keeps it.
        min_score: Those with at least this score, a cosine.
        max_per_image: Most candidates of one picture, at least 1; by default all compete.

    Raises:
        ValueError: If a value is out of range, or none of the first three is given.
    """

    top_k: int | None = None
    top_share: float | None = None
    min_score: float | None = None
    max_per_image: int | None = None

    def __post_init__(self) -> None:
        if self.top_k is None and self.top_share is None and self.min_score is None:
            raise ValueError(
                "expected at least one of top_k, top_share and min_score, got none, which would "
                "keep whatever competes; give one, such as top_share=0.1"
            )
        for name in ("top_k", "max_per_image"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number from 1 up, got {value!r}")
        if self.top_share is not None and not 0 < self.top_share <= 1:
            raise ValueError(
                f"top_share must be above 0 and at most 1, got {self.top_share!r}; "
                "a tenth of each class is 0.1"
            )
        if self.min_score is not None and not -1 <= self.min_score <= 1:
            raise ValueError(f"min_score is a cosine, from -1 to 1, got {self.min_score!r}")

    def count(self, scores: NDArray[np.float64]) -> int:
        """Return how many of those that compete in a class are kept, by their scores `[N]`."""
        kept = len(scores)
        if self.top_k is not None:
            kept = min(kept, self.top_k)
        if self.top_share is not None:  # as it was written: 0.07 of 100 are 7, in floats 8
            kept = min(kept, math.ceil(Fraction(str(self.top_share)) * len(scores)))
        if self.min_score is not None:
            kept = min(kept, int((scores >= self.min_score).sum()))
        return kept


@dataclass(frozen=True)
class ClassRanking:
    """A class in a ranking.

    Attributes:
        name: The class in words.
        pictures: Pictures with a candidate.
        candidates: All candidates.
        competing: Those that compete.
        kept: Those that are kept: ranks 1 to `kept`.
        scores: `worst`, `p5`, `p25`, `median`, `p75`, `p95` and `best` of those that compete.
        lowest_kept: Score of the last one kept; `None` if none is.
        highest_dropped: Score of the first one that competes and is dropped; `None` if none is.
    """

    name: str
    pictures: int
    candidates: int
    competing: int
    kept: int
    scores: dict[str, float]
    lowest_kept: float | None
    highest_dropped: float | None


@dataclass(frozen=True)
class ShardRanking:
    """A shard in a ranking: how many candidates it has and keeps, and digests of both files."""

    candidates: int
    kept: int
    candidates_sha256: str
    kept_sha256: str


@dataclass(frozen=True)
class RankSummary:
    """Totals of a ranking.

    Attributes:
        shards: Shards with candidates, or without any.
        classes: Classes.
        pictures: Pictures with a candidate, added up over classes.
        candidates: All candidates.
        competing: Those that compete.
        kept: Those that are kept.
        empty: Classes of which none is kept.
    """

    shards: int
    classes: int
    pictures: int
    candidates: int
    competing: int
    kept: int
    empty: int

    def __str__(self) -> str:
        lines = [f"{self.shards:,} shards, {self.classes:,} classes, {self.pictures:,} pictures"]
        lines.append(f"  candidates {self.candidates:>12,}")
        lines.append(f"  competing  {self.competing:>12,}")
        lines.append(f"  kept       {self.kept:>12,}")
        if self.empty:
            lines.append(f"  classes that keep none, as min_score is above all: {self.empty:,}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Ranking:
    """A finished ranking.

    Attributes:
        folder: Where it lies.
        keep: Its settings.
        shards: By number.
        classes: By the source's name of the class, sorted.
        hash: Digest of all of it, for the settings of what is made from it.
    """

    folder: Path
    keep: Keep
    shards: dict[int, ShardRanking]
    classes: dict[str, ClassRanking]
    hash: str

    def rows(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return which rows of a shard's candidate file are kept.

        Args:
            index: The shard's number.

        Returns:
            Row numbers `[N]`, rising, and the rank of each in its class, 1 for the best.

        Raises:
            ValueError: If the ranking has no shard of this number.
            OSError: If the kept file is missing or damaged.
        """
        from pyarrow.parquet import read_table

        if index not in self.shards:
            raise ValueError(
                f"{self.folder} ranks no shard {index:05d}, it has {len(self.shards)} shards; rank "
                "the folder that the candidates are in, to another output"
            )
        path = self.folder / kept_name(index)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.shards[index].kept_sha256:
            raise OSError(
                f"{path} is damaged: {RANKING_FILE} gives another digest; delete {RANKING_FILE} "
                "and rank again with the same settings, which keeps the same rows"
            )
        table = read_table(io.BytesIO(data))
        return table["row"].to_numpy(), table["rank"].to_numpy()

    def summary(self) -> RankSummary:
        """Add up the classes."""
        found = self.classes.values()
        names = ("pictures", "candidates", "competing", "kept")
        totals = {name: sum(getattr(c, name) for c in found) for name in names}
        return RankSummary(
            len(self.shards), len(found), **totals, empty=sum(not c.kept for c in found)
        )


def load_ranking(folder: Path) -> Ranking:
    """Read a finished ranking; the rows of a shard are read when they are asked for.

    Raises:
        ValueError: If there is none, or `ranking.json` is damaged.
    """
    file = folder / RANKING_FILE
    if not file.exists():
        raise ValueError(
            f"{folder} holds no finished ranking ({RANKING_FILE}); rank the candidates first"
        )
    data = file.read_bytes()
    try:
        record = json.loads(data)
        shards = {int(stem): ShardRanking(**shard) for stem, shard in record["shards"].items()}
        classes = {wnid: ClassRanking(**found) for wnid, found in record["classes"].items()}
        digest = hashlib.sha256(data).hexdigest()[:16]
        return Ranking(folder, Keep(**record["keep"]), shards, classes, digest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); delete it and rank again") from error


def kept_name(index: int) -> str:
    """Return the name of the file that says what is kept of a shard."""
    return f"{index:05d}.kept.parquet"
