"""Zero-shot classification of labelled regions, for every way of pointing at them.

One harness for shards, ImageNet-S, COCO and LVIS: they differ in where pictures come from, in names
and in geometry. Controls show what a gain is due to: another picture's alpha, another object's, the
background's, and alpha over a picture that shows nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpha_clip.drops import Drops
from alpha_clip.evaluation.base import Benchmark, Scores, Seen
from alpha_clip.evaluation.columns import PICTURE, Columns
from alpha_clip.evaluation.focus_baselines import FOCUS, encode_alpha, ways_for
from alpha_clip.evaluation.inputs import encode_classes
from alpha_clip.evaluation.labelled import LabelledRegions
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.evaluation.region_views import RegionViews
from alpha_clip.geometry import Geometry
from alpha_clip.model import AlphaClip

WITHIN_IMAGE = ("no alpha", "alpha")  # ways that are also measured within each image


class Classification(Benchmark):
    """Top-1 and top-5 over the names of all classes, for every way of pointing.

    Args:
        source: Where the pictures come from.
        templates: Prompts; `{}` stands for the name. With several, a class is the mean of their
            features.
        focus: Ways of pointing, of `focus_baselines.FOCUS`; `None` takes all that the model's tower
            allows.
        geometry: How images become squares.
        scale: Side of the square that `crop_box` cuts, relative to the region's box.
        batch_size: Images that go through the tower at a time.
        held_out: Names that are scored apart: the model was not trained on them.
        controls: Whether `alpha` is followed by its four controls, each another pass.

    Raises:
        ValueError: If a way of pointing is unknown.
    """

    def __init__(
        self,
        source: LabelledRegions,
        templates: list[str],
        focus: list[str] | None,
        geometry: Geometry,
        scale: float = 1.5,
        batch_size: int = 64,
        held_out: tuple[str, ...] = (),
        controls: bool = False,
    ) -> None:
        unknown = set(focus or ()) - FOCUS.keys()
        if unknown:
            raise ValueError(f"unknown focus {sorted(unknown)}; expected some of {list(FOCUS)}")
        self.source = source
        self.templates = templates
        self.focus = focus
        self.geometry: Geometry = geometry
        self.scale = scale
        self.batch_size = batch_size
        self.held_out = held_out
        self.controls = controls
        self._ways: list[str] = []
        self._text = torch.empty(0)

    def parts(self) -> dict[str, int]:
        """Return the parts of the source."""
        return self.source.parts()

    def prepare(self, model: AlphaClip) -> None:
        """Compute the features of the classes."""
        self._ways = self.focus or ways_for(model)
        self._text = encode_classes(model, self.source.names, self.templates, self.folder)

    def score(self, model: AlphaClip, part: str, drops: Drops, seen: Seen) -> Columns:
        """Return, for each region, its class and what was answered in each way; see `Benchmark`."""
        transform = model.transform.replace(geometry=self.geometry, scale=self.scale)
        pictures = self.source.pictures(part, drops)
        found: list[Columns] = []
        first = 0
        while batch := list(islice(pictures, self.batch_size)):
            views = RegionViews(batch, transform)
            if views.labels:
                found.append(self._answers(model, views))
                found[-1][PICTURE] = np.array(views.owner, np.int64) + first
            first += len(batch)
            seen(len(batch))
        return {name: np.concatenate([f[name] for f in found]) for name in (found or [{}])[0]}

    def _answers(self, model: AlphaClip, views: RegionViews) -> Columns:
        device = self._text.device
        truth = torch.tensor(views.labels, device=device)
        columns: Columns = {"label": truth.cpu().numpy()}
        for name, rgba, view in views.all(self._ways, self.controls):
            encode = FOCUS[name].encode if name in FOCUS else encode_alpha
            parts = [encode(model, part.to(device)) for part in rgba.split(self.batch_size)]
            features = torch.cat(parts).float()[view]
            similarities = features @ self._text.T
            columns[f"predicted/{name}"] = similarities.argmax(-1).int().cpu().numpy()
            columns[f"rank/{name}"] = _rank(similarities, truth).int().cpu().numpy()
            if name in WITHIN_IMAGE:
                columns |= _within(name, features, self._text[truth], truth, views.owner)
        return columns

    def outcomes(self, columns: Columns) -> dict[str, Outcome]:
        """Return the figures of each way and control; see `Benchmark`.

        `WAY` is the share of regions that were named rightly, `top-5/WAY` of those whose name was
        among the five best, `mean per class/...` the mean over classes of either. Held-out names
        are scored apart, as `held out/WAY`. `within image/WAY` is which of the phrases of its own
        image a region is (`within image/chance`: what guessing reaches), `within image cosine/WAY`
        the mean cosine between features of an image's regions with different phrases.

        Raises:
            ValueError: If no region of the data has one of the names.
        """
        label = columns.get("label")
        if label is None or not len(label):
            raise ValueError("no region of the data has one of the names; are they of one source?")
        pictures = columns[PICTURE]
        apart = self._apart(label)
        found: dict[str, Outcome] = {}
        for way, rank in _columns_of("rank/", columns):
            one, five = (np.where(apart, np.nan, rank < k) for k in (1, 5))
            found[way] = Outcome(one, pictures)
            found[f"top-5/{way}"] = Outcome(five, pictures)
            found[f"mean per class/{way}"] = Outcome(one, pictures, label)
            found[f"mean per class top-5/{way}"] = Outcome(five, pictures, label)
            if apart.any():
                found[f"held out/{way}"] = Outcome(np.where(apart, rank < 1, np.nan), pictures)
        for name in ("within image/", "within image cosine/"):
            for way, values in _columns_of(name, columns):
                weights = columns["within image others"] if "cosine" in name else None
                found[f"{name}{way}"] = Outcome(values, pictures, weights=weights)
        return found

    def counts(self, columns: Columns) -> Scores:
        """Return the number of regions, of held-out ones, and of classes that there are."""
        label = columns["label"]
        apart = int(self._apart(label).sum())
        counts = {
            "regions": len(label) - apart,
            "held out/regions": apart,
            "classes": len(np.unique(label)),
        }
        return {name: float(n) for name, n in counts.items() if n}

    def classes(self) -> list[str]:
        """Return the names."""
        return self.source.names

    def confusions(self, columns: Columns) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Return the right name and the answer with alpha, or else of the first way."""
        ways = [way for way, _ in _columns_of("predicted/", columns)]
        way = "alpha" if "alpha" in ways else ways[0]
        return columns["label"], columns[f"predicted/{way}"]

    def _apart(self, label: NDArray[Any]) -> NDArray[np.bool_]:
        held_out = np.array([name in self.held_out for name in self.source.names])
        apart: NDArray[np.bool_] = held_out[label]
        return apart


