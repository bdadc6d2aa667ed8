"""Region retrieval: which of all phrases is this region, and where is this phrase?"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from alpha_clip.drops import Drops
from alpha_clip.evaluation.base import Seen
from alpha_clip.evaluation.columns import Columns
from alpha_clip.evaluation.focus_baselines import FOCUS, check_focus
from alpha_clip.evaluation.labelled import LabelledPicture, LabelledRegion
from alpha_clip.evaluation.region_views import RegionViews
from alpha_clip.evaluation.retrieval import Retrieval
from alpha_clip.geometry import SharedGeometry
from alpha_clip.model import AlphaClip
from alpha_clip.regions import Box


class RegionRetrieval(Retrieval):
    """Recall at 1 and at 5 between regions and their phrases, both ways; see `Retrieval`.

    Every region of every image is a candidate for every phrase.

    Args:
        data: Folders of finished shards.
        focus: Ways of pointing, of `focus_baselines.FOCUS`.
        template: The prompt; `{}` stands for the phrase.
        geometry: How images become squares.
        batch_size: Images that go through the tower at a time.
        max_images: Most images to read; `None` reads all.

    Raises:
        ValueError: If a way of pointing is unknown.
    """

    def __init__(
        self,
        data: list[str],
        focus: tuple[str, ...] = ("alpha", "no alpha", "crop"),
        template: str = "{}",
        geometry: SharedGeometry = "squash",
        batch_size: int = 64,
        max_images: int | None = None,
    ) -> None:
        check_focus(focus)
        super().__init__(data, max_images)
        self.focus = focus
        self.template = template
        self.geometry: SharedGeometry = geometry
        self.batch_size = batch_size

    def described(self) -> str:
        """Return `region`."""
        return "region"

    def score(self, model: AlphaClip, part: str, drops: Drops, seen: Seen) -> Columns:
        """Return phrases and the features of both sides; see `Benchmark`."""
        transform = model.transform.replace(geometry=self.geometry)
        device = model.logit_scale.device
        samples = self.source.decoded(part, drops)
        features: dict[str, list[Tensor]] = {way: [] for way in self.focus}
        owners: list[int] = []
        texts: list[str] = []
        first = 0
        while batch := list(islice(samples, self.batch_size)):
            shown = [
                LabelledPicture(image, [LabelledRegion(0, r.rle, Box(*r.box)) for r in s.regions])
                for s, image in batch
            ]
            seen(len(batch))
            views = RegionViews(shown, transform)
            ways = self.focus if views.labels else ()
            for way, rgba, view in views.all(list(ways), controls=False):
                encode = FOCUS[way].encode
                parts = [
                    encode(model, part.to(device)).cpu() for part in rgba.split(self.batch_size)
                ]
                features[way].append(torch.cat(parts)[view])
            owners += [first + owner for owner in views.owner]
            texts += [self.template.replace("{}", r.text) for s, _ in batch for r in s.regions]
            first += len(batch)
        return self.columns_of(model, owners, texts, features)
