import io
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from alpha_clip import create_model
from alpha_clip.drops import Drops
from alpha_clip.evaluation.focus_baselines import FOCUS
from alpha_clip.evaluation.labelled import LabelledPicture, ShardRegions
from alpha_clip.evaluation.region_classification import RegionClassification
from alpha_clip.evaluation.region_views import (
    ALPHA_ONLY,
    INVERTED,
    SHUFFLED,
    WRONG_OBJECT,
    RegionViews,
)
from alpha_clip.model import AlphaClip
from alpha_clip.reader import find_shards, read_samples
from alpha_clip.regions import Box, RegionSample, decode_jpeg, decode_rle
from alpha_clip.transforms import Normalisation, RegionTransform

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
                INVERTED: lambda image=image, r=region: transform(image, ~decode_rle(r.rle)),
                ALPHA_ONLY: lambda image=image, r=region: torch.cat(
                    [torch.zeros(3, *[transform.size] * 2), transform(image, decode_rle(r.rle))[3:]]
                ),
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
    for way in ("no alpha", "alpha", "box alpha", "crop", WRONG_OBJECT, INVERTED, ALPHA_ONLY):
        found = by_hand(model, two_shards, names, template, way)
        assert scores[way] == pytest.approx(sum(ok for _, ok in found) / len(found)), way
    ways = {*FOCUS, SHUFFLED, WRONG_OBJECT, INVERTED, ALPHA_ONLY}
    kinds = ("", "top-5/", "mean per class/", "mean per class top-5/")
    assert set(scores) == {kind + way for kind in kinds for way in ways} | {
        "regions", "classes", "within image/chance", "within image/no alpha", "within image/alpha",
        "within image cosine/no alpha", "within image cosine/alpha",
    }  # fmt: skip
    found = by_hand(model, two_shards, names, template, "alpha")
    each = [[ok for name, ok in found if name == n] for n in names]
    assert scores["mean per class/alpha"] == pytest.approx(sum(sum(e) / len(e) for e in each) / 3)
    assert scores["top-5/alpha"] == scores["mean per class top-5/alpha"] == 1  # of three names


@torch.no_grad()
def test_within_an_image_by_hand(model: AlphaClip, two_shards: Path) -> None:
    scores = RegionClassification([str(two_shards)]).run(model)
    transform = model.transform.replace(geometry="squash")
    right, cosines = defaultdict(list), defaultdict(list)
    for sample in samples_of(two_shards):
        image = Image.open(io.BytesIO(sample.jpeg)).convert("RGB")
        phrases = [region.text for region in sample.regions]
        text = model.encode_text(model.tokenizer(phrases), normalize=True)
        masks = [decode_rle(region.rle) for region in sample.regions]
        for way, views in (
            ("alpha", [transform(image, mask) for mask in masks]),
            ("no alpha", [transform(image) for _ in masks]),
        ):
            features = model.encode_image(torch.stack(views), normalize=True)
            right[way] += [int((text @ f).argmax()) == i for i, f in enumerate(features)]
            cosines[way].append(float(features[0] @ features[1]))
    for way in ("alpha", "no alpha"):
        assert scores[f"within image/{way}"] == pytest.approx(sum(right[way]) / 12)
        expected = sum(cosines[way]) / 6
        assert scores[f"within image cosine/{way}"] == pytest.approx(expected, abs=1e-6)
    assert scores["within image/chance"] == 0.5
    assert scores["within image cosine/no alpha"] == pytest.approx(1)
    assert scores["within image cosine/alpha"] < 0.9999


def test_both_shares_of_right_regions_are_the_metric_of_training(
    model: AlphaClip, two_shards: Path
) -> None:
    """All phrases of the data as candidates: then `alpha` is what validation calls region top-1."""
    from alpha_clip.region_matching import RegionMatching

    pictures = [(s, decode_jpeg(s.jpeg)) for s in samples_of(two_shards)]
    metric = RegionMatching()
    with torch.inference_mode():
        scores = RegionClassification([str(two_shards)], focus=["alpha"]).run(model)
        transform = model.transform.replace(geometry="squash")
        for number, (sample, image) in enumerate(pictures):
            rgb, alphas = transform.many(image, [r.rle for r in sample.regions])
            phrases = [r.text for r in sample.regions]
            metric.update(
                model.encode_regions(rgb[None], alphas[None], normalize=True)[0],
                model.encode_text(model.tokenizer(phrases), normalize=True),
                torch.tensor([NAMES.index(p) for p in phrases]),
                torch.full((len(phrases),), number),
            )
    figures = metric.compute()
    assert scores["alpha"] == pytest.approx(float(figures["region_top1"]))
    assert scores["within image/alpha"] == pytest.approx(float(figures["within_image_top1"]))
    cosine = float(figures["within_image_cosine"])
    assert scores["within image cosine/alpha"] == pytest.approx(cosine, abs=1e-5)


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
    visual = torch.nn.Identity()

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
    ways = ["no alpha", "alpha", "box alpha", "crop", "masked crop"]
    scores = RegionClassification([str(two_shards)], focus=ways).run(oracle)
    for way in ways[1:]:
        assert scores[way] == 1, way
    assert scores[WRONG_OBJECT] == scores[INVERTED] == 0
    assert scores[ALPHA_ONLY] == pytest.approx(1 / 3)  # no colour to see: it always says blue
    assert scores["no alpha"] <= 0.5  # two objects a picture, one answer
    assert (scores["within image/alpha"], scores["within image/chance"]) == (1, 0.5)


