import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alpha_clip.drops import Drops
from alpha_clip.evaluation.blind_pairs import BlindPairs
from alpha_clip.model import AlphaClip
from alpha_clip.regions import Box, encode_rle

ROWS = [
    (1, "Orientation", "a dog, facing left"),
    (2, "Orientation", "a dog facing right"),
    (3, "Orientation", "a door that is open"),
    (4, "Orientation", "a closed door"),
    (5, "Quantity", "three cups"),
    (6, "Quantity", "two cups"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pairs of two patterns, in the data set's own layout."""
    lines = ["Question ID,Type,Statement", *(f'{i},{kind},"{text}"' for i, kind, text in ROWS)]
    (tmp_path / "Questions.csv").write_text("\n".join(lines) + "\n")
    for number, kind, _ in ROWS:
        (tmp_path / "MLLM_VLM Images" / kind).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "MLLM_VLM Images" / kind / f"{number}.jpg")
    return tmp_path


@torch.no_grad()
def by_hand(model: AlphaClip, folder: Path, regions: dict[int, Box]) -> dict[str, float]:
    """The published script's way: a softmax over the two pictures for each statement."""
    transform = model.transform.replace(geometry="center_crop")
    right = []
    for (one, kind, first), (two, _, second) in zip(ROWS[::2], ROWS[1::2], strict=True):
        views = [
            transform(Image.open(folder / "MLLM_VLM Images" / kind / f"{i}.jpg"), regions.get(i))
            for i in (one, two)
        ]
        images = model.encode_image(torch.stack(views), normalize=True)
        chosen = []
        for text in (first, second):
            feature = model.encode_text(model.tokenizer([f"a photo of {text}"]), normalize=True)
            logits = model.logit_scale.exp() * feature @ images.T
            chosen.append("img1" if float(logits.softmax(-1)[0, 0]) > 0.5 else "img2")
        right.append((chosen[0] == "img1", chosen[1] == "img2"))
    return {
        "pairs/text to image": np.mean([a and b for a, b in right]),
        "questions/text to image": np.mean(right),
    }


@pytest.mark.parametrize("pointed", [False, True])
@torch.no_grad()
def test_scores_equal_the_published_way(
    model: AlphaClip, folder: Path, tmp_path: Path, pointed: bool
) -> None:
    regions = {1: Box(5, 5, 60, 50), 4: Box(30, 0, 70, 55)} if pointed else {}
    file = tmp_path / "regions.json"
    mask = np.zeros((60, 80), bool)
    mask[0:55, 30:70] = True
    file.write_text(json.dumps({"1": [5, 5, 60, 50], "4": encode_rle(mask)}))
    scores = BlindPairs(str(folder), str(file) if pointed else None).run(model)
    assert scores["pairs"] == 3
    for name, value in by_hand(model, folder, regions).items():
        assert scores[name] == pytest.approx(value), name


@torch.no_grad()
def test_a_plain_clip_is_pointed_at_regions_as_well(
    model: AlphaClip, folder: Path, tmp_path: Path
) -> None:
    regions = {str(number): [5, 5, 60, 50] for number, _, _ in ROWS}
    file = tmp_path / "regions.json"
    file.write_text(json.dumps(regions))
    shown = score_all(BlindPairs(str(folder), str(file), "crop"), model)
    for image in (folder / "MLLM_VLM Images").rglob("*.jpg"):
        Image.open(image).crop((5, 5, 60, 50)).save(image, quality=100, subsampling=0)
    assert shown == score_all(BlindPairs(str(folder)), model)
    assert score_all(BlindPairs(str(folder), str(file), "attention mask"), model)
    with pytest.raises(ValueError, match=r"unknown focus 'corp'; expected one of \['no alpha'"):
        BlindPairs(str(folder), str(file), "corp")


def score_all(benchmark: BlindPairs, model: AlphaClip) -> list[list[float]]:
    scored = [benchmark.score(model, part, Drops(), lambda _: None) for part in benchmark.parts()]
    return [row for columns in scored for row in columns["text to image"].tolist()]


def test_both_of_a_pair_must_be_right(model: AlphaClip, folder: Path) -> None:
    benchmark = BlindPairs(str(folder))
    assert list(benchmark.parts().values()) == [4, 2]
    assert benchmark.classes() == ["Orientation", "Quantity"]
    columns = {
        "picture": np.arange(3),
        "pattern": np.array([0, 0, 1]),
        "text to image": np.array([[1, 1], [1, 0], [1, 1.0]]),
        "image to text": np.array([[1, 0], [0, 1], [0, 0.0]]),
    }
    found = benchmark.outcomes(columns)
    assert found["pairs/text to image"].mean() == pytest.approx(2 / 3)
    assert found["questions/text to image"].mean() == pytest.approx(5 / 6)
    assert found["mean per class/text to image"].mean() == pytest.approx((1 / 2 + 1) / 2)
    assert found["pairs/image to text"].mean() == 0
    assert found["questions/image to text"].mean() == pytest.approx(1 / 3)


@torch.no_grad()
def test_a_model_that_sees_no_difference_finds_nothing(model: AlphaClip, folder: Path) -> None:
    for file in (folder / "MLLM_VLM Images").rglob("*.jpg"):
        Image.new("RGB", (60, 60), "red").save(file)
    scores = BlindPairs(str(folder)).run(model)
    assert scores["pairs/text to image"] == scores["questions/text to image"] == 0


@torch.no_grad()
def test_a_pair_that_can_not_be_shown_is_counted(
    model: AlphaClip, folder: Path, tmp_path: Path
) -> None:
    (folder / "MLLM_VLM Images" / "Quantity" / "6.jpg").unlink()
    file = tmp_path / "regions.json"
    file.write_text(json.dumps({"1": [500, 500, 510, 510]}))
    benchmark, drops = BlindPairs(str(folder), str(file)), Drops()
    orientation, quantity = benchmark.parts()
    assert quantity in BlindPairs(str(folder)).parts()
    assert orientation not in BlindPairs(str(folder)).parts()  # it has no region there
    assert benchmark.score(model, quantity, drops, lambda _: None) == {}
    assert len(benchmark.score(model, orientation, drops, lambda _: None)["pattern"]) == 1
    assert drops.counts() == {"missing_image": 1, "bad_rle": 1}
    with pytest.raises(ValueError, match="no pair could be used"):
        benchmark.outcomes({})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"Questions.csv can't be read"),
        ("Question ID,Type,Statement\n", "holds no pairs"),
        ("h,h,h\n1,a,b\n", "can't be read"),
        ("h,h,h\n1,a,b\n3,a,c\n", "questions 1 and 3 are no pair"),
        ("h,h,h\n2,a,b\n3,a,c\n", "questions 2 and 3 are no pair"),
        ("h,h\n1,a\n2,a\n", "can't be read"),
        ("h,h,h\nx,a,b\ny,a,c\n", "can't be read"),
    ],
)
def test_another_format_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "Questions.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        BlindPairs(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["[]", "x", '{"1": 5}', '{"1": [1, 2, 3]}', '{"1": [1, 2, "a", 3]}']
)
def test_regions_of_another_format_are_refused(folder: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "regions.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"regions\.json.*by question"):
        BlindPairs(str(folder), str(file))
    with pytest.raises(ValueError, match="can't be read, expected a JSON object"):
        BlindPairs(str(folder), str(tmp_path / "missing.json"))
