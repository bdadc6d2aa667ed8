"""Among which regions of a picture a referring expression has to choose."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alpha_clip.evaluation.annotations import box_of, labelled, read_json
from alpha_clip.evaluation.expressions import ReferredPicture
from alpha_clip.evaluation.labelled import LabelledRegion
from alpha_clip.evaluation.mask_cache import MaskCache, Masks
from alpha_clip.regions import Box, Region, SampleError, encode_rle, rle_area

_EXPECTED = (
    "detections as ReCLIP has them ({image id: [[x, y, width, height], ...]}) or a list of "
    '{"image_id", "bbox" or "box"[, "segmentation"]} in px'
)


class BoxSegmenter(Protocol):
    """Makes a mask for each box; `data_pipeline.segmenters` has some."""

    def place(self, worker: int) -> None:
        """Be told, before `load`, the number of the GPU to take, if there are several."""

    def load(self) -> None:
        """Load weights; called once in each process."""

    def settings(self) -> Any:
        """Return what decides the masks: name -> value."""

    def segment(self, rgb: NDArray[np.uint8], boxes_xyxy_px: NDArray[np.float64]) -> Any:
        """Return predictions, with a `mask` `[H, W]` each, for boxes `[N, 4]` of an image."""


class EverythingSegmenter(Protocol):
    """Makes masks for all that there is in a picture."""

    def place(self, worker: int) -> None:
        """Be told, before `load`, the number of the GPU to take, if there are several."""

    def load(self) -> None:
        """Load weights; called once in each process."""

    def settings(self) -> Any:
        """Return what decides the masks: name -> value."""

    def segment_everything(self, rgb: NDArray[np.uint8]) -> Any:
        """Return predictions, with a `mask` `[H, W]` each, for an image `[H, W, 3]`."""


class Candidates(ABC):
    """Where candidates come from; subclasses are dataclasses, which tell their settings."""

    def load(self, worker: int = 0) -> None:  # noqa: B027 - not all have weights
        """Load weights; called once in each process.

        Args:
            worker: Number of the process's GPU.

        Raises:
            ValueError: If they are missing or damaged.
        """

    def check(self, pictures: list[ReferredPicture]) -> None:  # noqa: B027 - not all can tell
        """Refuse what belongs to other pictures.

        Raises:
            ValueError: If none of the pictures has candidates.
        """

    def given(self, picture: ReferredPicture) -> Any:
        """Return what is known of a picture's candidates beforehand: with others, scores differ."""
        return None

    @abstractmethod
    def of(self, picture: ReferredPicture, image: Image.Image) -> list[LabelledRegion]:
        """Return the candidates of a picture, at least one, numbered by their labels.

        Raises:
            SampleError: If the segmenter fails on it.
        """


@dataclass
class Boxes(Candidates):
    """Boxes that are known, with the masks that a segmenter makes of them.

    Attributes:
        segmenter: By class_path; null takes the masks that are known, else all of each box.
        cache: Folder for the masks that it makes.
    """

    segmenter: BoxSegmenter | None = None
    cache: str | None = None
    _cache: MaskCache | None = field(default=None, init=False, repr=False, compare=False)

    def load(self, worker: int = 0) -> None:
        """Load the segmenter; see `Candidates.load`."""
        if self.segmenter is not None:
            self.segmenter.place(worker)
            self.segmenter.load()
            self._cache = MaskCache(self.cache, _about(self.segmenter))

    @abstractmethod
    def known(self, picture: ReferredPicture) -> list[tuple[Box, Region]]:
        """Return boxes, and masks where they are known."""

    def given(self, picture: ReferredPicture) -> Any:
        """Return the boxes and masks; see `Candidates.given`."""
        return self.known(picture)

    def of(self, picture: ReferredPicture, image: Image.Image) -> list[LabelledRegion]:
        """Return the known boxes, all of a box where its mask is empty; see `Candidates.of`."""
        known = [(c, mask) for box, mask in self.known(picture) if (c := _clipped(box, image))]
        known = known or [(Box(0, 0, *image.size), None)]
        if self.segmenter is None or self._cache is None:
            regions = [mask or box for box, mask in known]
        else:
            boxes = [[b.x1, b.y1, b.x2, b.y2] for b, _ in known]
            size = image.height, image.width
            made = self._cache.get(picture.files[0], boxes, size, lambda: self._made(image, boxes))
            pairs = zip(made, known, strict=True)
            regions = [mask if rle_area(mask) else box for mask, (box, _) in pairs]
        found = zip(known, regions, strict=True)
        try:
            return [labelled(i, region, box, image) for i, ((box, _), region) in enumerate(found)]
        except (TypeError, ValueError) as error:
            raise SampleError("bad_rle", f"candidates of {picture.files[0]}: {error}") from error

    def _made(self, image: Image.Image, boxes: list[list[float]]) -> Masks:
        assert self.segmenter is not None
        found = self.segmenter.segment(np.asarray(image), np.array(boxes, np.float64))
        return [encode_rle(prediction.mask) for prediction in found]


