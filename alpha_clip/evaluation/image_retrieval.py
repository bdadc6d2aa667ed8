"""Image retrieval: does the whole image still find its caption, and the caption its image?

What region training must not cost. Alpha marks the whole image; a plain CLIP does the same task.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from torch import Tensor

from alpha_clip.drops import Drops
from alpha_clip.evaluation.base import Benchmark, Scores, Seen
from alpha_clip.evaluation.columns import PICTURE, Columns
from alpha_clip.evaluation.inputs import encode_texts
from alpha_clip.evaluation.labelled import ShardRegions
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.geometry import SharedGeometry
from alpha_clip.model import AlphaClip
from alpha_clip.reader import find_shards

_AT = (1, 5)
_SIMILARITIES = 1 << 24  # held at a time, 4 bytes each


class ImageRetrieval(Benchmark):
    """Recall at 1 and at 5 between images and full captions, both ways.

    Images without a caption are left out. Equal captions are one candidate and one query, and every
    image that has it is right.

    Args:
        data: Folders of finished shards.
        geometry: How images become squares.
        batch_size: Images that go through the tower at a time.
        max_images: Most images to read; `None` reads all.
    """

    def __init__(
        self,
        data: list[str],
        geometry: SharedGeometry = "squash",
        batch_size: int = 64,
        max_images: int | None = None,
    ) -> None:
        self.source = ShardRegions(find_shards(data), [], max_images)
        self.geometry: SharedGeometry = geometry
        self.batch_size = batch_size

    def parts(self) -> dict[str, int]:
        """Return the shards."""
        return self.source.parts()

    def score(self, model: AlphaClip, part: str, drops: Drops, seen: Seen) -> Columns:
        """Return captions and the features of both sides; see `Benchmark`."""
        transform = model.transform.replace(geometry=self.geometry)
        device = model.logit_scale.device
        pictures = self.source.decoded(part, drops)
        features, captions = [], []
        while batch := list(islice(pictures, self.batch_size)):
            told = [(sample.caption, image) for sample, image in batch if sample.caption.strip()]
            if told:
                rgba = torch.stack([transform(image) for _, image in told]).to(device)
                features.append(model.encode_image(rgba, normalize=True).float().cpu())
                captions += [caption for caption, _ in told]
            seen(len(batch))
        if not captions:
            return {}
        number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        texts = encode_texts(model, list(number)).float().cpu()
        return {
            PICTURE: np.arange(len(captions)),
            "caption": np.array(captions),
            "image": torch.cat(features).numpy(),
            "text": texts[[number[caption] for caption in captions]].numpy(),
        }

    def outcomes(self, columns: Columns) -> dict[str, Outcome]:
        """Return the recalls; see `Benchmark`.

        Raises:
            ValueError: If fewer than two captions are left: nothing could be confused.
        """
        captions = columns.get("caption", np.array([], str))
        _, first, number = np.unique(captions, return_index=True, return_inverse=True)
        if len(first) < 2:
            raise ValueError(
                f"retrieval needs images with different captions, got {len(captions)} images with "
                f"{len(first)}; masks from class names alone have none"
            )
        images = torch.from_numpy(columns["image"]), torch.from_numpy(number)
        texts = torch.from_numpy(columns["text"][first]), torch.arange(len(first))
        pictures = columns[PICTURE]
        found = {}
        for name, queries, candidates, owner in (
            ("image to text", images, texts, pictures),
            ("text to image", texts, images, pictures[first]),
        ):
            ahead = _ahead(queries, candidates).numpy()
            for k in _AT:
                found[f"{name} R@{k}"] = Outcome((ahead < k).astype(float), owner)
        return found

    def counts(self, columns: Columns) -> Scores:
        """Return the number of images and of distinct captions."""
        captions = columns["caption"]
        return {"images": float(len(captions)), "captions": float(len(np.unique(captions)))}


def _ahead(queries: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor]) -> Tensor:
    """Return how many candidates with another caption are as close as the closest right one.

    Args:
        queries: Features of length 1, and the number of each one's caption.
        candidates: The same of what is searched.
    """
    ahead = []
    rows = max(1, _SIMILARITIES // len(candidates[0]))
    for features, captions in zip(*(part.split(rows) for part in queries), strict=True):
        similarities = features @ candidates[0].T
        right = captions[:, None] == candidates[1]
        best = similarities.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        # Not `>`: what can't be told apart (also NaN) is not found.
        ahead.append((~(similarities < best) & ~right).sum(1))
    return torch.cat(ahead)
