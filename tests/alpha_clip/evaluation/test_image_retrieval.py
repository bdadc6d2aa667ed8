from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alpha_clip.evaluation import retrieval
from alpha_clip.evaluation.image_retrieval import ImageRetrieval
from alpha_clip.model import AlphaClip
from alpha_clip.regions import RegionSample, decode_jpeg

PAIRS = [("red", "blue"), ("green", "red"), ("blue", "green"), ("blue",), ("red",), ("green",)]


@pytest.fixture(scope="module")
def samples(make_sample: Callable[..., RegionSample]) -> list[RegionSample]:
    """Twelve pictures with six captions; two more that have none."""
    told = [make_sample(str(i), PAIRS[i % 6], width=40 + i) for i in range(12)]
    silent = [
        replace(make_sample(str(90 + i)), caption=caption, regions=make_sample("0").regions)
        for i, caption in enumerate(("", "  "))
    ]
    bare = [replace(s, regions=tuple(replace(r, span=None) for r in s.regions)) for s in silent]
    return [bare[0], *told, bare[1]]


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory,
    samples: list[RegionSample],
    write_shards: Callable[..., Any],
) -> str:
    folder = tmp_path_factory.mktemp("captions")
    write_shards(folder, samples[:5], samples[5:])
    return str(folder)


@torch.no_grad()
def by_hand(model: AlphaClip, samples: list[RegionSample]) -> dict[str, float]:
    """Sort everything, and look who is among the first."""
    told = [s for s in samples if s.caption.strip()]
    transform = model.transform.replace(geometry="squash")
    rgb = torch.stack([transform(decode_jpeg(s.jpeg))[:3] for s in told])
    images = model.encode_image(rgb, normalize=True)  # no alpha: the whole image
    captions = sorted({s.caption for s in told})
    texts = model.encode_text(model.tokenizer(captions), normalize=True)
    similarities = (images @ texts.T).tolist()
    scores = {"images": len(told), "texts": len(captions)}
    for k in (1, 5):
        found = []
        for sample, row in zip(told, similarities, strict=True):
            ranking = sorted(zip(row, captions, strict=True), reverse=True)
            found.append(sample.caption in [caption for _, caption in ranking[:k]])
        scores[f"image to text R@{k}"] = sum(found) / len(found)
        found = []
        for place, caption in enumerate(captions):
            ranking = sorted(((row[place], i) for i, row in enumerate(similarities)), reverse=True)
            found.append(caption in [told[i].caption for _, i in ranking[:k]])
        scores[f"text to image R@{k}"] = sum(found) / len(found)
    return scores


@pytest.mark.parametrize(("batch_size", "limit"), [(64, 1 << 12), (3, 4)])
def test_recalls_equal_a_count_by_hand(
    model: AlphaClip,
    shards: str,
    samples: list[RegionSample],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    limit: int,
) -> None:
    monkeypatch.setattr(retrieval, "_ROWS", limit)
    with torch.inference_mode():
        scores = ImageRetrieval([shards], batch_size=batch_size).run(model)
    expected = by_hand(model, samples)
    assert scores == pytest.approx(expected)
    assert (expected["images"], expected["texts"]) == (12, 6)
    assert 0 < expected["image to text R@5"] < 1  # else little is compared


class Stub:
    """Embeds what it is told to: images in turn, captions by their number."""

    logit_scale = torch.zeros(())

    def __init__(
        self, model: AlphaClip, images: torch.Tensor, texts: torch.Tensor, captions: list[str]
    ) -> None:
        self.transform, self.tokenizer = model.transform, model.tokenizer
        self.images, self.texts = images, texts
        self.captions = self.tokenizer(captions).tolist()

    def encode_image(self, rgba: torch.Tensor, normalize: bool) -> torch.Tensor:
        assert (rgba[:, 3] - self.transform.normalisation.whole_image).abs().max() < 1e-5
        shown, self.images = self.images.split([len(rgba), len(self.images) - len(rgba)])
        return shown

    def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
        return self.texts[[self.captions.index(row) for row in tokens.tolist()]]


@pytest.fixture
def recalls(
    model: AlphaClip, shards: str, samples: list[RegionSample]
) -> Callable[[torch.Tensor, torch.Tensor], list[float]]:
    """Return what gives the recalls of a model that embeds twelve images and six captions so."""

    def run(images: torch.Tensor, texts: torch.Tensor) -> list[float]:
        captions = list(dict.fromkeys(s.caption for s in samples if s.caption.strip()))
        stub: Any = Stub(model, images, texts, captions)
        scores = ImageRetrieval([shards]).run(stub)
        return [
            scores[f"{way} R@{k}"] for way in ("image to text", "text to image") for k in (1, 5)
        ]

    return run


def test_every_image_with_an_equal_caption_is_right(recalls: Callable[..., list[float]]) -> None:
    texts = torch.eye(6)
    assert recalls(texts.repeat(2, 1), texts) == [1, 1, 1, 1]
    # The second image of each caption looks like the next one's: each caption still finds one.
    images = torch.cat([2 * texts, texts.roll(-1, 0)])
    assert recalls(images, texts)[0] == 0.5
    assert recalls(images, texts)[2] == 1


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_model_that_tells_nothing_apart_finds_nothing(
    recalls: Callable[..., list[float]], value: float
) -> None:
    found = recalls(torch.full((12, 4), value), torch.full((6, 4), value))
    assert found == [0, 0, 0, 0]


def test_max_images_and_geometry_are_used(model: AlphaClip, shards: str) -> None:
    with torch.inference_mode():
        scores = ImageRetrieval([shards], max_images=5).run(model)
        padded = ImageRetrieval([shards], geometry="pad").run(model)
    assert (scores["images"], scores["texts"]) == (4, 4)  # the first has no caption
    assert padded != ImageRetrieval([shards]).run(model)


def test_captions_are_needed(model: AlphaClip, shards: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="different texts, got 1 images with 1"):
        ImageRetrieval([shards], max_images=2).run(model)
    with pytest.raises(ValueError, match="got 0 images with 0"):
        ImageRetrieval([shards], max_images=1).run(model)
    with pytest.raises(ValueError, match="no finished shards"):
        ImageRetrieval([str(tmp_path)])
