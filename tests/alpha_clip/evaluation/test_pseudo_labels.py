import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import alpha_clip
from alpha_clip.cli import main
from alpha_clip.drops import Drops
from alpha_clip.evaluation.columns import PICTURE
from alpha_clip.evaluation.proposals import read_categories
from alpha_clip.evaluation.pseudo_labels import PseudoLabels
from alpha_clip.model import AlphaClip
from alpha_clip.regions import decode_rle, encode_rle

NAMES = ["red cup", "dog", "zebra_crossing", "tree"]
POLYGON = [[10.0, 10.0, 40.0, 10.0, 40.0, 30.0, 10.0, 30.0]]
Make = Callable[..., PseudoLabels]


def rectangle(x: int, y: int, w: int, h: int) -> Any:
    mask = np.zeros((60, 80), bool)
    mask[y : y + h, x : x + w] = True
    return encode_rle(mask)


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    """Three pictures of noise; regions as polygons, as RLE and as a box alone; and a crowd."""
    (tmp_path / "images").mkdir()
    images = []
    for key in (3, 5, 9):
        pixels = np.random.default_rng(key).integers(0, 255, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{key}.png")
        image = {"id": key, "file_name": f"{key}.png", "width": 80, "height": 60, "neg": [key]}
        images.append(image)
    regions = [
        {"image_id": 3, "segmentation": POLYGON, "bbox": [10, 10, 30, 20]},
        {"image_id": 3, "segmentation": rectangle(5, 5, 50, 40)},
        {"image_id": 9, "bbox": [0, 0, 30, 30]},
        {"image_id": 9, "segmentation": rectangle(1, 0, 30, 30), "bbox": [1, 0, 30, 30]},
        {"image_id": 9, "segmentation": rectangle(0, 0, 80, 60), "iscrowd": 1},
    ]
    annotations = [
        {"id": i, "category_id": 10 * (1 + i % 4), **region} for i, region in enumerate(regions)
    ]
    categories = [{"id": 10 * i, "name": name} for i, name in enumerate(NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def save(record: object, folder: Path, name: str = "instances.json") -> str:
    (folder / name).write_text(json.dumps(record))
    return str(folder / name)


@pytest.fixture
def make(record: dict[str, Any], tmp_path: Path) -> Make:
    def build(**settings: Any) -> PseudoLabels:
        images = str(tmp_path / "images")
        return PseudoLabels(save(record, tmp_path), images, **{"min_score": 0.0, **settings})

    return build


@torch.inference_mode()
def score(benchmark: PseudoLabels, model: AlphaClip) -> Any:
    benchmark.prepare(model)
    (part,) = benchmark.parts()
    return benchmark.score(model, part, Drops(), lambda _: None)


@torch.no_grad()
def chances(model: AlphaClip, folder: Path, names: list[str]) -> torch.Tensor:
    """Probabilities of the four regions by hand."""
    transform = model.transform.replace(geometry="pad")
    box = np.zeros((60, 80), bool)
    box[:30, :30] = True
    polygon = decode_rle(rectangle(10, 10, 30, 20))
    masks = [(3, polygon), (3, decode_rle(rectangle(5, 5, 50, 40)))]
    masks += [(9, box), (9, decode_rle(rectangle(1, 0, 30, 30)))]
    rgba = [transform(Image.open(folder / "images" / f"{key}.png"), mask) for key, mask in masks]
    features = model.encode_image(torch.stack(rgba), normalize=True)
    prompts = [f"a photo of a {name}." for name in names]
    texts = model.encode_text(model.tokenizer(prompts), normalize=True)
    return (model.logit_scale.exp() * features @ texts.T).softmax(-1)


def test_scores_are_probabilities_among_all_names(
    make: Make, model: AlphaClip, tmp_path: Path
) -> None:
    columns = score(make(labels_a_region=2), model)
    expected = chances(model, tmp_path, ["red cup", "dog", "zebra crossing", "tree"]).topk(2)
    assert columns["score"].reshape(4, 2) == pytest.approx(expected.values.numpy(), rel=1e-4)
    assert columns["label"].reshape(4, 2).tolist() == expected.indices.tolist()
    assert columns["region"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert columns[PICTURE].tolist() == [0] * 4 + [1] * 4
    assert columns["kept"].all()
    benchmark = make()
    found = benchmark.outcomes(score(benchmark, model))
    assert found["labels/score"].mean() == pytest.approx(
        float(expected.values[:, 0].mean()), rel=1e-4
    )
    right = [int(e) == i % 4 for i, e in enumerate(expected.indices[:, 0])]
    assert found["right/all"].mean() == np.mean(right)


def test_other_names_compete_and_give_no_label(
    make: Make, model: AlphaClip, tmp_path: Path
) -> None:
    columns = score(make(others=("background", "sky")), model)
    names = ["red cup", "dog", "zebra crossing", "tree", "background", "sky"]
    expected = chances(model, tmp_path, names)[:, :4].max(1)
    assert columns["score"] == pytest.approx(expected.values.numpy(), rel=1e-4)
    assert columns["label"].tolist() == expected.indices.tolist()


def test_proposals_are_named_instead_and_their_scores_count(
    make: Make, model: AlphaClip, tmp_path: Path
) -> None:
    proposals = [
        {"image_id": 9, "bbox": [0, 0, 30, 30], "score": 0.5},
        {"image_id": 3, "segmentation": rectangle(5, 5, 50, 40), "bbox": [5, 5, 50, 40]},
    ]
    file = save(proposals, tmp_path, "proposals.json")
    benchmark = make(proposals=file)
    columns = score(benchmark, model)
    expected = chances(model, tmp_path, ["red cup", "dog", "zebra crossing", "tree"]).amax(1)
    assert columns["score"].tolist() == pytest.approx(
        [0.5 * float(expected[2]), float(expected[1])], rel=1e-4
    )
    assert "right/all" not in benchmark.outcomes(columns)  # nobody knows


@pytest.mark.parametrize(("max_iou", "count"), [(None, 4), (0.99, 4), (0.5, 3)])
def test_of_labels_at_one_place_the_best_is_kept(
    make: Make, model: AlphaClip, tmp_path: Path, max_iou: float | None, count: int
) -> None:
    names = save({"10": "cup"}, tmp_path, "names.json")  # all are cups: the last two overlap
    columns = score(make(names=names, max_iou=max_iou), model)
    assert columns["kept"].sum() == count
    assert columns["kept"][:2].all()


def test_unsure_labels_are_left_out(make: Make, model: AlphaClip) -> None:
    sure = np.sort(score(make(), model)["score"])
    benchmark = make(min_score=float(sure[1:3].mean()))
    columns = score(benchmark, model)
    assert columns["kept"].sum() == 2
    assert benchmark.outcomes(columns)["labels/kept"].mean() == 0.5
    assert benchmark.counts(columns) == {"regions": 4, "labels": 2}


def test_the_files_train_and_measure_detectors(
    make: Make,
    record: dict[str, Any],
    model: AlphaClip,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(tmp_path / "model")
    alpha_clip.save_checkpoint(model, folder)
    lvis = {**record, "categories": [{**c, "frequency": "r"} for c in record["categories"]]}
    output = tmp_path / "out" / "labels.json"
    code = main(
        [
            *("eval", "--checkpoint", folder, "--output", str(output), "--benchmark"),
            "alpha_clip.evaluation.pseudo_labels.PseudoLabels",
            *("--benchmark.annotations", save(lvis, tmp_path)),
            *("--benchmark.images", str(tmp_path / "images"), "--benchmark.min_score", "0"),
        ]
    )
    assert code == 0, capsys.readouterr().err
    truth = COCO(str(output.with_suffix(".instances.json")))
    assert sorted(truth.getImgIds()) == [3, 9]  # 5 has no label
    assert truth.imgs[3]["neg"] == [3]  # what LVIS says of it
    assert {c["frequency"] for c in truth.cats.values()} == {"r"}
    assert len(truth.anns) == 4
    for annotation in truth.anns.values():
        if "segmentation" in annotation:
            assert decode_rle(annotation["segmentation"]).sum() == annotation["area"]
    assert truth.anns[1]["bbox"] == [10, 10, 30, 20]
    assert truth.anns[2]["bbox"] == [5, 5, 50, 40]  # from its mask
    assert "segmentation" not in truth.anns[3]
    results = truth.loadRes(str(output.with_suffix(".detections.json")))
    evaluation = COCOeval(truth, results, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)  # each finds itself
    with Image.open(output.with_suffix(".examples.png")) as sheet:
        assert sheet.width > 500
    table = output.with_suffix(".classes.csv").read_text().splitlines()
    assert table[0] == "class,regions,labels/score by class,right/top-1"
    assert len(table) == 5


def test_without_a_label_there_is_no_example(make: Make, model: AlphaClip, tmp_path: Path) -> None:
    benchmark = make(min_score=1.0)
    columns = score(benchmark, model)
    benchmark.write(columns, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.detections.json").read_text()) == []
    assert not (tmp_path / "x.examples.png").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["cup", "dog"], [(1, "cup"), (2, "dog")]),
        ({"7": "cup", "3": "dog"}, [(3, "dog"), (7, "cup")]),
        ({"categories": [{"id": 9, "name": "a"}, {"id": 2, "name": "b"}]}, [(2, "b"), (9, "a")]),
    ],
)
def test_names_are_read_in_each_format(
    tmp_path: Path, content: object, expected: list[tuple[int, str]]
) -> None:
    found = read_categories(save(content, tmp_path, "names.json"))
    assert [(c["id"], c["name"]) for c in found] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "something else than"),
        ([1], "something else than"),
        ({"a": "b"}, "something else than"),
        ({"categories": [{"id": 1}]}, "something else than"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "one id"),
        (3, "something else than"),
    ],
)
def test_names_of_another_format_are_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_categories(save(content, tmp_path, "names.json"))


