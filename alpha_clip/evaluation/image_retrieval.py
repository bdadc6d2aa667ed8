"""Image retrieval: does the whole image still find its caption, and the caption its image?

What region training must not cost. Alpha marks the whole image; a plain CLIP does the same task.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from alpha_clip.drops import Drops
from alpha_clip.evaluation.base import Seen
from alpha_clip.evaluation.columns import Columns
from alpha_clip.evaluation.retrieval import Retrieval
from alpha_clip.geometry import SharedGeometry
from alpha_clip.model import AlphaClip


class ImageRetrieval(Retrieval):
    """Recall at 1 and at 5 between images and full captions, both ways; see `Retrieval`.

    Images without a caption are left out.

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
        super().__init__(data, max_images)
        self.geometry: SharedGeometry = geometry
        self.batch_size = batch_size

    def described(self) -> str:
        """Return `image`."""
        return "image"

    def score(self, model: AlphaClip, part: str, drops: Drops, seen: Seen) -> Columns:
        """Return captions and the features of both sides; see `Benchmark`."""
        transform = model.transform.replace(geometry=self.geometry)
        device = model.logit_scale.device
        pictures = self.source.decoded(part, drops)
        features: list[Tensor] = []
        captions: list[str] = []
        while batch := list(islice(pictures, self.batch_size)):
            told = [(sample.caption, image) for sample, image in batch if sample.caption.strip()]
            if told:
                rgba = torch.stack([transform(image) for _, image in told]).to(device)
                features.append(model.encode_image(rgba, normalize=True).cpu())
                captions += [caption for caption, _ in told]
            seen(len(batch))
        return self.columns_of(model, list(range(len(captions))), captions, {"image": features})
