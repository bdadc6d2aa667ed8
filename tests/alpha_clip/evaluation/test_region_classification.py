import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from alpha_clip.drops import Drops
from alpha_clip.evaluation.region_classification import (
    SHUFFLED,
    WRONG_OBJECT,
    RegionClassification,
    RegionViews,
)
from alpha_clip.model import AlphaClip
from alpha_clip.reader import find_shards, read_samples
from alpha_clip.regions import Box, RegionSample, decode_rle
from alpha_clip.transforms import RegionTransform

NAMES = ["red thing", "green thing", "blue thing", "purple thing"]


@pytest.fixture
def names_file(tmp_path: Path) -> str:
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"names": NAMES, "held_out": ["green thing"]}))
    return str(file)


def samples_of(folder: Path) -> list[RegionSample]:
    return [s for shard in find_shards([str(folder)]) for s in read_samples(shard, Drops())]


@torch.no_grad()
def by_hand(
    model: AlphaClip, folder: Path, names: list[str], template: str, way: str
) -> list[tuple[str, bool]]:
    """Each region's name and whether it was found, one region at a time."""
    tokenizer = model.tokenizer
    text = [model.encode_text(tokenizer([template.format(n)]), normalize=True)[0] for n in names]
    transform = RegionTransform(model.image_size, model.normalisation, "squash")
    found = []
    for sample in samples_of(folder):
        image = Image.open(io.BytesIO(sample.jpeg)).convert("RGB")
        for i, region in enumerate(sample.regions):
            if region.text not in names:
                continue
            other = sample.regions[1 - i]  # every picture of this set has two regions
            x1, y1, x2, y2 = (int(v) for v in region.box)
            rgba = {
                "no alpha": lambda image=image: transform(image),
                "alpha": lambda image=image, r=region: transform(image, decode_rle(r.rle)),
                "box alpha": lambda image=image, r=region: transform(image, Box(*r.box)),
                "crop": lambda image=image, b=(x1, y1, x2, y2): transform(image.crop(b)),
                WRONG_OBJECT: lambda image=image, r=other: transform(image, decode_rle(r.rle)),
            }[way]()
            features = model.encode_image(rgba[None], normalize=True)[0]
            scores = [float(features @ t) for t in text]
            found.append((region.text, names[scores.index(max(scores))] == region.text))
    return found