def _columns_of(prefix: str, columns: Columns) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, column in columns.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), column


def _rank(similarities: Tensor, truth: Tensor) -> Tensor:
    """Return how many names are ahead of the right one; all, where a similarity is NaN."""
    own = similarities.gather(1, truth[:, None])
    number = torch.arange(similarities.shape[1], device=truth.device)
    ahead = (similarities > own) | ((similarities == own) & (number < truth[:, None]))
    lost = similarities.isnan().any(1)  # NaN is neither ahead nor behind
    return ahead.sum(1).masked_fill(lost, similarities.shape[1])


def _within(way: str, features: Tensor, text: Tensor, truth: Tensor, owner: list[int]) -> Columns:
    """Compare the regions of each picture with one another; NaN where there is but one phrase."""
    from alpha_clip.region_matching import match_within_images  # its metric takes seconds to import

    pictures = torch.tensor(owner, device=truth.device)
    within = match_within_images(features, text, truth, pictures)
    several = (within.phrases > 1).cpu().numpy()
    right, chance = within.right.float(), 1 / within.phrases.float()
    cosines = within.cosines / within.others.clamp(min=1)
    return {
        f"within image/{way}": np.where(several, right.cpu().numpy(), np.nan),
        "within image/chance": np.where(several, chance.cpu().numpy(), np.nan),
        f"within image cosine/{way}": np.where(several, cosines.cpu().numpy(), np.nan),
        "within image others": within.others.double().cpu().numpy(),
    }