def test_bad_input_stops_before_work(make: Make, record: dict[str, Any], tmp_path: Path) -> None:
    for settings in ({"min_score": 2.0}, {"labels_a_region": 0}, {"focus": ("x",)}):
        with pytest.raises(ValueError, match="expected"):
            make(**settings)
    file = save([{"image_id": 77, "bbox": [0, 0, 2, 2]}], tmp_path, "p.json")
    with pytest.raises(ValueError, match=r"p\.json has regions of images that .* such as 77"):
        make(proposals=file)
    for content in ({"a": 1}, [{"bbox": []}], 5, ["x"]):
        with pytest.raises(ValueError, match="something else than a list as COCO's results"):
            make(proposals=save(content, tmp_path, "p.json"))
    for score in ("0.5", float("nan"), -1, None):
        proposal = {"image_id": 3, "bbox": [0, 0, 2, 2], "score": score}
        with pytest.raises(ValueError, match="scores that are no number of 0 or more, such as"):
            make(proposals=save([proposal], tmp_path, "p.json"))
    record["images"] = "x"
    with pytest.raises(ValueError, match="something else than a COCO or LVIS file"):
        make()


def test_regions_that_can_not_be_used_are_counted(
    make: Make, record: dict[str, Any], model: AlphaClip
) -> None:
    record["annotations"][1]["segmentation"] = {"size": [9, 9], "counts": [81]}
    record["annotations"][2]["image_id"] = 5
    record["images"][1]["file_name"] = "gone.png"
    benchmark = make()
    benchmark.prepare(model)
    drops = Drops()
    (part,) = benchmark.parts()
    with torch.inference_mode():
        columns = benchmark.score(model, part, drops, lambda _: None)
    assert drops.counts() == {"bad_rle": 1, "missing_image": 1}
    assert columns["region"].tolist() == [0, 3]
    with pytest.raises(ValueError, match="no region could be used"):
        benchmark.outcomes({})
