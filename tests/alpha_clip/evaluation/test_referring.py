import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import alpha_clip
from alpha_clip.cli import main
from alpha_clip.drops import Drops
from alpha_clip.evaluation.candidates import Detections, Objects
from alpha_clip.evaluation.columns import PICTURE
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.evaluation.referring import ModelChoice, ReferringExpressions
from alpha_clip.evaluation.runner import run_benchmark
from alpha_clip.model import AlphaClip

WORDS = ["cup", "dog", "red", "man", "table", "tree", "ball", "blue"]
Record = dict[str, Any]


def make(seed: int, count: int = 10) -> list[Record]:
    """Pictures with four to six objects and two expressions each; no word for a place."""
    rng = np.random.default_rng(seed)
    records = []
    for image in range(count):
        corners = rng.integers(0, [50, 40], (int(rng.integers(4, 7)), 2))
        sides = rng.integers(8, 20, corners.shape)
        anns = [
            {"id": 100 * image + i, "bbox": [int(v) for v in (*corner, *side)]}
            for i, (corner, side) in enumerate(zip(corners, sides, strict=True))
        ]
        sentences = [{"raw": " ".join(rng.choice(WORDS, 2)).capitalize()} for _ in range(2)]
        records.append(
            {
                "image_id": image,
                "file_name": f"COCO_train2014_{image:012d}_3.jpg",
                "ann_id": anns[1]["id"],
                "anns": anns,
                "sentences": sentences,
            }
        )
    return records


def save(records: list[Record], folder: Path) -> str:
    file = folder / "refcoco_val.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@dataclass
class Data:
    annotations: str
    images: str
    records: list[Record]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    folder = tmp_path / "train2014"
    folder.mkdir()
    records = make(0)
    for record in records:
        pixels = np.random.default_rng(record["image_id"]).integers(0, 255, (60, 80, 3), np.uint8)
        name = record["file_name"].replace("_3.jpg", ".jpg")
        Image.fromarray(pixels).save(folder / name)
    return Data(save(records, tmp_path), str(folder), records)


