"""Image retrieval: does the whole image still find its caption, and the caption its image?

What region training must not cost. Alpha marks the whole image; a plain CLIP does the same task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alpha_clip.evaluation.base import Benchmark, Scores
from alpha_clip.evaluation.inputs import encode_texts, pictures_of
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
        self.shards = find_shards(data)
        self.geometry: SharedGeometry = geometry
        self.batch_size = batch_size
        self.max_images = max_images

    def run(self, model: AlphaClip) -> Scores:
        """Return the recalls and how many images and captions there were; see `Benchmark.run`.

        Raises:
            ValueError: If fewer than two captions are left: nothing could be confused.
        """
        transform = model.transform.replace(geometry=self.geometry)
        device = model.logit_scale.device
        number: dict[str, int] = {}  # of each caption
        features, captions = [], []
        for pictures in pictures_of(self.shards, self.batch_size, self.max_images):
            told = [(sample.caption, image) for sample, image in pictures if sample.caption.strip()]
            if not told:
                continue
            captions += [number.setdefault(caption, len(number)) for caption, _ in told]
            rgba = torch.stack([transform(image) for _, image in told]).to(device)
            features.append(model.encode_image(rgba, normalize=True).float())
        if len(number) < 2:
            raise ValueError(
                f"retrieval needs images with different captions, got {len(captions)} images with "
                f"{len(number)}; masks from class names alone have none"
            )
        images, texts = torch.cat(features), encode_texts(model, list(number)).float()
        of_image = torch.tensor(captions, device=device)
        of_text = torch.arange(len(number), device=device)
        scores = {"images": float(len(images)), "captions": float(len(texts))}
        scores.update(_recalls("image to text", (images, of_image), (texts, of_text)))
        scores.update(_recalls("text to image", (texts, of_text), (images, of_image)))
        return scores


def _recalls(
    name: str, queries: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor]
) -> Scores:
    """Return for how many queries one of the closest k candidates has the query's caption.

    Args:
        name: What is retrieved from what.
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
    count = torch.cat(ahead)
    return {f"{name} R@{k}": float((count < k).float().mean()) for k in _AT}
