import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alpha_clip.evaluation.candidates import Candidates, Detections, Everything, Objects
from alpha_clip.evaluation.expressions import ReferredPicture
from alpha_clip.evaluation.mask_cache import MaskCache
from alpha_clip.regions import Box, SampleError, decode_rle, encode_rle

IMAGE = Image.new("RGB", (80, 60))
TRIANGLE = [[10.0, 10.0, 40.0, 10.0, 10.0, 40.0]]
PICTURE = ReferredPicture(
    7,
    ("folder/seven.jpg",),
    ((Box(10, 10, 40, 40), TRIANGLE), (Box(50, 20, 200, 50), None)),
    (),
)


@dataclass
class Halves:
    """The left half of each box; notes how often it was asked."""

    share: float = 0.5
    calls: list[int] = field(default_factory=list, repr=False)

    def place(self, worker: int) -> None:
        self.worker = worker

    def load(self) -> None:
        self.calls.append(0)

    def settings(self) -> Any:
        return {"share": self.share}

    def segment(self, rgb: Any, boxes_xyxy_px: Any) -> Any:
        self.calls.append(len(boxes_xyxy_px))
        masks = np.zeros((len(boxes_xyxy_px), *rgb.shape[:2]), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes_xyxy_px.astype(int), strict=True):
            mask[y1:y2, x1 : x1 + int(self.share * (x2 - x1))] = True
        return [SimpleNamespace(mask=mask) for mask in masks]

    def segment_everything(self, rgb: Any) -> Any:
        whole, nothing = np.ones(rgb.shape[:2], bool), np.zeros(rgb.shape[:2], bool)
        corner = nothing.copy()
        corner[:5, :4] = True
        return [SimpleNamespace(mask=mask) for mask in (whole, nothing, corner)]


def boxes(candidates: Candidates, picture: ReferredPicture = PICTURE) -> list[tuple[float, ...]]:
    found = candidates.of(picture, IMAGE)
    assert [region.label for region in found] == list(range(len(found)))
    return [(r.box.x1, r.box.y1, r.box.x2, r.box.y2) for r in found]


def areas(candidates: Candidates) -> list[int]:
    return [int(decode_rle(region.rle).sum()) for region in candidates.of(PICTURE, IMAGE)]


def test_objects_have_their_own_masks_or_all_of_their_boxes() -> None:
    assert boxes(Objects()) == [(10, 10, 40, 40), (50, 20, 80, 50)]  # cut at the edge
    triangle, box = areas(Objects())
    assert 400 < triangle < 500
    assert box == 30 * 30


def test_a_segmenter_makes_masks_of_boxes(tmp_path: Path) -> None:
    segmenter = Halves()
    found = Objects(segmenter=segmenter, cache=str(tmp_path))
    found.load()
    assert areas(found) == [15 * 30, 15 * 30]
    assert areas(found) == [15 * 30, 15 * 30]
    assert segmenter.calls == [0, 2]  # asked once
    again = Objects(segmenter=Halves(), cache=str(tmp_path))
    again.load()
    assert areas(again) == [15 * 30, 15 * 30]
    assert again.segmenter.calls == [0]  # type: ignore[union-attr]  # the file was enough
    other = Objects(segmenter=Halves(0.2), cache=str(tmp_path))
    other.load()
    assert areas(other) == [6 * 30, 6 * 30]  # other settings, other masks


def test_an_empty_mask_is_all_of_its_box() -> None:
    found = Objects(segmenter=Halves(0.0))
    found.load()
    assert areas(found) == [900, 900]


def test_masks_that_do_not_fit_cost_the_picture() -> None:
    wrong = encode_rle(np.ones((5, 5), bool))
    picture = ReferredPicture(7, ("a.jpg",), ((Box(0, 0, 5, 5), wrong),), ())
    with pytest.raises(SampleError, match=r"candidates of a\.jpg"):
        Objects().of(picture, IMAGE)


MASK = np.zeros((60, 80), bool)
MASK[3:8, 2:12] = True


@pytest.mark.parametrize(
    "record",
    [
        {"7": [[2, 3, 10, 5], [0, 0, 4, 4]], "8": []},
        [{"image_id": 7, "box": [2, 3, 10, 5]}, {"image_id": 7, "box": [0, 0, 4, 4]}],
        [
            {"image_id": 7, "bbox": [2, 3, 10, 5], "segmentation": encode_rle(MASK), "score": 0.5},
            {"image_id": 7, "bbox": [0, 0, 4, 4]},
        ],
    ],
)
def test_detections_are_read_in_each_format(tmp_path: Path, record: object) -> None:
    file = tmp_path / "dets.json"
    file.write_text(json.dumps(record))
    found = Detections(file=str(file))
    assert boxes(found) == [(2, 3, 12, 8), (0, 0, 4, 4)]
    assert areas(found) == [50, 16]
    other = ReferredPicture(8, ("b.jpg",), (), ())
    assert boxes(found, other) == [(0, 0, 80, 60)]  # nothing was found: the whole picture
    assert found.given(PICTURE) != found.given(other)
    found.check([other, PICTURE])
    with pytest.raises(ValueError, match="no detection in any of the 1 pictures; is it of another"):
        found.check([other])


@pytest.mark.parametrize("record", [{"7": [[1, 2, 3]]}, [{"image_id": 7}], {"x": []}, [3], 5])
def test_other_formats_are_refused(tmp_path: Path, record: object) -> None:
    file = tmp_path / "dets.json"
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"dets\.json.*expected detections as ReCLIP"):
        Detections(file=str(file)).check([PICTURE])


def test_everything_that_a_segmenter_finds(tmp_path: Path) -> None:
    found = Everything(Halves(), str(tmp_path))
    found.load(3)
    assert found.segmenter.worker == 3  # type: ignore[attr-defined]
    assert boxes(found) == [(0, 0, 80, 60), (0, 0, 4, 5)]
    assert boxes(found) == boxes(found)  # from disk


def test_a_cache_keeps_what_was_made_for_this_picture_and_question(tmp_path: Path) -> None:
    cache = MaskCache(str(tmp_path), {"a": 1})
    made = [encode_rle(MASK)]
    calls: list[str] = []

    def make() -> Any:
        calls.append("made")
        return made

    assert cache.get("x.jpg", [1], (60, 80), make) == made
    assert cache.get("x.jpg", [1], (60, 80), make) == made
    assert len(calls) == 1
    cache.get("x.jpg", [2], (60, 80), make)
    cache.get("folder/x.jpg", [1], (60, 80), make)
    MaskCache(str(tmp_path), {"a": 2}).get("x.jpg", [1], (60, 80), make)
    MaskCache(None, {"a": 1}).get("x.jpg", [1], (60, 80), make)
    assert len(calls) == 5
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("content", ["", "[{}]", '[{"size": [5, 5], "counts": "1"}]', "5", "{}x"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, content: str) -> None:
    cache = MaskCache(str(tmp_path), {})
    made = [encode_rle(MASK)]
    cache.get("x.jpg", None, (60, 80), lambda: made)
    (file,) = tmp_path.glob("*/x-*.json")
    file.write_text(content)
    assert cache.get("x.jpg", None, (60, 80), lambda: made) == made
    assert json.loads(file.read_text()) == made
