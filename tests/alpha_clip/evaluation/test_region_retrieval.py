from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alpha_clip.evaluation import retrieval
from alpha_clip.evaluation.columns import PICTURE
from alpha_clip.evaluation.region_retrieval import RegionRetrieval
from alpha_clip.evaluation.runner import run_benchmark
from alpha_clip.model import AlphaClip
from alpha_clip.regions import RegionSample, decode_jpeg, decode_rle

NAMES = [("red", "blue"), ("green", "red"), ("blue", "green"), ("green", "blue")]


@pytest.fixture(scope="module")
def samples(make_sample: Callable[..., RegionSample]) -> list[RegionSample]:
    """Nine pictures with two regions each; a third of the phrases have a number of their own."""
    made = [make_sample(str(i), NAMES[i % 4], width=40 + i) for i in range(9)]
    for i in (1, 4, 7):
        first, second = made[i].regions
        made[i] = replace(made[i], regions=(replace(first, text=f"box {i}", span=None), second))
    return made


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory,
    samples: list[RegionSample],
    write_shards: Callable[..., Any],
) -> str:
    folder = tmp_path_factory.mktemp("regions")
    write_shards(folder, samples[:4], samples[4:])
    return str(folder)


@torch.no_grad()
def by_hand(model: AlphaClip, samples: list[RegionSample], alpha: bool) -> dict[str, float]:
    transform = model.transform.replace(geometry="squash")
    told = [(s, r) for s in samples for r in s.regions]
    rgba = [transform(decode_jpeg(s.jpeg), decode_rle(r.rle) if alpha else None) for s, r in told]
    regions = model.encode_image(torch.stack(rgba), normalize=True)
    phrases = sorted({r.text for _, r in told})
    texts = model.encode_text(
        model.tokenizer([f"a {phrase}" for phrase in phrases]), normalize=True
    )
    similarity = regions @ texts.T
    scores = {}
    for k in (1, 5):
        hits = [
            r.text in [phrases[i] for i in row.topk(k).indices.tolist()]
            for (_, r), row in zip(told, similarity, strict=True)
        ]
        scores[f"region to text R@{k}"] = np.mean(hits)
        hits = [
            phrase in [told[i][1].text for i in column.topk(k).indices.tolist()]
            for phrase, column in zip(phrases, similarity.T, strict=True)
        ]
        scores[f"text to region R@{k}"] = np.mean(hits)
    return scores


@pytest.mark.parametrize(("batch_size", "limit"), [(64, 1 << 12), (2, 5)])
def test_recalls_equal_a_sorting_by_hand(
    model: AlphaClip,
    shards: str,
    samples: list[RegionSample],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    limit: int,
) -> None:
    monkeypatch.setattr(retrieval, "_ROWS", limit)
    benchmark = RegionRetrieval([shards], ("alpha",), "a {}", batch_size=batch_size)
    with torch.inference_mode():
        scores = benchmark.run(model)
    expected = by_hand(model, samples, alpha=True)
    assert scores == pytest.approx({"regions": 18, "texts": 6, **expected})
    assert 0 < expected["region to text R@1"] < 1


def test_ways_without_alpha_are_compared_in_one_run(
    model: AlphaClip, shards: str, samples: list[RegionSample], tmp_path: Path
) -> None:
    benchmark = RegionRetrieval([shards], ("alpha", "no alpha"), "a {}")
    with torch.inference_mode():
        columns, dropped = run_benchmark(benchmark, lambda _: model, tmp_path, ["cpu"])
        # With alpha zero, what is pointed at makes no difference to the tower: features are equal
        # for regions of one picture, and ties are not found.
        blind = by_hand(model, samples, alpha=False)
    assert dropped == []
    assert isinstance(columns["features/alpha"], np.memmap)
    assert isinstance(columns["text features"], np.memmap)
    found = {name: outcome.mean() for name, outcome in benchmark.outcomes(columns).items()}
    for name, value in by_hand(model, samples, alpha=True).items():
        assert found[f"{name}/alpha"] == pytest.approx(value)
    assert found["region to text R@1/no alpha"] == pytest.approx(blind["region to text R@1"])
    pictures = columns[PICTURE]
    assert pictures.tolist() == [i for i in range(9) for _ in range(2)]


def test_bad_settings_stop_before_work(shards: str) -> None:
    for focus in ((), ("alhpa",)):
        with pytest.raises(ValueError, match="expected focus to be some of"):
            RegionRetrieval([shards], focus)


def test_memory_does_not_grow_with_the_data(
    model: AlphaClip, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100,000 regions with features of 512 numbers are 200 MB on disk; they are never held."""
    benchmark = RegionRetrieval([shards], ("alpha",))
    count, dim = 100_000, 512
    features = np.memmap(tmp_path / "features", np.float32, "w+", shape=(count, dim))
    rng = np.random.default_rng(0)
    for start in range(0, count, 10_000):
        features[start : start + 10_000] = rng.standard_normal((10_000, dim), np.float32)
    columns = {
        PICTURE: np.arange(count),
        "text": np.arange(count) % 50,
        "texts": np.arange(50),
        "text features": np.array(features[:50]),
        "features/alpha": features,
    }
    held: list[int] = []
    blocks = retrieval._Side.blocks

    def watched(self: Any, size: int) -> Any:
        for block in blocks(self, size):
            held.append(block[0].numel())
            yield block

    monkeypatch.setattr(retrieval._Side, "blocks", watched)
    found = benchmark.outcomes(columns)
    assert found["text to region R@1"].mean() > 0.9  # a text finds the region that it equals
    assert max(held) <= 4096 * dim
