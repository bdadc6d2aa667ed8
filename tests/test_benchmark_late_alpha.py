import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import alpha_clip
from alpha_clip import AlphaEntry
from benchmarks.focus.job import given_or_drawn
from benchmarks.late_alpha.cost import cost_of_entry, cost_of_way
from benchmarks.late_alpha.methods import AS_IT_IS, UNTRAINED_IN_ALPHA, blocks_of, entries
from benchmarks.late_alpha.speed import late_alpha_speed
from benchmarks.late_alpha.table import report

TINY = f"local-dir:{Path(__file__).parents[1] / 'configs/models/tiny'}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tower of four blocks that was never pointed anywhere."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("late") / "base"
    return str(alpha_clip.save_checkpoint(alpha_clip.create_model(TINY)[0], folder))


def test_every_place_is_trained_under_a_name_of_its_own() -> None:
    places = entries([0, 1, 5], [5])
    assert [place.name for place in places] == [
        "first layer",
        "block 0",
        "block 1",
        "block 5",
        "block 5, once",
        "block 5, repeat alone",
        "block 5, summary alone",
    ]
    slugs = {place.method.slug for place in places} | {UNTRAINED_IN_ALPHA.slug}
    assert len(slugs) == len(places) + 1
    given = [json.loads(str(p.method.options["model.encoder.alpha_block"])) for p in places]  # type: ignore[index]
    assert [AlphaEntry(**one) for one in given] == [place.at for place in places]
    assert places[0].at.is_first_layer


def test_the_towers_blocks_are_asked_for(base: str) -> None:
    assert blocks_of(base, None) == [0, 1, 2, 3]
    assert blocks_of(base, [3, 1]) == [3, 1]
    with pytest.raises(ValueError, match=r"has the blocks 0\.\.3, not \[4\]"):
        blocks_of(base, [0, 4])


def test_costs_fall_with_every_block(base: str) -> None:
    paper = cost_of_entry(base, AlphaEntry.of(0), 32)
    costs = [cost_of_entry(base, AlphaEntry(block), 32) / paper for block in range(4)]
    assert 1 < costs[0] < 1.1  # what helps is cheap
    assert costs == sorted(costs, reverse=True)
    # Three blocks for one region of 32, and of the last what its class token needs: the keys and
    # values of all, two of the twelve matrices of a block.
    assert costs[3] < 0.16
    assert cost_of_entry(base, AlphaEntry(3), 1) > 6 * cost_of_entry(base, AlphaEntry(3), 32)
    whole, masked, pooled = (cost_of_way(base, m.way, 32) / paper for m in AS_IT_IS)
    assert whole == pytest.approx(1 / 32, rel=0.3)
    assert pooled == pytest.approx(1 / 32, rel=0.6)
    assert masked > 1


def _scores(folder: Path, top1: float) -> None:
    ways = ["no alpha", "alpha", "attention mask", "mask pooling"]
    regions = {way: top1 for way in ways} | {f"held out/{way}": top1 / 2 for way in ways}
    retrieval = {"image to text R@1": 0.2, "text to image R@1": 0.3}
    folder.mkdir(parents=True)
    for name, scores in (("regions", regions), ("retrieval", retrieval)):
        (folder / f"{name}.json").write_text(json.dumps({"scores": scores}))


def test_the_table_has_accuracy_and_cost(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = entries([1, 3], [3])
    _scores(tmp_path / "runs" / "base", 0.1)
    for number, method in enumerate([*(p.method for p in places), UNTRAINED_IN_ALPHA]):
        for seed, shift in enumerate([0.0, 0.2]):
            _scores(tmp_path / "runs" / method.slug / str(seed), 0.1 * number + shift)
    report(tmp_path, places, [0, 1], base, 32)
    rows = {
        row["method"]: row
        for row in csv.DictReader((tmp_path / "late_alpha.csv").read_text().splitlines())
    }
    assert set(rows) == {
        *(place.name for place in places),
        *(f"tuned without alpha, {m.way}" for m in AS_IT_IS),
        *(m.name for m in AS_IT_IS),
    }
    assert float(rows["first layer"]["cost of a region"]) == 1
    assert float(rows["block 3"]["cost of a region"]) < 0.2
    assert float(rows["block 3"]["region top-1"]) == pytest.approx(0.3)
    assert float(rows["block 3"]["region top-1 sd"]) == pytest.approx(0.2 / 2**0.5)
    assert float(rows["tuned without alpha, mask pooling"]["region top-1"]) == pytest.approx(0.7)
    assert "| block 1 | 0." in capsys.readouterr().out
    assert (tmp_path / "late_alpha.png").stat().st_size > 10_000


def test_what_is_given_is_not_drawn(tmp_path: Path) -> None:
    material, start = given_or_drawn(tmp_path, ["a"], ["b"], "c", [])
    assert (material.train, material.test, material.names, start) == (["a"], ["b"], None, "c")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="together, or none of them"):
        given_or_drawn(tmp_path, ["a"], None, None, [])


def test_speed_is_measured_after_the_numbers_were_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.late_alpha import speed

    more: dict[str, Any] = {"rounds": 2, "budget_s": 0.1, "output": tmp_path / "speed.csv"}
    rows = late_alpha_speed(TINY, [0, 3], regions=6, **more)
    assert [row.variant for row in rows] == ["block 0", "block 3"]
    assert "x the regions/s of block 0" in capsys.readouterr().out
    assert (tmp_path / "speed.png").exists()
    monkeypatch.setattr(speed, "_TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="sharing changes the features"):
        late_alpha_speed(TINY, [3], regions=6, **more)
