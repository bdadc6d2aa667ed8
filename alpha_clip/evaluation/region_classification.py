"""Region classification: which of all names is this region, by text prompt?

Reads region–text shards; every region is asked for its own phrase among the candidates, once for
each way of pointing at it, and with two controls: another picture's alpha, and another object's.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from alpha_clip.drops import Drops
from alpha_clip.evaluation.base import Benchmark, Scores
from alpha_clip.evaluation.focus_baselines import FOCUS, Focus
from alpha_clip.geometry import SharedGeometry
from alpha_clip.model import AlphaClip
from alpha_clip.reader import find_shards, read_samples
from alpha_clip.regions import Box, RegionSample, decode_rle
from alpha_clip.transforms import RegionTransform

SHUFFLED = "shuffled alpha"
WRONG_OBJECT = "alpha of another object"


class RegionClassification(Benchmark):
    """Top-1 over names, for every way of pointing.

    Args:
        data: Folders of finished shards.
        names: A `names.json` as `alpha-clip-data scenes` writes it (`{"names": [...], "held_out":
            [...]}`), or `None` for all phrases of the data.
        template: The prompt; `{}` stands for the name.
        focus: Ways of pointing, of `focus_baselines.FOCUS`; `None` takes all of them.
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
        self.focus = focus or list(FOCUS)
        self.geometry: SharedGeometry = geometry
        self.batch_size = batch_size
        self.max_images = max_images

    def run(self, model: AlphaClip) -> Scores:
        """Return top-1 for each way of pointing and control; see `Benchmark.run`.

        Held-out names are scored apart, as `held out/...`.

        Raises:
            ValueError: If no region of the data has one of the names.
        """
        names = self.names or sorted({r.text for s in self._samples() for r in s.regions})
        text = self._text_features(model, names)
        transform = model.transform.replace(geometry=self.geometry)
        held_out = torch.tensor([name in self.held_out for name in names], device=text.device)
        hits: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for samples in tqdm(
            _batches(self._samples(), self.batch_size), desc="evaluate", unit="batch"
        ):
            views = RegionViews(samples, set(names), transform)
            if not views.texts:
                continue
            truth = torch.tensor([names.index(t) for t in views.texts], device=text.device)
            groups = {"": ~held_out[truth], "held out/": held_out[truth]}
            counts.update({f"{g}regions": int(inside.sum()) for g, inside in groups.items()})
            for name, rgba in views.all(self.focus):
                parts = [p.to(text.device) for p in rgba.split(self.batch_size)]
                features = torch.cat([model.encode_image(p, normalize=True) for p in parts])
                right = (features @ text.T).argmax(-1) == truth
                hits.update({f"{g}{name}": int(right[i].sum()) for g, i in groups.items()})
        if not counts:
            raise ValueError("no region of the data has one of the names; are they of one source?")
        scores = {name: float(value) for name, value in counts.items() if value}
        for name, hit in hits.items():
            total = counts["held out/regions" if name.startswith("held out/") else "regions"]
            if total:
                scores[name] = hit / total
        return scores

    def _samples(self) -> Iterator[RegionSample]:
        drops = Drops()  # what is dropped is logged as it happens
        return islice((s for d in self.shards for s in read_samples(d, drops)), self.max_images)

    def _text_features(self, model: AlphaClip, names: list[str]) -> Tensor:
        tokens = model.tokenizer([self.template.format(name) for name in names])
        device = model.logit_scale.device
        return torch.cat(
            [model.encode_text(t.to(device), normalize=True) for t in tokens.split(256)]
        )


class RegionViews:
    """The regions of some images, as each way of pointing shows them to the model.

    Args:
        samples: The images; at least two, for the control that swaps alphas between images.
        names: Phrases that count; other regions are left out.
        transform: Makes tensors of them.
    """

    def __init__(
        self, samples: list[RegionSample], names: set[str], transform: RegionTransform
    ) -> None:
        self.transform = transform
        self.images = [Image.open(io.BytesIO(s.jpeg)).convert("RGB") for s in samples]
        self.regions = [
            (i, region)
            for i, s in enumerate(samples)
            for region in s.regions
            if region.text in names
        ]
        self.texts = [region.text for _, region in self.regions]

    def all(self, focus: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield `name, rgba [regions, 4, H, W]` of each way of pointing, then of the controls."""
        for name in focus:
            rgba = self._points(FOCUS[name])
            yield name, rgba
            if name == "alpha":
                for control, other in self._controls():
                    yield control, torch.cat([rgba[:, :3], rgba[other, 3:]], dim=1)

    def _points(self, focus: Focus) -> Tensor:
        views = []
        for i, region in self.regions:
            image, marked = focus(self.images[i], decode_rle(region.rle), Box(*region.box))
            views.append(self.transform(image, marked))
        return torch.stack(views)

    def _controls(self) -> Iterator[tuple[str, list[int]]]:
        """Yield, for each control, whose alpha a region gets."""
        owner = [i for i, _ in self.regions]
        count = len(owner)
        another_image, another_object = [], []
        for place, image in enumerate(owner):
            away = [(place + step) % count for step in range(count // 2, count + count // 2)]
            another_image.append(next((q for q in away if owner[q] != image), place))
            near = [(place + step) % count for step in range(1, count)]
            another_object.append(next((q for q in near if owner[q] == image), place))
        yield SHUFFLED, another_image
        yield WRONG_OBJECT, another_object


def _batches(samples: Iterator[RegionSample], size: int) -> Iterator[list[RegionSample]]:
    while batch := list(islice(samples, size)):
        yield batch


def _read_names(file: str) -> tuple[list[str], list[str]]:
    try:
        record = json.loads(Path(file).read_text())
        return list(record["names"]), list(record["held_out"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{file} is no names file: expected {{"names": [...], "held_out": [...]}}; {error}'
        ) from error
