import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alpha_clip
from alpha_clip.drops import Drops
from alpha_clip.evaluation.base import Benchmark, Seen
from alpha_clip.evaluation.columns import PICTURE, Columns, join
from alpha_clip.evaluation.journal import Journal, fingerprint
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.evaluation.results import write_results
from alpha_clip.evaluation.runner import run_benchmark
from alpha_clip.model import AlphaClip


class Numbers(Benchmark):
    """Four parts of three pictures; notes in a file which it has scored, and where."""

    def __init__(self, log: str, fail_at: str = "", lost: int = 0) -> None:
        self.log, self.fail_at, self.lost = log, fail_at, lost

    def parts(self) -> dict[str, int]:
        return dict.fromkeys(("a", "b", "c", "d"), 3)

    def score(self, model: AlphaClip, part: str, drops: Drops, seen: Seen) -> Columns:
        if part == self.fail_at:
            raise KeyboardInterrupt
        with Path(self.log).open("a") as stream:
            stream.write(f"{part} {os.getpid()}\n")
        for i in range(self.lost):
            drops.add("missing_image", f"{part}{i}.jpg")
        seen(3)
        values = np.array([ord(part) - 97, 0, 1])
        return {PICTURE: np.arange(3), "value": values, "name": np.array([part] * 3)}

    def outcomes(self, columns: Columns) -> dict[str, Outcome]:
        groups = columns["value"] % 2
        return {
            "mean": Outcome(columns["value"].astype(float), columns[PICTURE]),
            "per class/mean": Outcome(columns["value"].astype(float), columns[PICTURE], groups),
        }

    def counts(self, columns: Columns) -> dict[str, float]:
        return {"rows": float(len(columns["value"]))}

    def classes(self) -> list[str]:
        return ["even", "odd"]

    def confusions(self, columns: Columns) -> Any:
        return columns["value"] % 2, columns["value"] // 2


def make(name: str, seed: int, device: str) -> AlphaClip:
    torch.manual_seed(seed)
    model, _, _ = alpha_clip.create_model(name, device=device)
    return model


@pytest.fixture
def tiny(tiny_name: str) -> Any:
    return partial(make, tiny_name, 0)


def scored(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()]


def test_what_is_done_is_not_done_again(tmp_path: Path, tiny: Any) -> None:
    log = tmp_path / "log"
    stopped = Numbers(str(log), "c")
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(stopped, tiny, tmp_path / "parts", ["cpu"])
    assert scored(log) == ["a", "b"]
    stopped.fail_at = ""
    columns, dropped = run_benchmark(stopped, tiny, tmp_path / "parts", ["cpu"])
    assert scored(log) == ["a", "b", "c", "d"]
    assert columns["value"].tolist() == [0, 0, 1, 1, 0, 1, 2, 0, 1, 3, 0, 1]
    assert columns[PICTURE].tolist() == list(range(12))
    assert columns["name"].tolist() == [*"aaabbbcccddd"]
    assert dropped == []
    assert not list(tmp_path.rglob("*.tmp"))
    assert stopped.run(tiny("cpu"))["mean"] == pytest.approx(10 / 12)


def test_other_settings_or_weights_are_another_run(
    tmp_path: Path, tiny: Any, tiny_name: str
) -> None:
    log = tmp_path / "log"
    assert Numbers(str(log), lost=1).settings == {"log": str(log), "fail_at": "", "lost": 1}
    run_benchmark(Numbers(str(log)), tiny, tmp_path / "parts", ["cpu"])
    run_benchmark(Numbers(str(log)), tiny, tmp_path / "parts", ["cpu"])
    assert len(scored(log)) == 4
    run_benchmark(Numbers(str(log)), partial(make, tiny_name, 1), tmp_path / "parts", ["cpu"])
    assert len(scored(log)) == 8
    run_benchmark(Numbers(str(log), "e"), tiny, tmp_path / "parts", ["cpu"])
    assert len(scored(log)) == 12
    one, other = tiny("cpu"), make(tiny_name, 1, "cpu")
    runs = [fingerprint(Numbers("x"), models) for models in ([one], [one, other], [one, one])]
    assert len(set(runs)) == 3
    assert fingerprint(Numbers("x"), [tiny("cpu")]) == runs[0]
    assert fingerprint(Numbers("y"), [one]) != runs[0]


class Anywhere(Numbers):
    """Is the same wherever its log lies."""

    unscored = frozenset({"log"})


def test_settings_that_come_later_do_not_score_anew(tiny: Any) -> None:
    one, other, third = (fingerprint(Anywhere(*a), [tiny("cpu")]) for a in ("x", "y", ("x", "c")))
    assert one == other != third


@pytest.mark.slow
def test_two_processes_share_the_parts(tmp_path: Path, tiny: Any) -> None:
    log = tmp_path / "log"
    benchmark = Numbers(str(log), lost=1)
    columns, dropped = run_benchmark(benchmark, tiny, tmp_path / "parts", ["cpu", "cpu"], 0.5)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(part for part, _ in lines) == ["a", "b", "c", "d"]
    assert len({process for _, process in lines}) == 2
    assert columns["name"].tolist() == [*"aaabbbcccddd"]
    assert [detail for _, detail in dropped] == ["a0.jpg", "b0.jpg", "c0.jpg", "d0.jpg"]


@pytest.mark.slow
def test_a_process_that_fails_is_told_of(tmp_path: Path, tiny: Any) -> None:
    benchmark = Numbers(str(tmp_path / "log"), "b")
    with pytest.raises(RuntimeError, match="process on another device failed"):
        run_benchmark(benchmark, tiny, tmp_path / "parts", ["cpu", "cpu"])
    assert scored(tmp_path / "log") == ["a", "c"]  # this one's share is done all the same


