"""The benchmark of growth: exponents of known series, its work, and a small run of its own."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import growth_work
from benchmarks.growth import Point, _Process, fit, fit_memory, growth, report
from benchmarks.growth_work import GROWTHS, draw, write_tar
from data_pipeline.filters import Filters
from data_pipeline.runner import process_shard
from data_pipeline.shard_maker import ShardTask

SIZES = [16, 32, 64, 128, 256, 512]
TINY = f"local-dir:{Path(__file__).parents[1] / 'configs/models/tiny'}"


def points(name: str, seconds: list[float], mib: list[float]) -> list[Point]:
    made = zip(SIZES, seconds, mib, strict=True)
    return [Point(name, "images", size, (0.9 * s, s, 1.1 * s), m) for size, s, m in made]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(power):
    assert fit(SIZES, [3 * n**power for n in SIZES]) == pytest.approx((power, power))


def test_more_than_linear_growth_is_told_from_linear():
    found = fit(SIZES, [n * math.log(n) for n in SIZES])
    assert 1.15 < found.upper < found.all < 1.35  # the slope of n log n is 1 + 1 / log n


@pytest.mark.parametrize("power", [1, 2])
def test_a_constant_hides_less_of_the_upper_half(power):
    found = fit(SIZES, [20 + 0.5 * n**power for n in SIZES])
    assert found.all < found.upper < power
    assert found.upper > 0.75 * power


def test_two_sizes_are_enough():
    assert fit([1, 4], [2.0, 8.0]) == pytest.approx((1, 1))


@pytest.mark.parametrize("mib", [[3, 4, 5, 6, 7, 7.9], [100, 101, 99, 104, 109, 106]])
def test_memory_that_rises_little_is_flat(mib):
    assert fit_memory(SIZES, mib) is None


def test_memory_that_rises_has_an_exponent():
    assert fit_memory(SIZES, [n / 2 for n in SIZES]) == pytest.approx((1, 1))
    assert fit_memory(SIZES, [100, 100, 100, 100, 100, 111]) is not None


def test_the_report_says_which_growth_is_above_the_limit(tmp_path, capsys):
    linear = points("fine", [n / 1000 for n in SIZES], [9.0] * 6)
    square = points("slow", [n**2 / 1000 for n in SIZES], [9.0] * 6)
    heavy = points("heavy", [n / 1000 for n in SIZES], [n**1.2 for n in SIZES])
    noisy = points("noisy", [n**1.1 / 1000 for n in SIZES], [9.0] * 6)
    noisy[-1] = replace(noisy[-1], seconds=(0.1, *noisy[-1].seconds[1:]))
    report([*linear, *square, *heavy, *noisy], tmp_path / "made" / "growth.csv")
    rows = {
        row["growth"]: row
        for row in csv.DictReader((tmp_path / "made/growth_exponents.csv").read_text().splitlines())
    }
    assert {name: row["above 1.05"] for name, row in rows.items()} == {
        "fine": "no",
        "slow": "yes",
        "heavy": "yes",
        "noisy": "unclear",
    }
    assert (rows["slow"]["time"], rows["slow"]["memory"]) == ("2.000", "flat")
    assert (rows["heavy"]["time"], rows["heavy"]["its upper half"]) == ("1.000", "1.200")
    assert len((tmp_path / "made/growth.csv").read_text().splitlines()) == 1 + 4 * len(SIZES)
    assert (tmp_path / "made/growth.png").stat().st_size > 10_000
    assert "2.000" in capsys.readouterr().out


def test_what_can_not_be_measured_is_refused(tmp_path):
    output = tmp_path / "growth.csv"
    with pytest.raises(ValueError, match=r"no growth is called 'eating'.*'making'.*'resuming'"):
        growth(["making", "eating"], output=output)
    with pytest.raises(ValueError, match=r"two sizes of verifying or more.*leaves \[1\]"):
        growth(["verifying"], largest=1e-4, output=output)
    with pytest.raises(ValueError, match="at least two rounds"):
        growth(["verifying"], rounds=1, output=output)
    assert not output.exists()


def test_pictures_and_their_regions_are_no_duplicates(tmp_path):
    write_tar(tmp_path / "in.tar", 40, boxes=8, phrases=1)
    filters = Filters(near_duplicate_bits=6, duplicate_mask_iou=0.9)
    task = ShardTask(str(tmp_path / "in.tar"), 0)
    manifest = process_shard(task, tmp_path / "out", replace(growth_work._MAKER, filters=filters))
    assert manifest.samples == 40
    assert manifest.regions + sum(manifest.rejects.values()) == 320
    assert manifest.regions > 300  # a few boxes are alike


@pytest.mark.parametrize("name", GROWTHS)
def test_work_does_what_it_says(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth_work, "_BATCHES", 2)
    draw(GROWTHS[name].axis, tmp_path / "2", 2)
    with torch.no_grad():
        done = GROWTHS[name].prepare(tmp_path / "2", 2, TINY)()
    few = growth_work._FEW
    expected = {
        "reading": lambda: done == 2,
        "reading_regions": lambda: done == 2 * few,
        "evaluating": lambda: done["regions"] == 2 * 4,
        "evaluating_regions": lambda: done["regions"] == 2 * few,
        "embedding": lambda: "8 embeddings" in capsys.readouterr().out,
        "encode_regions": lambda: done.shape == (1, 2, 128),
        "loading": lambda: min(done) > 0,
        "finding_to_embed": lambda: list(done.values()) == [1, 1],
        "verifying": lambda: (done.shards, done.problems) == (2, []),
        "resuming": lambda: (done.shards, done.seconds) == (2, {}),
    }
    assert expected.get(name, lambda: done is None)()


def test_a_failure_is_told_with_its_cause(tmp_path):
    process = _Process("making_regions", 1, tmp_path / "nothing", TINY)
    with pytest.raises(RuntimeError, match=r"making_regions of size 1 failed: (?s:.*)No such file"):
        process.run()
    process.stop()


def test_a_process_that_could_not_begin_says_why(tmp_path):
    process = _Process("eating", 1, tmp_path / "nothing", TINY)
    process._process.join()  # it has failed before it is asked for anything
    with pytest.raises(RuntimeError, match=r"eating of size 1 failed: (?s:.*)KeyError"):
        process.run()
    process.stop()


def test_a_killed_process_is_told(tmp_path):
    process = _Process("making", 1, tmp_path / "nothing", TINY)
    process._process.kill()
    with pytest.raises(RuntimeError, match="making of size 1 failed: its process was killed"):
        process.run()
    process.stop()


def test_a_run_writes_points_exponents_and_a_picture(tmp_path, capsys):
    measured = growth(["verifying"], largest=0.002, rounds=2, output=tmp_path / "growth.csv")
    assert [point.size for point in measured] == [1, 2]
    assert all(len(p.seconds) == 2 and min(p.seconds) > 0 and p.mib > 0 for p in measured)
    rows = list(csv.DictReader((tmp_path / "growth.csv").read_text().splitlines()))
    middle = [sum(point.seconds) / 2 for point in measured]
    assert [float(row["seconds"]) for row in rows] == pytest.approx(middle)
    (fitted,) = csv.DictReader((tmp_path / "growth_exponents.csv").read_text().splitlines())
    exponent = fit([point.size for point in measured], middle)
    assert (fitted["sizes"], fitted["time"]) == ("1–2 shards", f"{exponent.all:.3f}")
    assert (tmp_path / "growth.png").stat().st_size > 5_000
    assert "verifying" in capsys.readouterr().out
