"""A random model on the photographs: every benchmark that their annotations allow, at chance.

COCO's objects, referring expressions and whole pictures have theirs beside their own tests.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alpha_clip.drops import Drops
from alpha_clip.evaluation.base import Benchmark
from alpha_clip.evaluation.blind_pairs import BlindPairs
from alpha_clip.evaluation.columns import join
from alpha_clip.evaluation.expressions import read_expressions
from alpha_clip.evaluation.image_retrieval import ImageRetrieval
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.evaluation.pseudo_labels import PseudoLabels
from alpha_clip.evaluation.region_classification import RegionClassification
from alpha_clip.evaluation.region_retrieval import RegionRetrieval
from alpha_clip.model import AlphaClip
from data_pipeline.__main__ import main as make_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The photographs with the boxes of their phrases, as region–text shards."""
    folder = tmp_path_factory.mktemp("shards") / "photographs"
    segmenter = "data_pipeline.segmenters.box.BoxSegmenter"
    source = ["--input", str(photos / "grit" / "*.tar"), "--segmenter", segmenter]
    assert make_data(["grit", *source, "--output", str(folder), "--workers", "1"]) == 0
    return str(folder)


@torch.inference_mode()
def score(benchmark: Benchmark, model: AlphaClip) -> tuple[Any, dict[str, Outcome]]:
    benchmark.prepare(model)
    parts = benchmark.parts()
    columns = join(benchmark.score(model, part, Drops(), lambda _: None) for part in parts)
    return columns, benchmark.outcomes(columns)


def expect(outcome: Outcome, chance: float) -> None:
    """Hits are as many as chance gives, within three standard deviations of a count."""
    expected = chance * len(outcome.values)
    assert abs(np.nansum(outcome.values) - expected) <= 3 * expected**0.5 + 1


def test_regions_and_their_phrases(shards: str, model: AlphaClip) -> None:
    columns, found = score(RegionRetrieval([shards], ("alpha",)), model)
    texts, regions = len(np.unique(columns["texts"])), len(columns["text"])
    assert (texts, regions) == (105, 216)
    for k in (1, 5):
        expect(found[f"region to text R@{k}"], k / texts)
        expect(found[f"text to region R@{k}"], k / texts)


def test_names_of_regions(shards: str, model: AlphaClip) -> None:
    benchmark = RegionClassification([shards], focus=["alpha", "no alpha", "crop"])
    columns, found = score(benchmark, model)
    label, names = columns["label"], len(benchmark.classes())
    for way in ("alpha", "no alpha", "crop", "alpha only"):
        answers, truths = (
            np.bincount(n, minlength=names) for n in (columns[f"predicted/{way}"], label)
        )
        expect(found[way], float(answers @ truths) / len(label) ** 2)
    pictures = found["within image/alpha"].pictures
    gain = columns["within image/alpha"] - columns["within image/chance"]
    low, high = Outcome(gain, pictures).interval(level=0.99)
    assert low <= 1e-6  # all regions of a picture may get one answer, which is one of n right
    assert high >= -1e-6


def test_pictures_and_their_captions(shards: str, model: AlphaClip) -> None:
    columns, found = score(ImageRetrieval([shards]), model)
    texts = len(np.unique(columns["texts"]))
    assert texts > 80
    for k in (1, 5):
        expect(found[f"image to text R@{k}"], k / texts)
        expect(found[f"text to image R@{k}"], k / texts)


def test_names_for_detectors(photographs: Any, model: AlphaClip) -> None:
    benchmark = PseudoLabels(
        str(photographs.instances), str(photographs.folder), min_score=0.0, geometry="squash"
    )
    columns, found = score(benchmark, model)
    truth = np.array([benchmark._truth(n) for n in columns["region"].tolist()])
    answers, truths = (np.bincount(n, minlength=80) for n in (columns["label"], truth))
    assert len(truth) == 802
    expect(found["right/all"], float(answers @ truths) / len(truth) ** 2)


def test_pairs_of_pictures_and_statements(
    photographs: Any, model: AlphaClip, tmp_path: Path
) -> None:
    folder = tmp_path / "MLLM_VLM Images" / "Object"
    folder.mkdir(parents=True)
    rows = [["Question ID", "Type", "Statement"]]
    for number, picture in enumerate(read_expressions(str(photographs.expressions)), 1):
        rows.append([str(number), "Object", picture.expressions[0].text])
        (folder / f"{number}.jpg").symlink_to(photographs.folder / picture.files[0])
    with (tmp_path / "Questions.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    columns, found = score(BlindPairs(str(tmp_path), template="{}"), model)
    assert len(columns["pattern"]) == 48
    for way in ("text to image", "image to text"):
        low, high = found[f"questions/{way}"].interval(level=0.99)
        assert low <= 0.5 <= high
        # A quarter if texts are told apart; a random tower hardly does, and takes one for both.
        assert found[f"pairs/{way}"].mean() <= 0.25 + 0.15