def test_too_much_that_can_not_be_used_stops_the_run_at_once(tmp_path: Path, tiny: Any) -> None:
    log = tmp_path / "log"
    message = r"3 pictures or regions, of 12 .*max_dropped = 0.2 .*missing_image: a0.jpg"
    with pytest.raises(ValueError, match=message):
        run_benchmark(Numbers(str(log), lost=3), tiny, tmp_path / "parts", ["cpu"], 0.2)
    assert scored(log) == ["a"]


def test_a_damaged_part_is_done_again(tmp_path: Path, tiny: Any) -> None:
    log = tmp_path / "log"
    benchmark = Numbers(str(log))
    run_benchmark(benchmark, tiny, tmp_path / "parts", ["cpu"])
    (file,) = (tmp_path / "parts").glob("*/b.npz")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"b\.npz is damaged and was removed; run again"):
        run_benchmark(benchmark, tiny, tmp_path / "parts", ["cpu"])
    run_benchmark(benchmark, tiny, tmp_path / "parts", ["cpu"])
    assert scored(log) == ["a", "b", "c", "d", "b"]


def test_a_journal_holds_no_objects(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    np.savez(tmp_path / "evil.npz", value=np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match=r"evil\.npz is damaged"):
        journal.read("evil")


def test_an_empty_part_takes_no_room() -> None:
    part = {PICTURE: np.arange(2), "value": np.arange(2)}
    found = join([{}, part, {}, part])
    assert found[PICTURE].tolist() == [0, 1, 2, 3]
    assert found["value"].tolist() == [0, 1, 0, 1]


def test_what_a_run_leaves(tmp_path: Path) -> None:
    benchmark = Numbers(str(tmp_path / "log"))
    columns = join(
        benchmark.score(None, part, Drops(), lambda _: None)  # type: ignore[arg-type]
        for part in benchmark.parts()
    )
    file = tmp_path / "deep" / "scores.json"
    dropped = [("missing_image", "a.jpg"), ("missing_image", "b.jpg")]
    said = write_results(benchmark, columns, dropped, file, checkpoint="x").splitlines()
    assert said[0].split() == ["rows", "12"]
    assert said[1].startswith("mean            0.8333  (0.")
    record = json.loads(file.read_text())
    assert record["scores"] == {
        "rows": 12.0,
        "mean": pytest.approx(10 / 12),
        "per class/mean": pytest.approx((2 / 6 + 8 / 6) / 2),
    }
    assert record["intervals"].keys() == {"mean", "per class/mean"}
    assert (record["checkpoint"], record["benchmark"]) == ("x", "Numbers")
    assert record["dropped"] == {"missing_image": 2}
    lines = file.with_suffix(".csv").read_text().splitlines()
    assert lines[:2] == ["figure,value,low,high", "rows,12.0,,"]
    assert lines[2].startswith("mean,0.8333")
    classes = file.with_suffix(".classes.csv").read_text().splitlines()
    assert classes[0] == "class,regions,per class/mean"
    assert classes[1].startswith("even,6,0.33")
    assert len(file.with_suffix(".dropped.csv").read_text().splitlines()) == 3
    for ending in (".png", ".confusions.png"):
        assert file.with_suffix(ending).read_bytes().startswith(b"\x89PNG")


def test_vectors_of_all_parts_are_mapped_not_held(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [{PICTURE: np.arange(n), "features": rng.random((n, 4), np.float32)} for n in (2, 5, 1)]
    parts = [{**part, "text": np.full(len(part[PICTURE]), "x")} for part in parts]
    mapped, held = join(iter(parts), tmp_path), join(iter(parts))
    assert isinstance(mapped["features"], np.memmap)
    assert not isinstance(held["features"], np.memmap)
    assert mapped.keys() == held.keys()
    for name, column in held.items():
        assert np.array_equal(mapped[name], column)
    assert not list(tmp_path.iterdir())  # nothing to tidy up


class Remembers(Numbers):
    """Has something to write besides figures."""

    def write(self, columns: Columns, file: Path) -> None:
        file.with_suffix(".values.txt").write_text(str(columns["value"].sum()))


def test_a_benchmark_may_write_more_than_figures(tmp_path: Path) -> None:
    benchmark = Remembers(str(tmp_path / "log"))
    columns = {PICTURE: np.arange(3), "value": np.array([0, 1, 2])}
    write_results(benchmark, columns, [], tmp_path / "scores.json")
    assert (tmp_path / "scores.values.txt").read_text() == "3"


class Prepares(Numbers):
    """Keeps what it prepares in the folder of the run."""

    def prepare(self, model: AlphaClip) -> None:
        assert self.folder is not None
        with (self.folder / "prepared").open("a") as stream:
            stream.write(f"{os.getpid()}\n")


def test_what_is_prepared_has_a_place_and_is_not_prepared_for_nothing(
    tmp_path: Path, tiny: Any
) -> None:
    benchmark = Prepares(str(tmp_path / "log"))
    for _ in range(2):
        run_benchmark(benchmark, tiny, tmp_path / "parts", ["cpu"])
    (file,) = (tmp_path / "parts").glob("*/prepared")
    assert len(file.read_text().splitlines()) == 1


@pytest.mark.slow
def test_each_process_is_prepared_after_the_first(tmp_path: Path, tiny: Any) -> None:
    benchmark = Prepares(str(tmp_path / "log"))
    run_benchmark(benchmark, tiny, tmp_path / "parts", ["cpu", "cpu"])
    (file,) = (tmp_path / "parts").glob("*/prepared")
    processes = file.read_text().split()
    assert processes[0] == str(os.getpid())
    assert len(set(processes)) == len(processes) == 2
