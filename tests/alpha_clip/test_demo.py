"""The demo's steps: what it refuses, and how a finished step is not run again."""

import json
import re
import sys
from pathlib import Path

import pytest

from alpha_clip import demo as demo_module
from alpha_clip.demo import Step, _run, config_file, demo


@pytest.mark.parametrize(
    "options",
    [
        {"masks": "instances.json"},
        {"sam_checkpoint": "sam.pth"},
        {"model": "ViT-B-16"},
        {"pretrained": "openai"},
    ],
)
def test_options_for_own_data_need_own_data(options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need --input"):
        demo(output=str(tmp_path), **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_that_matches_nothing_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file matches .*nowhere.*\.tar.*in quotes"):
        demo(input=str(tmp_path / "nowhere*.tar"), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_not_shipped_is_named() -> None:
    assert Path(config_file("train/tiny_base.yaml")).is_file()
    with pytest.raises(ValueError, match=r"the shipped config train/none\.yaml is missing"):
        config_file("train/none.yaml")


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Step, Path]:
    """A step whose process adds a line to a file."""
    log = tmp_path / "log"
    code = f"open({str(log)!r}, 'a').write('ran\\n')"
    monkeypatch.setattr(Step, "process", lambda self: [sys.executable, "-c", code])
    return Step("make masks: box", ("alpha-clip-data", "grit")), log


def test_a_finished_step_is_not_run_again(
    counted: tuple[Step, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step, log = counted
    first = _run(step, tmp_path, 1, 2)
    again = _run(step, tmp_path, 1, 2)
    assert again == first > 0
    assert log.read_text() == "ran\n"
    shown = capsys.readouterr().out
    assert "[1/2] make masks: box\n$ alpha-clip-data grit" in shown
    assert "done before" in shown


def test_a_step_with_other_arguments_is_run_again(
    counted: tuple[Step, Path], tmp_path: Path
) -> None:
    step, log = counted
    _run(step, tmp_path, 1, 1)
    _run(Step(step.name, (*step.arguments, "--workers", "3")), tmp_path, 1, 1)
    assert log.read_text() == "ran\nran\n"


def test_a_failed_step_stops_the_road_and_leaves_no_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Step, "process", lambda self: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match=r"the step 'draw' failed \(exit code 3\)"):
        _run(Step("draw", ("alpha-clip-data", "scenes")), tmp_path, 1, 1)
    assert not (tmp_path / ".steps").exists()


def test_every_step_of_both_roads_names_files_that_are_shipped(tmp_path: Path) -> None:
    roads = [
        demo_module._scenes_road(tmp_path),
        demo_module._input_road(tmp_path, "a.tar", None, ("sam.pth", "vit_b"), (None, None), 2),
        demo_module._input_road(tmp_path, "a.tar", "m.json", None, ("ViT-B-16", "openai"), 2),
    ]
    for road in roads:
        assert len({step.name for step in road}) == len(road)
        for step in road:
            arguments = list(step.arguments)
            if "--config" in arguments:
                assert Path(arguments[arguments.index("--config") + 1]).is_file()
            assert step.process()[:2] == [sys.executable, "-m"]


def test_a_mark_holds_what_was_run(counted: tuple[Step, Path], tmp_path: Path) -> None:
    step, _ = counted
    _run(step, tmp_path, 1, 1)
    (mark,) = (tmp_path / ".steps").iterdir()
    assert mark.name == "make-masks-box.json"
    assert json.loads(mark.read_text())["arguments"] == ["alpha-clip-data", "grit"]


def test_the_reports_table_has_ways_of_pointing_alone(tmp_path: Path) -> None:
    """Beside them, results hold counts and other kinds of figures."""
    from alpha_clip.demo_report import _scores
    from alpha_clip.report import Report

    ways = ["no alpha", "alpha", "shuffled alpha", "crop"]
    figures = {"regions": 9.0, "held out/regions": 3.0, "classes": 36.0, "top-5/alpha": 1.0}
    figures |= {way: 0.1 * i for i, way in enumerate(ways)}
    figures |= {f"held out/{way}": 0.05 * i for i, way in enumerate(ways)}
    (tmp_path / "scores").mkdir()
    for name in ("base", "alpha"):
        (tmp_path / "scores" / f"{name}.json").write_text(json.dumps({"scores": figures}))
    report = Report("title")
    _scores(report, tmp_path, tmp_path)
    report.write(tmp_path / "page.html")
    rows = re.findall(r"<tr><td>([^<]+)</td>", (tmp_path / "page.html").read_text())
    assert rows == ["no alpha", "alpha", "shuffled alpha", "crop"]
    assert (tmp_path / "accuracy.png").is_file()
