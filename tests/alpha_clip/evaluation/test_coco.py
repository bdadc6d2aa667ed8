import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from alpha_clip.drops import Drops
from alpha_clip.evaluation.coco import CocoClassification, CocoRegions
from alpha_clip.evaluation.labelled import LabelledPicture
from alpha_clip.model import AlphaClip
from alpha_clip.regions import decode_rle

SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]


@pytest.fixture
def coco(tmp_path: Path) -> dict[str, Any]:
    """Three pictures of noise, categories with gaps, and masks of every kind."""
    images = []
    for i, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        pixels = np.random.default_rng(i).integers(0, 255, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        images.append({"id": 10 * i, "file_name": name, "width": 80, "height": 60})
    mask = np.zeros((60, 80), np.uint8, order="F")
    mask[5:20, 40:70] = 1
    rle = coco_mask.encode(mask)
    runs = [5 + 40 * 60, *([15, 45] * 30)]
    runs[-1] += 60 * 80 - sum(runs)
    annotations: list[dict[str, Any]] = [
        {"id": 1, "image_id": 0, "category_id": 90, "segmentation": [SQUARE]},
        {
            "id": 2,
            "image_id": 0,
            "category_id": 3,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        },
        {
            "id": 3,
            "image_id": 20,
            "category_id": 3,
            "segmentation": {"size": [60, 80], "counts": runs},
        },
        {"id": 4, "image_id": 20, "category_id": 3, "segmentation": [SQUARE], "iscrowd": 1},
        {"id": 5, "image_id": 20, "category_id": 90, "bbox": [2, 3, 4, 5]},  # no mask at all
    ]
    for found in annotations[:4]:
        found["bbox"] = [10, 10, 20, 20] if found["category_id"] == 90 else [40, 5, 30, 15]
    categories = [
        {"id": 90, "name": "tooth_brush"},
        {"id": 3, "name": "car"},
        {"id": 4, "name": "x"},
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(record: object, folder: Path) -> str:
    file = folder / "instances.json"
    file.write_text(json.dumps(record))
    return str(file)


def regions(record: object, folder: Path) -> CocoRegions:
    return CocoRegions(write(record, folder), str(folder))


def pictures(source: Any, drops: Drops) -> list[LabelledPicture]:
    """The pictures of a source that has but one part."""
    (part,) = source.parts()
    return list(source.pictures(part, drops))


def test_an_edited_file_is_another_run(coco: dict[str, Any], tmp_path: Path) -> None:
    before = regions(coco, tmp_path).parts()
    assert regions(coco, tmp_path).parts() == before
    coco["annotations"][0]["segmentation"] = [[v + 1 for v in SQUARE]]
    assert regions(coco, tmp_path).parts().keys() != before.keys()


def test_masks_of_every_kind_and_ids_with_gaps(coco: dict[str, Any], tmp_path: Path) -> None:
    source = regions(coco, tmp_path)
    assert source.names == ["car", "x", "tooth brush"]
    drops = Drops()
    assert list(source.parts().values()) == [2]  # a picture without objects asks nothing
    first, second = pictures(source, drops)
    assert [r.label for r in first.regions + second.regions] == [2, 0, 0, 2]
    assert drops.counts() == {}
    polygon, compressed = (decode_rle(r.rle) for r in first.regions)
    assert polygon[10:30, 10:30].all()
    assert polygon.sum() == 400
    expected = np.zeros((60, 80), bool)
    expected[5:20, 40:70] = True
    assert np.array_equal(compressed, expected)
    assert np.array_equal(decode_rle(second.regions[0].rle), expected)
    box = second.regions[1]
    assert np.argwhere(decode_rle(box.rle)).min(0).tolist() == [3, 2]
    assert decode_rle(box.rle).sum() == 4 * 5


def test_scores_equal_a_count_by_hand(
    coco: dict[str, Any], tmp_path: Path, model: AlphaClip
) -> None:
    benchmark = CocoClassification(
        write(coco, tmp_path), str(tmp_path), focus=["alpha", "no alpha", "crop"]
    )
    transform = model.transform.replace(geometry="crop_box", scale=1.5)
    with torch.inference_mode():
        scores = benchmark.run(model)
        prompts = [f"a photo of a {name}." for name in ("car", "x", "tooth brush")]
        text = model.encode_text(model.tokenizer(prompts), normalize=True)
        right: dict[str, list[tuple[int, bool]]] = {"alpha": [], "crop": []}
        for picture in pictures(benchmark.source, Drops()):
            for region in picture.regions:
                mask, b = decode_rle(region.rle), region.box
                cut = picture.image.crop((int(b.x1), int(b.y1), int(b.x2), int(b.y2)))
                views = {"alpha": transform(picture.image, mask), "crop": transform(cut)}
                for way, rgba in views.items():
                    feature = model.encode_image(rgba[None], normalize=True)[0]
                    right[way].append(
                        (region.label, int((text @ feature).argmax()) == region.label)
                    )
    for way, found in right.items():
        assert scores[way] == pytest.approx(sum(ok for _, ok in found) / 4)
        each = [[ok for label, ok in found if label == c] for c in (0, 2)]
        mean = sum(sum(e) / len(e) for e in each) / 2  # the category without objects does not count
        assert scores[f"mean per class/{way}"] == pytest.approx(mean)
    assert (scores["regions"], scores["classes"]) == (4, 2)


def test_lvis_finds_its_pictures_by_url(coco: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    (tmp_path / "a.jpg").rename(tmp_path / "train2017" / "a.jpg")
    for picture in coco["images"]:
        name = picture.pop("file_name")
        picture["coco_url"] = f"http://images.cocodataset.org/train2017/{name}"
    drops = Drops()
    found = pictures(regions(coco, tmp_path), drops)
    assert (len(found), drops.counts()) == (2, {})  # one with its split, one without


def test_what_can_not_be_used_is_counted_under_its_reason(
    coco: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jpg").unlink()
    coco["annotations"][2]["segmentation"] = {"size": [60, 80], "counts": [5, 5]}
    coco["annotations"][3] = {**coco["annotations"][2], "segmentation": [[1, 2]], "id": 9}
    coco["annotations"][4]["bbox"] = [500, 500, 5, 5]
    drops = Drops()
    (picture,) = pictures(regions(coco, tmp_path), drops)
    assert picture.regions == []
    assert drops.counts() == {"missing_image": 1, "bad_rle": 3}
    assert "a.jpg: No such file" in caplog.text


def test_pictures_of_another_size_or_turned(coco: dict[str, Any], tmp_path: Path) -> None:
    turned = Image.open(tmp_path / "a.jpg").rotate(90, expand=True)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown, it is upright again
    turned.save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (81, 60)).save(tmp_path / "c.jpg")
    drops = Drops()
    (picture,) = pictures(regions(coco, tmp_path), drops)
    assert picture.image.size == (80, 60)
    assert drops.counts() == {"size_mismatch": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: [r], "is something else than COCO or LVIS instances"),
        (lambda r: {"images": r["images"]}, "no 'categories'; expected COCO or LVIS"),
        (lambda r: {**r, "images": r["images"] * 2}, "two images or two categories with one id"),
        (lambda r: {**r, "categories": r["categories"][:1]}, "a category that it does not list"),
        (lambda r: {**r, "images": r["images"][:1]}, "no 20; expected COCO or LVIS"),
        (lambda r: {**r, "images": 5}, "is something else than COCO"),
    ],
)
def test_files_of_another_format_are_refused(
    coco: dict[str, Any], tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        regions(change(coco), tmp_path)


def test_missing_files_are_refused(coco: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.json can't be read, expected COCO"):
        CocoRegions(str(tmp_path / "nothing.json"), str(tmp_path))
    with pytest.raises(ValueError, match="nowhere is no folder"):
        CocoRegions(write(coco, tmp_path), str(tmp_path / "nowhere"))
    coco["annotations"] = []
    benchmark = CocoClassification(write(coco, tmp_path), str(tmp_path), focus=["alpha"])
    with pytest.raises(ValueError, match="no region of the data"):
        benchmark.outcomes({})


def test_a_picture_outside_the_folder_is_not_read(coco: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    coco["images"][0]["file_name"] = "../a.jpg"
    coco["images"][2]["file_name"] = str(tmp_path / "c.jpg")
    drops = Drops()
    source = CocoRegions(write(coco, tmp_path), str(tmp_path / "inside"))
    assert pictures(source, drops) == []
    assert drops.counts() == {"missing_image": 2}


@pytest.mark.slow
def test_a_random_model_is_at_chance_on_photographs(photographs: Any, model: AlphaClip) -> None:
    """805 objects of 80 categories: of the answers that a random model gives, no more are right."""
    record = json.loads(photographs.instances.read_text())
    benchmark = CocoClassification(
        str(photographs.instances),
        str(photographs.folder),
        focus=["alpha", "no alpha", "masked crop"],
    )
    benchmark.prepare(model)
    drops = Drops()
    (part,) = benchmark.parts()
    with torch.inference_mode():
        columns = benchmark.score(model, part, drops, lambda _: None)
    crowds = sum(a["iscrowd"] for a in record["annotations"])
    assert len(columns["label"]) == len(record["annotations"]) - crowds
    assert drops.counts() == {}
    label = columns["label"]
    frequency = np.bincount(label, minlength=80) / len(label)
    for way in ("alpha", "no alpha", "masked crop"):
        # What the same answers would reach if they had nothing to do with the objects.
        answers = np.bincount(columns[f"predicted/{way}"], minlength=80) / len(label)
        chance = float(frequency @ answers)
        low, high = benchmark.outcomes(columns)[way].interval(level=0.999)
        assert low <= chance <= high, way
