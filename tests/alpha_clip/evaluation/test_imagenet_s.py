import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alpha_clip.drops import Drops
from alpha_clip.evaluation.imagenet_s import ImageNetS, class_names
from alpha_clip.model import AlphaClip
from alpha_clip.regions import decode_rle, encode_rle

SYNSETS = ["n01440764", "n01443537", "n01484850"]  # tench, goldfish, great white shark


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """Two pictures of each of three classes, in ImageNet-S's own folders."""
    root = tmp_path / "ImageNetS919"
    for label, synset in enumerate(SYNSETS, 1):
        for number in range(2):
            seed = np.random.default_rng(10 * label + number)
            picture = Image.fromarray(seed.integers(0, 255, (50, 70 + label, 3), np.uint8))
            ids = np.zeros((50, 70 + label), np.int64)
            ids[:5] = 1000  # ignored
            ids[10:40, 10 * label : 60] = label
            ids[45:] = 1 + label % 3  # another class
            mask = np.stack([ids % 256, ids // 256, 0 * ids], -1).astype(np.uint8)
            for kind, image, ending in (
                ("validation", picture, "JPEG"),
                ("validation-segmentation", Image.fromarray(mask), "png"),
            ):
                folder = root / kind / synset
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"val_{number}.{ending}")
    return root


@pytest.fixture
def published(data_set: Path) -> list[dict[str, Any]]:
    """The same in the layout of the published JSON, the classes in another order."""
    record = []
    for label, synset in reversed(list(enumerate(SYNSETS, 1))):
        for number in range(2):
            mask = np.zeros((50, 70 + label), bool)
            mask[10:40, 10 * label : 60] = True
            path = f"ImageNetS919/validation/{synset}/val_{number}.JPEG"
            record.append({"image_pth": path, "mask": encode_rle(mask), "category_word": synset})
    return record


def write(record: object, folder: Path) -> str:
    file = folder / "imagenet_919.json"
    file.write_text(json.dumps(record))
    return str(file)


def test_both_sources_give_the_same_figures(
    data_set: Path, published: list[dict[str, Any]], model: AlphaClip
) -> None:
    ways = ["alpha", "box alpha", "no alpha"]
    own = ImageNetS(str(data_set), focus=ways, controls=True)
    theirs = ImageNetS(
        str(data_set.parent), write(published, data_set.parent), focus=ways, controls=True
    )
    with torch.inference_mode():
        scores = own.run(model)
        assert scores["regions"] == 6
        again = theirs.run(model)
    assert scores.keys() == again.keys()
    for name, value in scores.items():
        if "shuffled" not in name:  # by other pictures, as they come in another order
            assert again[name] == pytest.approx(value), name


def test_scores_equal_a_count_by_hand(data_set: Path, model: AlphaClip) -> None:
    names = ["tench", "goldfish", "great_white_shark"]
    transform = model.transform.replace(geometry="center_crop")
    rank: dict[str, list[tuple[int, int]]] = {"alpha": [], "no alpha": []}
    with torch.inference_mode():
        scores = ImageNetS(str(data_set), focus=["alpha", "no alpha"]).run(model)
        prompts = model.tokenizer([f"a photo of a {name}." for name in names])
        text = model.encode_text(prompts, normalize=True)
        for label, synset in enumerate(SYNSETS):
            for number in range(2):
                image = Image.open(data_set / "validation" / synset / f"val_{number}.JPEG")
                mask = np.zeros((50, 71 + label), bool)
                mask[10:40, 10 * (label + 1) : 60] = True
                for way, region in (("alpha", mask), ("no alpha", None)):
                    feature = model.encode_image(transform(image, region)[None], normalize=True)
                    order = (feature @ text.T)[0].argsort(descending=True).tolist()
                    rank[way].append((label, order.index(label)))
    assert "inverted alpha" not in scores  # controls are for who asks
    for way, found in rank.items():
        assert scores[way] == pytest.approx(sum(r == 0 for _, r in found) / 6)
        each = [np.mean([r == 0 for c, r in found if c == label]) for label in range(3)]
        assert scores[f"mean per class/{way}"] == pytest.approx(np.mean(each))
        assert scores[f"mean per class top-5/{way}"] == 1  # of three


def test_masks_are_those_of_the_own_class(data_set: Path) -> None:
    source = ImageNetS(str(data_set)).source
    (part,) = source.parts()
    for picture in source.pictures(part, Drops()):
        (region,) = picture.regions
        mask = decode_rle(region.rle)
        assert mask.sum() == 30 * (60 - 10 * (region.label + 1))
        assert (region.box.y1, region.box.y2) == (10, 40)


def test_eighty_templates_are_the_mean_of_their_features(data_set: Path, model: AlphaClip) -> None:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    benchmark = ImageNetS(str(data_set), templates="80", names="openai", focus=["alpha"])
    assert benchmark.source.names == ["tench", "goldfish", "great white shark"]
    with torch.inference_mode():
        benchmark.prepare(model)
        prompts = [template("goldfish") for template in OPENAI_IMAGENET_TEMPLATES]
        each = model.encode_text(model.tokenizer(prompts), normalize=True)
    expected = each.mean(0) / each.mean(0).norm()
    torch.testing.assert_close(benchmark._text[1], expected)


def test_names_are_wordnets_first_words() -> None:
    found = class_names(["n01484850", "n02012849", "n03126707"], "wordnet")
    assert found == ["great_white_shark", "crane", "crane"]  # as the published script has them
    with pytest.raises(ValueError, match=r"\['n00000000'\] are no classes of ImageNet-1k"):
        class_names(["n00000000"], "wordnet")


def test_damaged_entries_are_counted(
    data_set: Path, published: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    published[0]["image_pth"] = "../secret.JPEG"
    published[1]["mask"]["counts"] = "5"
    published[2]["mask"] = 7
    published[3]["mask"]["size"] = [40, 40]
    file = write(published, data_set.parent)
    source = ImageNetS(str(data_set.parent), file).source
    drops = Drops()
    (part,) = source.parts()
    pictures = list(source.pictures(part, drops))
    assert drops.counts() == {"missing_image": 1, "bad_rle": 2, "size_mismatch": 1}
    assert sum(len(p.regions) for p in pictures) == 2
    assert "'../secret.JPEG' is no file inside" in caplog.text


def test_a_mask_without_its_class_is_counted(data_set: Path) -> None:
    file = data_set / "validation-segmentation" / SYNSETS[0] / "val_0.png"
    Image.new("RGB", (71, 50)).save(file)
    (data_set / "validation" / SYNSETS[1] / "val_1.JPEG").unlink()
    (data_set / "validation-segmentation" / SYNSETS[2] / "val_1.png").write_bytes(b"no picture")
    source = ImageNetS(str(data_set)).source
    drops = Drops()
    (part,) = source.parts()
    assert len(list(source.pictures(part, drops))) == 3
    assert drops.counts() == {"bad_area": 1, "missing_image": 1, "corrupt_image": 1}


@pytest.mark.parametrize("record", [{}, [{}], [5], [{"image_pth": "a", "mask": {}}]])
def test_files_of_another_format_are_refused(tmp_path: Path, record: object) -> None:
    with pytest.raises(ValueError, match="something else than the published imagenet_919"):
        ImageNetS(str(tmp_path), write(record, tmp_path))


def test_folders_of_another_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no validation-segmentation"):
        ImageNetS(str(tmp_path))