@pytest.mark.parametrize("batch_size", [2, 64])
def test_scores_equal_a_count_by_hand(
    model: AlphaClip, two_shards: Path, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "a photo of a {}."
    benchmark = RegionClassification([str(two_shards)], template=template, batch_size=batch_size)
    with torch.inference_mode():
        scores = benchmark.run(model)
    assert scores["regions"] == 12
    names = sorted(NAMES[:3])
    for way in ("no alpha", "alpha", "box alpha", "crop", WRONG_OBJECT):
        found = by_hand(model, two_shards, names, template, way)
        assert scores[way] == pytest.approx(sum(ok for _, ok in found) / len(found)), way
    assert set(scores) == {
        "regions", "no alpha", "alpha", SHUFFLED, WRONG_OBJECT, "box alpha", "crop", "masked crop",
        "red circle",
    }  # fmt: skip


def test_held_out_names_are_scored_apart(
    model: AlphaClip, two_shards: Path, names_file: str
) -> None:
    benchmark = RegionClassification([str(two_shards)], names_file, focus=["alpha"])
    with torch.inference_mode():
        scores = benchmark.run(model)
    found = by_hand(model, two_shards, NAMES, "{}", "alpha")
    for group, held_out in (("", False), ("held out/", True)):
        inside = [ok for name, ok in found if (name == "green thing") == held_out]
        assert scores[f"{group}regions"] == len(inside)
        assert scores[f"{group}alpha"] == pytest.approx(sum(inside) / len(inside))


class Oracle:
    """Answers with the colour under alpha: what a perfect model would."""

    normalisation: Any
    logit_scale = torch.zeros(())

    def __init__(self, model: AlphaClip) -> None:
        self.normalisation, self.transform = model.normalisation, model.transform
        self.tokenizer = model.tokenizer

    def encode_image(self, rgba: torch.Tensor, normalize: bool) -> torch.Tensor:
        pictures = torch.stack([self.normalisation.inverse(p) for p in rgba])
        rgb, alpha = pictures[:, :3], pictures[:, 3:] > 0.9
        return ((rgb - rgb.mean(1, keepdim=True)) * alpha).sum((2, 3))

    def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
        return torch.eye(3)[torch.tensor([2, 1, 0])][: len(tokens)]  # blue, green, red


def test_a_model_that_looks_where_alpha_says_is_right(model: AlphaClip, two_shards: Path) -> None:
    oracle: Any = Oracle(model)
    scores = RegionClassification([str(two_shards)]).run(oracle)
    for way in ("alpha", "box alpha", "crop", "masked crop"):
        assert scores[way] == 1, way
    assert scores[WRONG_OBJECT] == 0
    assert scores["no alpha"] <= 0.5  # two objects a picture, one answer


def test_controls_swap_alphas_between_and_within_images(
    make_sample: Callable[..., RegionSample],
) -> None:
    """Picture 0 has regions 0..2, picture 1 has region 3; all have masks of their own."""
    samples = [make_sample("0", ("red", "green", "blue")), make_sample("1", ("red",))]
    views = RegionViews(samples, set(NAMES), RegionTransform(32, geometry="squash"))
    assert views.texts == ["red thing", "green thing", "blue thing", "red thing"]
    rgba = dict(views.all(["crop", "alpha"]))
    assert list(rgba) == ["crop", "alpha", SHUFFLED, WRONG_OBJECT]
    own = rgba["alpha"]
    for control, sources in ((SHUFFLED, [{3}, {3}, {3}, {0, 1, 2}]), (WRONG_OBJECT, None)):
        assert torch.equal(rgba[control][:, :3], own[:, :3])
        sources = sources or [{1, 2}, {0, 2}, {0, 1}, {3}]  # alone in its picture: its own
        for alpha, allowed in zip(rgba[control][:, 3], sources, strict=True):
            assert {i for i in range(4) if torch.equal(alpha, own[i, 3])} <= allowed
            assert any(torch.equal(alpha, own[i, 3]) for i in allowed)


def test_max_images_reads_no_more(model: AlphaClip, two_shards: Path) -> None:
    benchmark = RegionClassification([str(two_shards)], focus=["no alpha"], max_images=2)
    with torch.inference_mode():
        assert benchmark.run(model)["regions"] == 4


def test_a_single_region_has_no_other_to_swap_with(
    tmp_path: Path,
    model: AlphaClip,
    make_sample: Callable[..., RegionSample],
    write_shards: Callable[..., Any],
) -> None:
    write_shards(tmp_path / "one", [make_sample("0", ("red",))])
    benchmark = RegionClassification([str(tmp_path / "one")], focus=["alpha"])
    with torch.inference_mode():
        assert benchmark.run(model)["regions"] == 1


def test_an_unknown_way_is_refused(two_shards: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown focus \['stare'\]; expected some of .*'crop'"):
        RegionClassification([str(two_shards)], focus=["alpha", "stare"])


def test_missing_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished shards"):
        RegionClassification([str(tmp_path)])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"names": ["a"]}', '{"names": 5, "held_out": []}', "null"]
)
def test_a_damaged_names_file_is_refused(two_shards: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "names.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"names\.json is no names file: expected"):
        RegionClassification([str(two_shards)], str(file))
    with pytest.raises(ValueError, match="is no names file"):
        RegionClassification([str(two_shards)], str(tmp_path / "missing.json"))


def test_names_of_another_source_are_refused(
    model: AlphaClip, two_shards: Path, tmp_path: Path
) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"names": ["a zebra"], "held_out": []}))
    benchmark = RegionClassification([str(two_shards)], str(file))
    with pytest.raises(ValueError, match="no region of the data has one of the names"):
        benchmark.run(model)