@dataclass
class Objects(Boxes):
    """The annotated objects themselves: what detection has no part in.

    Args:
        segmenter: Makes masks of their boxes, by class_path; null takes the annotated masks, where
            there are some (`refer`), else all of each box.
        cache: Folder for the masks that it makes.
    """

    def known(self, picture: ReferredPicture) -> list[tuple[Box, Region]]:
        """Return all objects of the picture."""
        return list(picture.objects)


@dataclass(kw_only=True)
class Detections(Boxes):
    """What a detector found; ReCLIP and Alpha-CLIP take MAttNet's boxes.

    Where nothing was found, the picture as a whole is the only candidate.

    Args:
        file: Detections: ReCLIP's `*_dets_dict.json`, or a list as COCO's results.
        segmenter: Makes masks of the boxes, by class_path; null takes those of the file, else all
            of each box.
        cache: Folder for the masks that it makes.
    """

    file: str
    _found: dict[int, list[tuple[Box, Region]]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def check(self, pictures: list[ReferredPicture]) -> None:
        """Refuse another format, or detections of other pictures; see `Candidates.check`."""
        if not any(self.known(picture) for picture in pictures):
            raise ValueError(
                f"{self.file} has no detection in any of the {len(pictures)} pictures; is it of "
                "another data set?"
            )

    def known(self, picture: ReferredPicture) -> list[tuple[Box, Region]]:
        """Return what was found.

        Raises:
            ValueError: If the file is of another format.
        """
        if self._found is None:
            record = read_json(self.file, _EXPECTED)
            try:
                self._found = dict(_by_image(record))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.file}: {error}; expected {_EXPECTED}") from error
        return self._found.get(picture.image_id, [])


@dataclass
class Everything(Candidates):
    """Masks of everything in the picture, such as SAM's automatic ones, with the boxes around them.

    Attributes:
        segmenter: By class_path.
        cache: Folder for the masks that it makes.
    """

    segmenter: EverythingSegmenter
    cache: str | None = None
    _cache: MaskCache | None = field(default=None, init=False, repr=False, compare=False)

    def load(self, worker: int = 0) -> None:
        """Load the segmenter; see `Candidates.load`."""
        self.segmenter.place(worker)
        self.segmenter.load()
        self._cache = MaskCache(self.cache, _about(self.segmenter))

    def of(self, picture: ReferredPicture, image: Image.Image) -> list[LabelledRegion]:
        """Return the masks that are not empty; see `Candidates.of`."""
        assert self._cache is not None, "load comes first"
        size = image.height, image.width
        made = self._cache.get(picture.files[0], None, size, lambda: self._made(image))
        return [labelled(i, mask, None, image) for i, mask in enumerate(made)] or [
            labelled(0, None, None, image)
        ]

    def _made(self, image: Image.Image) -> Masks:
        found = self.segmenter.segment_everything(np.asarray(image))
        return [encode_rle(p.mask) for p in found if p.mask.any()]


def _about(segmenter: BoxSegmenter | EverythingSegmenter) -> dict[str, Any]:
    kind = type(segmenter)
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **segmenter.settings()}


def _by_image(record: Any) -> list[tuple[int, list[tuple[Box, Region]]]]:
    if isinstance(record, dict):
        return [(int(key), [(_box(b), None) for b in boxes]) for key, boxes in record.items()]
    found: dict[int, list[tuple[Box, Region]]] = {}
    for entry in record:
        box = _box(entry["bbox"] if "bbox" in entry else entry["box"])
        found.setdefault(int(entry["image_id"]), []).append((box, entry.get("segmentation")))
    return list(found.items())


def _box(xywh: Any) -> Box:
    box = box_of(xywh)
    if box is None:
        raise ValueError(f"{json.dumps(xywh)} is no box [x, y, width, height]")
    return box


def _clipped(box: Box, image: Image.Image) -> Box | None:
    """Return the part of a box that lies in the picture."""
    x1, y1 = max(box.x1, 0), max(box.y1, 0)
    x2, y2 = min(box.x2, image.width), min(box.y2, image.height)
    return Box(x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