def test_a_way_that_the_tower_does_not_allow_is_refused_if_asked_for(
    model: AlphaClip, two_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.visual, "pool_type", "avg")
    every = RegionClassification([str(two_shards)], max_images=2).run(model)
    assert "blur" in every
    assert "attention mask" not in every
    benchmark = RegionClassification([str(two_shards)], focus=["attention mask"])
    with pytest.raises(ValueError, match="VisionTransformer pools in another way"):
        benchmark.run(model)


@pytest.fixture
def make_pictures(
    make_sample: Callable[..., RegionSample], write_shards: Callable[..., Any], tmp_path: Path
) -> Callable[..., list[LabelledPicture]]:
    """Return pictures of coloured rectangles, one for each list of colours."""

    def make(*colours: tuple[str, ...]) -> list[LabelledPicture]:
        write_shards(tmp_path / "few", [make_sample(str(i), c) for i, c in enumerate(colours)])
        source = ShardRegions(find_shards([str(tmp_path / "few")]), NAMES, None)
        (part,) = source.parts()
        return list(source.pictures(part, Drops()))

    return make


def test_controls_swap_alphas_between_and_within_images(
    make_pictures: Callable[..., list[LabelledPicture]],
) -> None:
    """Picture 0 has regions 0..2, picture 1 has region 3; all have masks of their own."""
    pictures = make_pictures(("red", "green", "blue"), ("red",))
    views = RegionViews(pictures, RegionTransform(32, geometry="squash"))
    assert [NAMES[i] for i in views.labels] == [
        *("red thing", "green thing", "blue thing", "red thing")
    ]
    rgba = {name: seen[view] for name, seen, view in views.all(["crop", "alpha"])}
    assert list(rgba) == ["crop", "alpha", SHUFFLED, WRONG_OBJECT, INVERTED, ALPHA_ONLY]
    own = rgba["alpha"]
    for control, sources in ((SHUFFLED, [{3}, {3}, {3}, {0, 1, 2}]), (WRONG_OBJECT, None)):
        assert torch.equal(rgba[control][:, :3], own[:, :3])
        sources = sources or [{1, 2}, {0, 2}, {0, 1}, {3}]  # alone in its picture: its own
        for alpha, allowed in zip(rgba[control][:, 3], sources, strict=True):
            assert {i for i in range(4) if torch.equal(alpha, own[i, 3])} <= allowed
            assert any(torch.equal(alpha, own[i, 3]) for i in allowed)


@pytest.mark.parametrize("normalisation", [Normalisation(), Normalisation(alpha_mean=0.3)])
def test_controls_turn_alpha_round_and_leave_it_alone(
    make_pictures: Callable[..., list[LabelledPicture]], normalisation: Normalisation
) -> None:
    transform = RegionTransform(32, normalisation, geometry="squash")
    views = RegionViews(make_pictures(("red", "blue")), transform)
    rgba = {name: seen[view] for name, seen, view in views.all(["alpha"])}
    own, inverted, alone = (
        torch.stack([normalisation.inverse(view) for view in rgba[name]])
        for name in ("alpha", INVERTED, ALPHA_ONLY)
    )
    torch.testing.assert_close(inverted[:, 3], 1 - own[:, 3], rtol=0, atol=1e-6)
    assert torch.equal(rgba[INVERTED][:, :3], rgba["alpha"][:, :3])
    assert torch.equal(rgba[ALPHA_ONLY][:, 3], rgba["alpha"][:, 3])
    mean = torch.tensor(normalisation.mean).view(3, 1, 1).expand(2, 3, 32, 32)
    torch.testing.assert_close(alone[:, :3], mean, rtol=0, atol=1e-6)


def test_a_picture_that_looks_the_same_for_all_its_regions_is_passed_once(
    make_pictures: Callable[..., list[LabelledPicture]],
) -> None:
    pictures = make_pictures(("red", "green", "blue"), ("red",))
    views = RegionViews(pictures, RegionTransform(32, geometry="squash"))
    ((_, rgba, view),) = views.all(["no alpha"])
    assert (len(rgba), view.tolist()) == (2, [0, 0, 0, 1])
    cut = RegionViews(pictures, RegionTransform(32, geometry="crop_box"))
    ((_, rgba, view),) = cut.all(["no alpha"])
    assert (len(rgba), view.tolist()) == (4, [0, 1, 2, 3])
    assert len({float(v[:3].mean()) for v in rgba}) == 4  # a window for each
    assert (rgba[:, 3] == Normalisation().whole_image).all()
    ((_, gray, _),) = cut.all(["gray"])  # another picture, the same windows
    assert len({float(v[:3].mean()) for v in gray}) == 4
    assert (gray[:, 3] == Normalisation().whole_image).all()


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
        scores = benchmark.run(model)
    assert scores["regions"] == 1
    assert not [name for name in scores if name.startswith("within image")]


def test_a_picture_that_cannot_be_decoded_is_left_out(
    tmp_path: Path,
    model: AlphaClip,
    make_sample: Callable[..., RegionSample],
    write_shards: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sound = [make_sample(str(i), ("red", "blue")) for i in range(2)]
    cut = replace(make_sample("2", ("red", "blue")), jpeg=sound[0].jpeg[:-300])
    write_shards(tmp_path / "cut", [*sound, cut])
    benchmark = RegionClassification([str(tmp_path / "cut")], focus=["alpha"])
    with torch.inference_mode():
        assert benchmark.run(model)["regions"] == 4
    assert "corrupt_image" in caplog.text


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


def test_a_model_that_learns_is_evaluated_as_it_is(
    tiny_name: str, two_shards: Path, names_file: str
) -> None:
    learning = create_model(tiny_name)[0].eval()
    assert learning.visual.conv1.weight.requires_grad
    benchmark = RegionClassification([str(two_shards)], names=names_file, focus=["alpha"])
    assert "alpha" in benchmark.run(learning)
