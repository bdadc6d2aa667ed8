"""Retrieval: which text belongs to this picture or region, and which of them to this text?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpha_clip.batches import phrase_ids
from alpha_clip.evaluation.base import Benchmark, Scores
from alpha_clip.evaluation.columns import PICTURE, Columns
from alpha_clip.evaluation.inputs import encode_texts
from alpha_clip.evaluation.labelled import ShardRegions
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.model import AlphaClip
from alpha_clip.reader import find_shards

_AT = (1, 5)
_ROWS = 1 << 12  # of features held at a time, on either side
_FEATURES = "features/"


class Retrieval(Benchmark):
    """Recall at 1 and at 5, both ways, over the texts and the pictures or regions of all the data.

    Texts of the same tokens are one candidate and one query; whatever has one of them is right.
    Features are kept on disk, and compared in blocks.

    Args:
        data: Folders of finished shards.
        max_images: Most images to read; `None` reads all.
    """

    def __init__(self, data: list[str], max_images: int | None) -> None:
        self.source = ShardRegions(find_shards(data), [], max_images)

    @abstractmethod
    def described(self) -> str:
        """Return what has a text: `image` or `region`."""

    def parts(self) -> dict[str, int]:
        """Return the shards."""
        return self.source.parts()

    def columns_of(
        self,
        model: AlphaClip,
        pictures: list[int],
        texts: list[str],
        features: dict[str, list[Tensor]],
    ) -> Columns:
        """Return the columns of a part.

        Args:
            model: Encodes the texts.
            pictures: The picture of each row.
            texts: The text of each row.
            features: Way of pointing -> features of all rows, in pieces, of length 1.
        """
        if not texts:
            return {}
        number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        ids = phrase_ids(model.tokenizer(list(number)).cpu()).numpy()
        return {
            PICTURE: np.array(pictures, np.int64),
            "text": ids[[number[text] for text in texts]],
            "texts": ids,
            "text features": encode_texts(model, list(number)).float().cpu().numpy(),
            **{f"{_FEATURES}{way}": torch.cat(f).float().numpy() for way, f in features.items()},
        }

    def outcomes(self, columns: Columns) -> dict[str, Outcome]:
        """Return the recalls of each way of pointing; see `Benchmark`.

        Raises:
            ValueError: If there are fewer than two texts: nothing could be confused.
        """
        what = self.described()
        none = np.array([], np.int64)
        ids, first = np.unique(columns.get("texts", none), return_index=True)
        if len(ids) < 2:
            raise ValueError(
                f"retrieval needs {what}s with different texts, got "
                f"{len(columns.get(PICTURE, none))} {what}s with {len(ids)}; masks from class "
                "names alone have no captions"
            )
        number = np.searchsorted(ids, columns["text"])
        texts = _Side(columns["text features"], first, np.arange(len(ids)))
        pictures = columns[PICTURE]
        _, owner = np.unique(number, return_index=True)  # a text's first picture stands for it
        found: dict[str, Outcome] = {}
        ways = [name for name in columns if name.startswith(_FEATURES)]
        for way in ways:
            rows = _Side(columns[way], np.arange(len(number)), number)
            end = f"/{way.removeprefix(_FEATURES)}" if len(ways) > 1 else ""
            for name, queries, candidates, drawn in (
                (f"{what} to text", rows, texts, pictures),
                (f"text to {what}", texts, rows, pictures[owner]),
            ):
                ahead = _ahead(queries, candidates)
                for k in _AT:
                    found[f"{name} R@{k}{end}"] = Outcome((ahead < k).astype(float), drawn)
        return found

    def counts(self, columns: Columns) -> Scores:
        """Return how many pictures or regions, and how many texts there are."""
        texts = len(np.unique(columns["texts"]))
        return {f"{self.described()}s": float(len(columns[PICTURE])), "texts": float(texts)}


class _Side:
    """Features, mapped from disk, with the number of each one's text."""

    def __init__(
        self, features: NDArray[np.float32], rows: NDArray[np.intp], texts: NDArray[np.intp]
    ) -> None:
        self._features, self._rows, self._texts = features, rows, texts

    def __len__(self) -> int:
        return len(self._rows)

    def blocks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and texts of so many rows at a time."""
        for start in range(0, len(self), size):
            some = slice(start, start + size)
            features = np.array(self._features[self._rows[some]], np.float32)
            yield torch.from_numpy(features), torch.from_numpy(self._texts[some])


def _ahead(queries: _Side, candidates: _Side) -> NDArray[np.int64]:
    """Return how many candidates with another text are as close as the closest right one."""
    found = []
    for features, texts in queries.blocks(_ROWS):
        best = torch.full((len(features), 1), -torch.inf)
        for similarities, right in _compared(features, texts, candidates):
            own = similarities.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
            best = torch.maximum(best, own)  # NaN, if there is one
        ahead = torch.zeros(len(features), dtype=torch.int64)
        for similarities, right in _compared(features, texts, candidates):
            # Not `>`: what can't be told apart (also NaN) is not found.
            ahead += (~(similarities < best) & ~right).sum(1)
        found.append(ahead.numpy())
    return np.concatenate(found)


def _compared(
    features: Tensor, texts: Tensor, candidates: _Side
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield similarities with candidates, and which are right, some candidates at a time."""
    for other, other_texts in candidates.blocks(_ROWS):
        yield features @ other.T, texts[:, None] == other_texts
