"""Benchmarks beside their measuring: their commands parse, their tables say what was scored."""

import csv
import json
import shlex
import statistics
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.focus.methods import AS_IT_IS, TRAINED, Method
from benchmarks.focus.scenes import write_scenes
from benchmarks.focus.table import report

FOCUS_CONFIGS = sorted(Path("benchmarks/focus").glob("*.yaml"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert "--output" in capsys.readouterr().out


def test_all_runs_each_with_the_options_that_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, object]] = []

    def first(published: str | None = None, rounds: int = 3) -> None:
        ran.append(("first", (published, rounds)))

    def second(rounds: int = 3) -> None:
        ran.append(("second", rounds))

    some = {"first": first, "gpu": first, "second": second}
    monkeypatch.setattr("benchmarks.__main__.BENCHMARKS", some)
    main(["all", "--published", "clone", "--rounds=5"])
    assert ran == [("first", ("clone", 5)), ("second", 5)]
    assert "gpu: left out, it needs a GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no benchmark has an option --round;"):
        main(["all", "--round", "5"])


def parsed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    from alpha_clip.cli import main as alpha_clip

    monkeypatch.setattr("sys.argv", ["alpha-clip"])
    with pytest.raises(SystemExit) as stop:
        alpha_clip([*arguments, "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("config", FOCUS_CONFIGS, ids=lambda c: c.stem)
def test_focus_configs_begin_with_their_command(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = shlex.split(config.read_text().splitlines()[0][1:])
    assert command == ["alpha-clip", "fit", "--config", str(config)]
    assert parsed(command[1:], monkeypatch, capsys)


@pytest.mark.parametrize("method", TRAINED, ids=lambda m: m.slug)
def test_options_of_a_method_are_options_of_training(
    method: Method, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert method.options is not None
    flags = [f"--{key}={value}" for key, value in method.options.items()]
    plain = parsed(["fit", "--config", "benchmarks/focus/alpha.yaml"], monkeypatch, capsys)
    ours = parsed(["fit", "--config", "benchmarks/focus/alpha.yaml", *flags], monkeypatch, capsys)
    assert (ours != plain) == bool(flags)


def test_methods_have_names_and_folders_of_their_own() -> None:
    methods = AS_IT_IS + TRAINED
    assert len({m.name for m in methods}) == len({m.slug for m in methods}) == len(methods)


def _scores(folder: Path, shift: float) -> None:
    ways = ["no alpha", "alpha", "crop", "masked crop", "red circle", "blur", "attention mask"]
    controls = ["shuffled alpha", "alpha of another object", "inverted alpha", "alpha only"]
    regions = {}
    for i, way in enumerate(ways + controls):
        regions[way] = 0.05 * i + shift
        regions[f"held out/{way}"] = 0.04 * i + shift
        regions[f"within image/{way}"] = 0.03 * i + shift
        regions[f"within image cosine/{way}"] = 0.02 * i + shift
    retrieval = {"image to text R@1": 0.2 + shift, "text to image R@1": 0.3 + shift}
    folder.mkdir(parents=True)
    for name, scores in (("regions", regions), ("retrieval", retrieval)):
        (folder / f"{name}.json").write_text(json.dumps({"scores": scores}))


def test_the_table_is_mean_and_deviation_of_the_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shifts = [0.0, 0.1, 0.3]
    _scores(tmp_path / "runs" / "base", 0.0)
    for method in TRAINED:
        for seed, shift in enumerate(shifts):
            _scores(tmp_path / "runs" / method.slug / str(seed), shift)
    report(tmp_path, [0, 1, 2])
    rows = {
        row["method"]: row
        for row in csv.DictReader((tmp_path / "focus.csv").read_text().splitlines())
    }
    spread = statistics.stdev(shifts)
    ours = rows["all blocks"]
    assert float(ours["region top-1"]) == pytest.approx(0.05 + statistics.fmean(shifts))
    assert float(ours["region top-1 sd"]) == pytest.approx(spread)
    assert float(ours["image to text"]) == pytest.approx(0.2 + statistics.fmean(shifts))
    tuned = rows["tuned without alpha"]
    assert float(tuned["region top-1"]) == pytest.approx(statistics.fmean(shifts))
    assert float(rows["CLIP, crop"]["region top-1"]) == pytest.approx(0.1)
    assert float(rows["CLIP, crop"]["region top-1 sd"]) == 0
    only = rows["all blocks, alpha only"]
    assert float(only["cosine"]) == pytest.approx(0.2 + statistics.fmean(shifts))
    assert "| all blocks | 0.183 ± 0.153 |" in capsys.readouterr().out
    assert (tmp_path / "focus.png").stat().st_size > 10_000


def test_scenes_are_shards_with_true_masks(tmp_path: Path) -> None:
    from alpha_clip.drops import Drops
    from alpha_clip.reader import find_shards, read_samples
    from data_pipeline.sources.scene_drawing import HELD_OUT_NAMES, SceneConfig

    config = SceneConfig(5, "seen", seed=3, shard_size=3)
    write_scenes(tmp_path, config)
    made = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    write_scenes(tmp_path, config)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == made
    drops = Drops()
    samples = [s for shard in find_shards([str(tmp_path)]) for s in read_samples(shard, drops)]
    assert len(samples) == 5
    assert not drops.counts()
    for sample in samples:
        assert len(sample.regions) == 3
        assert not {region.text for region in sample.regions} & set(HELD_OUT_NAMES)
        assert all(region.text in sample.caption for region in sample.regions)
