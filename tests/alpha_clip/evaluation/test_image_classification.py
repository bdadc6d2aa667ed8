import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alpha_clip.drops import Drops
from alpha_clip.evaluation.image_classification import FolderClasses, ImageClassification
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.model import AlphaClip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with one, two and three pictures, and a file that is none."""
    root = tmp_path / "val"
    for number, name in enumerate(("n01440764", "n01443537", "n01484850"), 1):
        (root / name).mkdir(parents=True)
        for i in range(number):
            pixels = np.random.default_rng(9 * number + i).integers(0, 255, (40, 60, 3), np.uint8)
            ending = ("JPEG", "png")[i % 2]
            Image.fromarray(pixels).save(root / name / f"{i}.{ending}")
    (root / "n01440764" / "notes.txt").write_text("x")
    return root


@pytest.mark.parametrize("templates", ["one", "80"])
@torch.inference_mode()
def test_figures_equal_a_count_by_hand(folder: Path, model: AlphaClip, templates: Any) -> None:
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    prompts = [lambda name: f"a photo of a {name}."]
    if templates == "80":
        prompts = list(OPENAI_IMAGENET_TEMPLATES)
    weights = []
    for name in (IMAGENET_CLASSNAMES[i] for i in (0, 1, 2)):
        texts = model.tokenizer([prompt(name) for prompt in prompts])
        mean = model.encode_text(texts, normalize=True).mean(0)
        weights.append(mean / mean.norm())
    transform = model.transform.replace(geometry="center_crop")
    right: list[list[bool]] = [[], [], []]
    for label, synset in enumerate(sorted(p.name for p in folder.iterdir())):
        for file in sorted(folder.glob(f"{synset}/[0-9].*")):
            rgb = transform(Image.open(file))[None, :3]  # no alpha at all: the whole image
            best = (torch.stack(weights) @ model.encode_image(rgb, normalize=True)[0]).argmax()
            right[label].append(int(best) == label)
    scores = ImageClassification(str(folder), templates=templates).run(model)
    assert scores["no alpha"] == pytest.approx(np.mean([r for rs in right for r in rs]))
    assert scores["mean per class/no alpha"] == pytest.approx(np.mean(list(map(np.mean, right))))
    assert (scores["regions"], scores["classes"]) == (6, 3)


def test_names_come_from_folders_or_a_file(folder: Path, tmp_path: Path) -> None:
    assert FolderClasses(str(folder), "wordnet", None).names[0] == "tench"
    (folder / "n01484850").rename(folder / "white_shark")
    assert FolderClasses(str(folder), "folders", None).names[2] == "white shark"
    file = tmp_path / "names.json"
    named = {"n01440764": "fish", "n01443537": "gold", "white_shark": "shark", "none": "x"}
    file.write_text(json.dumps(named))
    found = FolderClasses(str(folder), str(file), None)
    assert found.names == ["fish", "gold", "x", "shark"]  # also those without pictures
    file.write_text(json.dumps({"n01440764": "fish"}))
    with pytest.raises(ValueError, match=r"names\.json has no name for n01443537, white_shark"):
        FolderClasses(str(folder), str(file), None)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r'something else than a JSON object \{"folder"'):
        FolderClasses(str(folder), str(file), None)
    with pytest.raises(ValueError, match="are no classes of ImageNet-1k"):
        ImageClassification(str(folder))


def test_fewer_pictures_are_spread_over_the_classes(folder: Path) -> None:
    source = FolderClasses(str(folder), "openai", 3)
    (count,) = source.parts().values()
    assert count == 3
    assert {entry.parent.name for entry in source._entries} == {
        "n01440764",
        "n01443537",
        "n01484850",
    }


def test_a_folder_without_pictures_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no CLASS/PICTURE\.jpg"):
        ImageClassification(str(tmp_path))


@torch.inference_mode()
def test_a_random_model_is_at_chance_on_photographs(photographs: Any, model: AlphaClip) -> None:
    folder = photographs.imagenet
    benchmark = ImageClassification(str(folder / "train"), str(folder / "class_names.json"))
    benchmark.prepare(model)
    (part,) = benchmark.parts()
    columns = benchmark.score(model, part, Drops(), lambda _: None)
    outcome = benchmark.outcomes(columns)["no alpha"]
    label, answer = benchmark.confusions(columns)  # type: ignore[misc]
    frequency = [np.bincount(numbers, minlength=9) / len(label) for numbers in (label, answer)]
    low, high = Outcome(outcome.values, outcome.pictures).interval(level=0.99)
    assert len(label) == 23
    assert low <= float(frequency[0] @ frequency[1]) <= high
