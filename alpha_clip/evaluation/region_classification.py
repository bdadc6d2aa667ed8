"""Region classification: which of all names is this region, by text prompt?

Reads region–text shards; every region is asked for its own phrase among the candidates, once for
each way of pointing at it. Controls show what a gain is due to: another picture's alpha, another
object's, the background's, and alpha over a picture that shows nothing.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alpha_clip.evaluation.base import Benchmark, Scores
from alpha_clip.evaluation.focus_baselines import FOCUS, Focus, encode_alpha, ways_for
from alpha_clip.evaluation.inputs import Picture, encode_texts, pictures_of, samples_of
from alpha_clip.geometry import SharedGeometry
from alpha_clip.model import AlphaClip
from alpha_clip.reader import find_shards
from alpha_clip.regions import Box, decode_rle
from alpha_clip.transforms import RegionTransform

if TYPE_CHECKING:  # torchmetrics takes seconds to import
    from alpha_clip.region_matching import RegionMatching

SHUFFLED = "shuffled alpha"
WRONG_OBJECT = "alpha of another object"
INVERTED = "inverted alpha"
ALPHA_ONLY = "alpha only"
WITHIN_IMAGE = ("no alpha", "alpha")  # ways that are also measured within each image


class RegionClassification(Benchmark):
    """Top-1 over names, for every way of pointing.

    Args:
        data: Folders of finished shards.
        names: A `names.json` as `alpha-clip-data scenes` writes it (`{"names": [...], "held_out":
            [...]}`), or `None` for all phrases of the data.
        template: The prompt; `{}` stands for the name.
        focus: Ways of pointing, of `focus_baselines.FOCUS`; `None` takes all that the model's tower
            allows.
        geometry: How images become squares.
        batch_size: Images that go through the tower at a time.
        max_images: Most images to read; `None` reads all.

    Raises:
        ValueError: If a way of pointing is unknown, or the names file is none.
    """

    def __init__(
        self,
        data: list[str],
        names: str | None = None,
        template: str = "{}",
        focus: list[str] | None = None,
        geometry: SharedGeometry = "squash",
        batch_size: int = 64,
        max_images: int | None = None,
    ) -> None:
        unknown = set(focus or ()) - FOCUS.keys()
        if unknown:
            raise ValueError(f"unknown focus {sorted(unknown)}; expected some of {list(FOCUS)}")
        self.shards = find_shards(data)
        self.names, self.held_out = _read_names(names) if names else ([], [])
        self.template = template
        self.focus = focus
        self.geometry: SharedGeometry = geometry
        self.batch_size = batch_size
        self.max_images = max_images

    def run(self, model: AlphaClip) -> Scores:
        """Return top-1 for each way of pointing and control; see `Benchmark.run`.

        Held-out names are scored apart, as `held out/...`. For `alpha` and `no alpha` there is also
        `within image/...`, which of the phrases of its own image a region is (`within image/chance`
        is what guessing reaches), and `within image cosine/...`, the mean cosine between features
        of an image's regions with different phrases; see `RegionMatching`.

        Raises:
            ValueError: If no region of the data has one of the names, or a way of pointing that
                was asked for is not for this model's tower.
        """
        from alpha_clip.region_matching import RegionMatching

        names = self.names or sorted(
            {r.text for s in samples_of(self.shards, self.max_images) for r in s.regions}
        )
        number = {name: i for i, name in enumerate(names)}
        ways = self.focus or ways_for(model)
        text = encode_texts(model, [self.template.format(name) for name in names])
        transform = model.transform.replace(geometry=self.geometry)
        tally = _Tally(torch.tensor([name in self.held_out for name in names], device=text.device))
        within = {way: RegionMatching().to(text.device) for way in WITHIN_IMAGE if way in ways}
        images = 0
        for pictures in pictures_of(self.shards, self.batch_size, self.max_images):
            views = RegionViews(pictures, set(names), transform)
            owner = torch.tensor(views.owner, device=text.device) + images
            images += len(pictures)
            if not views.texts:
                continue
            truth = torch.tensor([number[t] for t in views.texts], device=text.device)
            tally.count(truth)
            for name, rgba in views.all(ways):
                encode = FOCUS[name].encode if name in FOCUS else encode_alpha
                parts = [part.to(text.device) for part in rgba.split(self.batch_size)]
                features = torch.cat([encode(model, part) for part in parts])
                tally.add(name, truth, (features @ text.T).argmax(-1) == truth)
                if name in within:
                    within[name].update(features, text[truth], truth, owner)
        return {**tally.scores(), **_within_image(within)}


class _Tally:
    """Counts regions and hits, of names seen in training and held out of it apart."""

    def __init__(self, held_out: Tensor) -> None:
        self.held_out = held_out
        self.regions: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()

    def count(self, truth: Tensor) -> None:
        """Count the regions of a batch; `truth` are their names."""
        for group, inside in self._groups(truth):
            self.regions[group] += int(inside.sum())

    def add(self, way: str, truth: Tensor, right: Tensor) -> None:
        """Count those that a way of pointing got right."""
        for group, inside in self._groups(truth):
            self.hits[group + way] += int(right[inside].sum())

    def _groups(self, truth: Tensor) -> Iterator[tuple[str, Tensor]]:
        held_out = self.held_out[truth]
        yield "", ~held_out
        yield "held out/", held_out

    def scores(self) -> Scores:
        """Return the figures of the groups that there are."""
        if not self.regions.total():
            raise ValueError("no region of the data has one of the names; are they of one source?")
        scores = {f"{group}regions": float(n) for group, n in self.regions.items() if n}
        for name, hits in self.hits.items():
            regions = self.regions["held out/" if name.startswith("held out/") else ""]
            if regions:
                scores[name] = hits / regions
        return scores


def _within_image(matching: dict[str, RegionMatching]) -> Scores:
    """Return the figures of images with several phrases, if there are any."""
    scores = {}
    for way, metric in matching.items():
        figures = {name: float(value) for name, value in metric.compute().items()}
        scores["within image/chance"] = figures["within_image_chance"]
        scores[f"within image/{way}"] = figures["within_image_top1"]
        scores[f"within image cosine/{way}"] = figures["within_image_cosine"]
    return {name: value for name, value in scores.items() if not math.isnan(value)}


class RegionViews:
    """The regions of some pictures, as each way of pointing shows them to the model.

    Args:
        pictures: The pictures; at least two, for the control that swaps alphas between them.
        names: Phrases that count; other regions are left out.
        transform: Makes tensors of them.
    """

    def __init__(
        self, pictures: list[Picture], names: set[str], transform: RegionTransform
    ) -> None:
        self.transform = transform
        self.images = [image for _, image in pictures]
        regions = [(i, r) for i, (sample, _) in enumerate(pictures) for r in sample.regions]
        self.regions = [(i, region) for i, region in regions if region.text in names]
        self.owner = [i for i, _ in self.regions]
        self.texts = [region.text for _, region in self.regions]

    def all(self, ways: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield `name, rgba [regions, 4, H, W]` of each way of pointing, then of the controls."""
        for name in ways:
            rgba = self._points(FOCUS[name])
            yield name, rgba
            if name == "alpha":
                yield from self._controls(rgba)

    def _points(self, focus: Focus) -> Tensor:
        views = []
        for i, region in self.regions:
            image, marked = focus.show(self.images[i], decode_rle(region.rle), Box(*region.box))
            views.append(self.transform(image, marked))
        return torch.stack(views)

    def _controls(self, rgba: Tensor) -> Iterator[tuple[str, Tensor]]:
        rgb, alpha = rgba[:, :3], rgba[:, 3:]
        another_image, another_object = self._others()
        yield SHUFFLED, torch.cat([rgb, alpha[another_image]], 1)
        yield WRONG_OBJECT, torch.cat([rgb, alpha[another_object]], 1)
        normal = self.transform.normalisation
        yield INVERTED, torch.cat([rgb, (1 - 2 * normal.alpha_mean) / normal.alpha_std - alpha], 1)
        yield ALPHA_ONLY, torch.cat([torch.zeros_like(rgb), alpha], 1)  # 0 is the mean colour

    def _others(self) -> tuple[list[int], list[int]]:
        """Return whose alpha each region gets: of another image, of another object in its own."""
        count = len(self.owner)
        another_image, another_object = [], []
        for place, image in enumerate(self.owner):
            away = [(place + step) % count for step in range(count // 2, count + count // 2)]
            another_image.append(next((q for q in away if self.owner[q] != image), place))
            near = [(place + step) % count for step in range(1, count)]
            another_object.append(next((q for q in near if self.owner[q] == image), place))
        return another_image, another_object


def _read_names(file: str) -> tuple[list[str], list[str]]:
    try:
        record = json.loads(Path(file).read_text())
        return list(record["names"]), list(record["held_out"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{file} is no names file: expected {{"names": [...], "held_out": [...]}}; {error}'
        ) from error
