"""Pseudo-labels for detectors: masks and names make scored objects, as COCO or LVIS JSON.

The paper's use for open-vocabulary detection (section 4.4 of arXiv 2312.03818): Alpha-CLIP names
regions that nobody labelled, and a detector is trained on what it is sure of.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import batched_nms

from alpha_clip.drops import Drops
from alpha_clip.evaluation.base import Benchmark, Scores, Seen
from alpha_clip.evaluation.columns import PICTURE, Columns
from alpha_clip.evaluation.focus_baselines import check_focus
from alpha_clip.evaluation.inputs import encode_classes
from alpha_clip.evaluation.labelled import LabelledPicture
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.evaluation.proposals import Proposals, read_categories
from alpha_clip.evaluation.pseudo_label_files import draw_labels, write_labels
from alpha_clip.evaluation.region_texts import region_text_logits
from alpha_clip.geometry import SharedGeometry
from alpha_clip.model import AlphaClip

_AT_A_TIME = 8  # pictures whose regions are shown together


class PseudoLabels(Benchmark):
    """Names regions, and writes those that it is sure of for the training of a detector.

    The score of a label is its probability among all names (softmax over the summed logits of the
    views), times the score of the proposal, where it has one. Beside the figures,
    `NAME.detections.json` holds COCO's results, `NAME.instances.json` a data set of its format, and
    `NAME.examples.png` shows some from the surest to the least sure.

    Args:
        annotations: A COCO or LVIS file: its images, and its objects as regions.
        images: Folder of the pictures.
        names: What regions may be called: a COCO or LVIS file, a list of names, or `{id: name}`;
            null takes the categories of `annotations`.
        proposals: Regions to name, instead of the file's own objects: a list as COCO's results.
        others: Names that compete and give no label, such as `background`.
        template: The prompt; `{}` stands for the name.
        focus: Views of each region, of `focus_baselines.FOCUS`; their logits are summed.
        min_score: Least score of a label.
        labels_a_region: Most labels of a region.
        max_iou: Of labels of one name in a picture whose boxes overlap more, the best is kept; null
            keeps all.
        geometry: How images become squares.
        batch_size: Images that go through the tower at a time.
        max_images: Most images to read; null reads all.

    Raises:
        ValueError: If a file is of another format, or a setting is out of range.
    """

    def __init__(
        self,
        annotations: str,
        images: str,
        names: str | None = None,
        proposals: str | None = None,
        others: tuple[str, ...] = (),
        template: str = "a photo of a {}.",
        focus: tuple[str, ...] = ("alpha",),
        min_score: float = 0.5,
        labels_a_region: int = 1,
        max_iou: float | None = None,
        geometry: SharedGeometry = "pad",
        batch_size: int = 64,
        max_images: int | None = None,
    ) -> None:
        check_focus(focus)
        if not 0 <= min_score <= 1 or labels_a_region < 1:
            raise ValueError(
                "expected min_score in 0..1 and labels_a_region of at least 1, got "
                f"{min_score} and {labels_a_region}"
            )
        self.categories = read_categories(names or annotations)
        self.source = Proposals(annotations, images, proposals, max_images)
        self._images = Path(images)
        self.others = others
        self.template = template
        self.focus = focus
        self.min_score = min_score
        self.labels_a_region = labels_a_region
        self.max_iou = max_iou
        self.geometry: SharedGeometry = geometry
        self.batch_size = batch_size
        self._number = {category["id"]: i for i, category in enumerate(self.categories)}
        self._text = torch.empty(0)

    def classes(self) -> list[str]:
        """Return the names."""
        return [category["name"].replace("_", " ") for category in self.categories]

    def parts(self) -> dict[str, int]:
        """Return stretches of the list of pictures."""
        return self.source.parts()

    def prepare(self, model: AlphaClip) -> None:
        """Compute the features of the names."""
        names = [*self.classes(), *self.others]
        self._text = encode_classes(model, names, [self.template], self.folder)

    def score(self, model: AlphaClip, part: str, drops: Drops, seen: Seen) -> Columns:
        """Return the labels of each region, with their scores; see `Benchmark`."""
        pictures = self.source.pictures(part, drops)
        found: list[Columns] = []
        first = 0
        while batch := list(islice(pictures, _AT_A_TIME)):
            shown = [picture for picture in batch if picture.regions]
            found += self._labels(model, shown, first) if shown else []
            first += len(shown)
            seen(len(batch))
        return {name: np.concatenate([f[name] for f in found]) for name in (found or [{}])[0]}

    def _labels(
        self, model: AlphaClip, batch: list[LabelledPicture], first: int
    ) -> Iterator[Columns]:
        """Yield, for each picture, a row for each region and label, the best first."""
        logits = region_text_logits(
            [model], batch, [self._text], self.focus, self.geometry, self.batch_size
        )
        chances = torch.from_numpy(sum(logits.values())).softmax(-1)[:, : len(self.categories)]
        per_picture = chances.split([len(picture.regions) for picture in batch])
        for number, (picture, found) in enumerate(zip(batch, per_picture, strict=True)):
            regions = [region.label for region in picture.regions]
            best = found.topk(min(self.labels_a_region, found.shape[1]))
            sure = np.array([self.source.regions[n].get("score", 1.0) for n in regions], float)
            scores = best.values.numpy() * sure[:, None]
            boxes = [[r.box.x1, r.box.y1, r.box.x2, r.box.y2] for r in picture.regions]
            labels = best.indices.numpy()
            yield {
                PICTURE: np.full(labels.size, first + number),
                "region": np.repeat(regions, labels.shape[1]),
                "place": np.tile(np.arange(labels.shape[1]), len(regions)),
                "label": labels.ravel(),
                "score": scores.ravel(),
                "kept": self._kept(np.array(boxes, float), labels, scores).ravel(),
            }

    def _kept(
        self,
        boxes_xyxy_px: NDArray[np.float64],
        labels: NDArray[np.int64],
        scores: NDArray[np.float64],
    ) -> NDArray[np.bool_]:
        """Return which labels of a picture's regions to keep, `[regions, places]`."""
        kept = scores >= self.min_score
        if self.max_iou is None:
            return kept
        rows, places = np.nonzero(kept)
        chosen = batched_nms(
            torch.from_numpy(boxes_xyxy_px[rows]),
            torch.from_numpy(scores[rows, places]),
            torch.from_numpy(labels[rows, places]),
            self.max_iou,
        ).numpy()
        few = np.zeros_like(kept)
        few[rows[chosen], places[chosen]] = True
        return few

    def outcomes(self, columns: Columns) -> dict[str, Outcome]:
        """Return how sure the labels are, and how right where the truth is known.

        `labels/kept` is the share of regions that got a label, `labels/score` the mean score of the
        first ones, `labels/score by class` its mean over the names that were given. Where regions
        have a category among the names, `right/all` is the share of regions whose first label it
        is, and `right/kept` that of those that were kept.

        Raises:
            ValueError: If no region could be used.
        """
        if not columns:
            raise ValueError("no region could be used; is the folder that of the annotations?")
        first = columns["place"] == 0
        pictures, label, kept = (columns[n][first] for n in (PICTURE, "label", "kept"))
        score = columns["score"][first]
        found = {
            "labels/kept": Outcome(kept.astype(float), pictures),
            "labels/score": Outcome(score, pictures),
            "labels/score by class": Outcome(score, pictures, label),
        }
        truth = np.array([self._truth(n) for n in columns["region"][first].tolist()])
        if (truth >= 0).any():
            right = np.where(truth >= 0, label == truth, np.nan)
            found["right/all"] = Outcome(right, pictures)
            found["right/kept"] = Outcome(np.where(kept, right, np.nan), pictures)
            known = np.where(truth >= 0, truth, 0)
            found["right/mean per class"] = Outcome(right, pictures, known)
        return found

    def _truth(self, region: int) -> int:
        """Return the number of a region's own category, -1 if it has none among the names."""
        return self._number.get(self.source.regions[region].get("category_id"), -1)

    def counts(self, columns: Columns) -> Scores:
        """Return the number of regions, and of labels that were kept."""
        regions = float((columns["place"] == 0).sum())
        return {"regions": regions, "labels": float(columns["kept"].sum())}

    def write(self, columns: Columns, file: Path) -> None:
        """Write the labels that were kept in both formats, and draw some; see `Benchmark`."""
        kept = columns["kept"]
        labels = [
            {**self.source.regions[region], "category_id": self.categories[label]["id"], "score": s}
            for region, label, s in zip(
                columns["region"][kept].tolist(),
                columns["label"][kept].tolist(),
                columns["score"][kept].tolist(),
                strict=True,
            )
        ]
        for make in (write_labels, draw_labels):
            make(labels, self.source.images, self.categories, self._images, file)