@pytest.fixture(scope="module")
def other(tiny_name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[AlphaClip, str]:
    torch.manual_seed(5)
    model, _, _ = alpha_clip.create_model(tiny_name)
    torch.nn.init.normal_(model.visual.conv1.weight_alpha, std=0.5)
    folder = str(tmp_path_factory.mktemp("other") / "model")
    alpha_clip.save_checkpoint(model, folder)
    return model.requires_grad_(False), folder


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def by_hand(models: list[AlphaClip], data: Data, aggregate: Any = sum) -> list[bool]:
    """Box alpha over the picture and over the blurred picture, as in the published script."""
    right = []
    for record in data.records:
        name = record["file_name"].replace("_3.jpg", ".jpg")
        image = Image.open(Path(data.images) / name).convert("RGB")
        blurred = image.filter(ImageFilter.GaussianBlur(100 / 640 * 80))
        boxes = [ann["bbox"] for ann in record["anns"]]
        gold = boxes[1]
        views: list[list[tuple[Image.Image, Any]]] = [[], []]
        for x, y, w, h in boxes:
            mask = np.zeros((60, 80), bool)
            mask[y : y + h, x : x + w] = True
            shown = Image.composite(image, blurred, Image.fromarray(mask))
            views[0].append((image, mask))
            views[1].append((shown, mask))
        for sentence in record["sentences"]:
            of_view = []
            for view in views:
                logits = torch.zeros(len(boxes))
                for model in models:
                    transform = model.transform.replace(geometry="squash")
                    rgba = torch.stack([transform(*shown) for shown in view])
                    text = model.tokenizer([f"a photo of {sentence['raw'].lower()}"])
                    features = model.encode_image(rgba, normalize=True)
                    target = model.encode_text(text, normalize=True)
                    logits = logits + model.logit_scale.exp() * (features @ target.T)[:, 0]
                of_view.append(logits)
            best = int(aggregate(of_view).argmax())
            right.append(iou(boxes[best], gold) >= 0.5)
    return right


def score(benchmark: ReferringExpressions, model: AlphaClip) -> Any:
    benchmark.prepare(model)
    (part,) = benchmark.parts()
    with torch.inference_mode():
        return benchmark.score(model, part, Drops(), lambda _: None)


@torch.inference_mode()
def test_answers_equal_the_published_arithmetic_by_hand(data: Data, model: AlphaClip) -> None:
    benchmark = ReferringExpressions(data.annotations, data.images)
    columns = score(benchmark, model)
    expected = by_hand([model], data)
    assert columns["right/all views"].tolist() == expected
    assert 0 < sum(expected) < len(expected)
    scores = benchmark.run(model)
    assert scores["all views"] == pytest.approx(np.mean(expected))
    assert scores["without relations/all views"] == scores["all views"]  # nothing says where
    assert scores["expressions"] == 20
    assert scores["candidates/best"] == 1


@pytest.mark.parametrize("aggregate", ["sum", "max"])
@torch.inference_mode()
def test_several_models_add_their_logits(
    data: Data, model: AlphaClip, other: tuple[AlphaClip, str], aggregate: Any
) -> None:
    further = (ModelChoice(checkpoint=other[1]),)
    benchmark = ReferringExpressions(
        data.annotations, data.images, aggregate=aggregate, summed_with=further, batch_size=3
    )
    together = sum if aggregate == "sum" else lambda views: torch.stack(views).amax(0)
    expected = by_hand([model, other[0]], data, together)
    assert score(benchmark, model)["right/all views"].tolist() == expected
    assert expected != by_hand([model], data, together)
    assert len(benchmark.models(model)) == 2


def test_what_is_said_of_places_counts(data: Data, model: AlphaClip) -> None:
    for record in data.records:
        for i, ann in enumerate(record["anns"]):
            ann["bbox"][0] += 0.01 * i  # no two are equally far left
        xs = [2 * ann["bbox"][0] + ann["bbox"][2] for ann in record["anns"]]
        record["ann_id"] = record["anns"][int(np.argmin(xs))]["id"]
        record["sentences"] = [{"raw": "left cup"}]
    annotations = save(data.records, Path(data.annotations).parent)
    told = score(ReferringExpressions(annotations, data.images, focus=("no alpha",)), model)
    # Looks tell nothing here: relations find the leftmost, guessing does not.
    assert told["right/no alpha"].mean() == 1
    assert told["right/without relations/no alpha"].mean() < 0.5
    silent = ReferringExpressions(annotations, data.images, focus=("no alpha",), relations="none")
    assert score(silent, model)["right/no alpha"].mean() < 0.5


def test_without_pointing_it_is_guessing(data: Data, model: AlphaClip) -> None:
    columns = score(ReferringExpressions(data.annotations, data.images, focus=("no alpha",)), model)
    assert columns["right/no alpha"] == pytest.approx(columns["right/candidates/guess"])
    assert columns["right/no alpha"].mean() > 0
    assert "right/all views" not in columns  # one view is all


def test_detections_bound_what_can_be_found(data: Data, model: AlphaClip, tmp_path: Path) -> None:
    found = {
        str(record["image_id"]): [record["anns"][i]["bbox"] for i in (0, 2)]
        for record in data.records[:8]
    }
    found["0"] = [[v + 0.4 for v in data.records[0]["anns"][1]["bbox"]]]
    file = tmp_path / "dets.json"
    file.write_text(json.dumps(found))
    benchmark = ReferringExpressions(data.annotations, data.images, Detections(file=str(file)))
    columns = score(benchmark, model)
    assert columns["right/candidates/best"][:2].tolist() == [1, 1]
    assert columns["right/all views"][:2].tolist() == [1, 1]  # the only one
    assert columns["right/candidates/best"].mean() < 0.5
    assert columns["candidates"][-1] == 1  # nothing was found: the whole picture
    parts = benchmark.parts()
    file.write_text(json.dumps({**found, "1": [[1, 2, 3, 4]]}))
    again = ReferringExpressions(data.annotations, data.images, Detections(file=str(file)))
    assert again.parts() != parts  # other candidates are scored anew


def test_a_run_goes_on_and_can_be_sent_to_a_process(
    data: Data, tiny_name: str, tmp_path: Path, other: tuple[AlphaClip, str]
) -> None:
    import pickle

    def benchmark() -> ReferringExpressions:
        further = (ModelChoice(checkpoint=other[1]),)
        return ReferringExpressions(data.annotations, data.images, Objects(), summed_with=further)

    def make_model(device: str) -> AlphaClip:
        torch.manual_seed(0)
        return alpha_clip.create_model(tiny_name, device=device)[0]

    with torch.inference_mode():
        first, dropped = run_benchmark(benchmark(), make_model, tmp_path / "parts", ["cpu"])
        (file,) = (tmp_path / "parts").glob("*/*.npz")
        stamp = file.stat().st_mtime_ns
        second, _ = run_benchmark(benchmark(), make_model, tmp_path / "parts", ["cpu"])
    assert dropped == []
    assert file.stat().st_mtime_ns == stamp
    assert first.keys() == second.keys()
    loaded = benchmark()
    loaded.prepare(make_model("cpu"))
    assert len(pickle.dumps(loaded)) < 50_000  # no models in it
    assert pickle.loads(pickle.dumps(loaded)).parts() == loaded.parts()


def test_missing_pictures_are_counted_and_too_many_are_an_error(
    data: Data, model: AlphaClip, tmp_path: Path
) -> None:
    files = sorted(Path(data.images).iterdir())
    files[3].unlink()
    benchmark = ReferringExpressions(data.annotations, data.images)
    benchmark.prepare(model)
    (part,) = benchmark.parts()
    drops = Drops()
    with torch.inference_mode():
        columns = benchmark.score(model, part, drops, lambda _: None)
    assert drops.counts() == {"missing_image": 1}
    assert len(columns[PICTURE]) == 18
    assert columns[PICTURE].max() == 8
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"missing_image: .*max_dropped|max_dropped"),
    ):
        run_benchmark(benchmark, lambda _: model, tmp_path / "parts", ["cpu"])
    with pytest.raises(ValueError, match="no picture could be used"):
        benchmark.outcomes({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"focus": ("alpa",)}, r"expected focus to be some of .*'alpha', .*got \['alpa'\]"),
        ({"focus": ()}, "expected focus to be some of"),
        ({"images": "nowhere"}, "nowhere is no folder"),
        ({"split": "testB"}, "no expressions of split 'testB'"),
    ],
)
def test_bad_settings_stop_before_work(data: Data, changes: dict[str, Any], message: str) -> None:
    given = {"annotations": data.annotations, "images": data.images, **changes}
    with pytest.raises(ValueError, match=message):
        ReferringExpressions(**given)


