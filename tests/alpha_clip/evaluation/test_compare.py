import csv
import json
from pathlib import Path
from typing import Any

import pytest

from alpha_clip.cli import main
from alpha_clip.evaluation.compare import compare


def result(file: Path, benchmark: str = "ImageNetS", regions: int = 50, **scores: float) -> str:
    """Write what `alpha-clip eval` would."""
    named = {name.replace("_", " ").replace("  ", "/"): v for name, v in scores.items()}
    record: dict[str, Any] = {
        "benchmark": benchmark,
        "scores": {"regions": regions, **named},
        "intervals": {name: [v - 0.01, v + 0.01] for name, v in named.items()},
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(record))
    return str(file)


def test_figures_side_by_side_with_the_papers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = result(tmp_path / "ours.json", mean_per_class__alpha=0.77, crop=0.5)
    base = result(tmp_path / "base.json", mean_per_class__no_alpha=0.73, crop=0.4)
    out = tmp_path / "deep" / "table.md"
    assert main(["eval", "--compare", ours, base, "--output", str(out)]) == 0
    text = out.read_text()
    assert capsys.readouterr().out == text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    header, _, *rows = lines
    assert header[1:3] == ["ours", "base"]
    assert "Alpha-CLIP L/14 (paper)" in header
    table = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    assert table["regions"]["ours"] == "50"
    assert table["crop"]["base"] == "0.4000 (0.3900–0.4100)"
    assert table["mean per class/alpha"]["ours"].startswith("0.7700")
    assert table["mean per class/alpha"]["base"] == ""
    assert table["mean per class/alpha"]["Alpha-CLIP L/14 (paper)"] == "0.7741"
    assert table["mean per class/no alpha"]["CLIP L/14 (paper)"] == "0.7348"
    with out.with_suffix(".csv").open() as stream:
        found = {row["figure"]: row for row in csv.DictReader(stream)}
    assert found["mean per class/alpha"]["Alpha-CLIP B/16 (paper)"] == "0.6889"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_are_told_apart_by_folder(tmp_path: Path) -> None:
    files = [result(tmp_path / name / "scores.json", "Other", crop=0.5) for name in "ab"]
    header = compare(files, str(tmp_path / "t.md")).splitlines()[0]
    assert header == "| | a/scores | b/scores |"


def test_what_can_not_be_compared_is_refused(tmp_path: Path) -> None:
    one = result(tmp_path / "one.json", crop=0.5)
    out = str(tmp_path / "t.md")
    with pytest.raises(ValueError, match="at least two"):
        compare([one], out)
    with pytest.raises(ValueError, match="given twice"):
        compare([one, one], out)
    with pytest.raises(ValueError, match="one benchmark, got CocoClassification, ImageNetS"):
        compare([one, result(tmp_path / "coco.json", "CocoClassification", crop=0.1)], out)
    with pytest.raises(ValueError, match=r'different data: \{"regions": 50\}; \{"regions": 7\}'):
        compare([one, result(tmp_path / "few.json", regions=7, crop=0.1)], out)
    for text in ("", "[]", "{}", '{"scores": {}, "intervals": {"a": 1}, "benchmark": "x"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json is no result of alpha-clip eval"):
            compare([one, str(tmp_path / "bad.json")], out)
    assert main(["eval", "--compare", one, str(tmp_path / "missing.json")]) == 2