def test_the_command_leaves_answers_and_pictures(
    data: Data, other: tuple[AlphaClip, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "refcoco_val.json"
    made = main(
        [
            *("eval", "--checkpoint", other[1], "--output", str(output), "--benchmark"),
            "alpha_clip.evaluation.referring.ReferringExpressions",
            *("--benchmark.annotations", data.annotations, "--benchmark.images", data.images),
            *("--benchmark.candidates", "alpha_clip.evaluation.candidates.Objects"),
            *("--benchmark.candidates.cache", str(tmp_path / "masks")),
            "--benchmark.candidates.segmenter",
            "data_pipeline.segmenters.box.BoxSegmenter",
            *("--benchmark.focus", "[alpha, red circle]"),
        ]
    )
    assert made == 0, capsys.readouterr().err
    record = json.loads(output.read_text())
    assert record["benchmark"] == "ReferringExpressions refcoco_val"
    assert {"all views", "alpha", "red circle", "candidates/guess"} <= record["intervals"].keys()
    lines = output.with_suffix(".answers.jsonl").read_text().splitlines()
    answers = list(map(json.loads, lines))
    assert len(answers) == 20
    assert np.mean([a["right"]["all views"] for a in answers]) == record["scores"]["all views"]
    for answer, expected in zip(answers[::2], data.records, strict=True):
        x, y, w, h = expected["anns"][1]["bbox"]
        assert answer["meant_xyxy_px"] == [x, y, x + w, y + h]
        assert answer["expression"] == expected["sentences"][0]["raw"].lower()
        assert 0 < answer["probability"] <= 1
    assert len(list((tmp_path / "masks").glob("*/*-*.json"))) == 10
    with Image.open(output.with_suffix(".examples.png")) as sheet:
        assert sheet.width > 500
    main(["eval", "--compare", str(output), str(output.with_name("x.json"))])
    output.with_name("x.json").write_text(output.read_text())
    assert (
        main(
            [
                "eval",
                "--compare",
                str(output),
                str(output.with_name("x.json")),
                "--output",
                str(tmp_path / "c.md"),
            ]
        )
        == 0
    )
    table = (tmp_path / "c.md").read_text()
    assert "| Red Circle (paper) | Alpha-CLIP B/16 + L/14 (paper) |" in table
    assert "| 0.4980 | 0.5570 |" in table


@pytest.mark.slow
def test_a_random_model_is_at_chance_on_photographs(photographs: Any, model: AlphaClip) -> None:
    benchmark = ReferringExpressions(str(photographs.expressions), str(photographs.folder))
    benchmark.prepare(model)
    parts = benchmark.parts()
    with torch.inference_mode():
        columns = [benchmark.score(model, part, Drops(), lambda _: None) for part in parts]
    found = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
    assert len(found["file"]) == 216
    _, pictures = np.unique(found["file"], return_inverse=True)
    # It prefers some objects of a picture, such as large ones, which people also speak of more; so
    # the same answers are given to the picture's expressions in any order.
    right = np.array(
        [
            [iou(xywh(chosen), xywh(meant)) >= 0.5 for meant in found["meant_xyxy_px"]]
            for chosen in found["chosen_xyxy_px"]
        ]
    )
    same = pictures[:, None] == pictures[None]
    by_chance = (right * same).sum(1) / same.sum(1)
    assert 0.1 < by_chance.mean() < 0.6
    low, high = Outcome(found["right/all views"] - by_chance, pictures).interval(level=0.99)
    assert low <= 0 <= high


def xywh(xyxy: Any) -> list[float]:
    return [xyxy[0], xyxy[1], xyxy[2] - xyxy[0], xyxy[3] - xyxy[1]]
