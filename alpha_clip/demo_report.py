"""The demo's page: sample masks, curves, the table of region accuracy, parity, times."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from alpha_clip.evaluation.focus_baselines import FOCUS
from alpha_clip.evaluation.region_views import CONTROLS
from alpha_clip.report import Report
from alpha_clip.visualize import plot_bars, plot_curves

_MODELS = {"base": "CLIP", "alpha": "Alpha-CLIP"}
_HELD_OUT = "held out/"


def write_report(folder: Path, seconds: dict[str, float], segmenters: list[str]) -> Path:
    """Write `report.html`, its pictures and `report.json` into the demo's folder.

    Args:
        folder: Where the demo's steps left their results.
        seconds: Step -> how long it took.
        segmenters: Whose masks there are.

    Returns:
        The page.
    """
    report = Report("Alpha-CLIP: from pictures to an exported region-aware encoder")
    facts: dict[str, Any] = {"seconds": seconds}
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    facts["masks"] = _masks(report, folder, segmenters)
    _curves(report, folder, pictures)
    if (folder / "scores").exists():
        facts["scores"] = _scores(report, folder, pictures)
    facts["parity"] = _parity(report, folder)
    report.heading("Time of each step")
    rows = [[name, f"{value:.0f} s"] for name, value in seconds.items()]
    report.table(["step", "time"], [*rows, ["all", f"{sum(seconds.values()):.0f} s"]])
    (folder / "report.json").write_text(json.dumps(facts, indent=1) + "\n")
    report.write(folder / "report.html")
    return folder / "report.html"


def _masks(report: Report, folder: Path, segmenters: list[str]) -> dict[str, Any]:
    """Show the numbers of every segmenter's masks and the pictures of the best."""
    report.heading("Masks and their phrases")
    found = {
        name: json.loads((folder / "masks" / name / "inspection.json").read_text())
        for name in segmenters
    }
    rows = []
    for name, numbers in found.items():
        mean, half = numbers["mean_iou"], numbers["iou_above_half"]
        rejects = ", ".join(f"{n} {reason}" for reason, n in numbers["rejects"].items()) or "none"
        iou = ["–", "–"] if mean is None else [f"{mean:.3f}", f"{half:.1%}"]
        rows.append([name, str(numbers["samples"]), str(numbers["regions"]), rejects, *iou])
    header = [
        "segmenter",
        "pictures",
        "regions",
        "skipped",
        "mean IoU with true masks",
        "IoU ≥ 0.5",
    ]
    report.table(header, rows)
    best = "sam" if "sam" in found else "grabcut"
    sheet = folder / "masks" / best / "contact_sheet.png"
    if sheet.exists():
        report.picture(sheet, f"masks made by {best}, each with its phrase")
    return found


def _curves(report: Report, folder: Path, pictures: Path) -> None:
    """Draw the losses of both stages and the accuracy that validation saw."""
    report.heading("Training")
    losses, accuracy = {}, {}
    for stage, label in (("base", "CLIP on captions"), ("alpha", "alpha training")):
        metrics = _metrics(folder / "training" / stage / "metrics")
        if "train/loss" in metrics:
            losses[label] = metrics["train/loss"]
        if "val/region_top1" in metrics:
            accuracy[label] = metrics["val/region_top1"]
    for name, curves, label in (
        ("loss", losses, "loss"),
        ("validation", accuracy, "region top-1, validation"),
    ):
        if curves:
            plot_curves(curves, label, pictures / f"{name}.png")
            report.picture(pictures / f"{name}.png", label)


def _metrics(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Read the curves of a run; one that was stopped left several versions."""
    curves: dict[str, dict[float, float]] = {}
    for file in sorted(folder.glob("version_*/metrics.csv"), key=lambda f: f.stat().st_mtime):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        curves.setdefault(name, {})[float(row["step"])] = float(value)
    return {name: (sorted(c), [c[step] for step in sorted(c)]) for name, c in curves.items()}


def _scores(report: Report, folder: Path, pictures: Path) -> dict[str, dict[str, float]]:
    """Show region accuracy by way of pointing, for names seen and held out of training."""
    scores = {
        name: json.loads((folder / "scores" / f"{name}.json").read_text())["scores"]
        for name in _MODELS
    }
    report.heading("Which object is meant? Region accuracy, all names as candidates")
    report.text(
        "Each picture holds several objects, so the picture alone can't tell. CLIP is the tiny "
        "model trained on captions that Alpha-CLIP starts from; it ignores alpha. The prompt is "
        "the name itself."
    )
    ways = [way for way in FOCUS if way in scores["alpha"]]
    ways[2:2] = [control for control in CONTROLS if control in scores["alpha"]]
    rows = []
    for way in ways:
        row = [way]
        for group in ("", _HELD_OUT):
            for name in _MODELS:
                blind = name == "base" and "alpha" in way and way != "no alpha"
                row.append("–" if blind else f"{scores[name].get(group + way, float('nan')):.3f}")
        rows.append(row)
    labels = [
        f"{label}, {group}" for group in ("names seen", "held out") for label in _MODELS.values()
    ]
    report.table(["input", *labels], rows)
    counts = scores["alpha"]
    report.text(
        f"{counts['regions']:.0f} regions with names seen in training, "
        f"{counts.get(_HELD_OUT + 'regions', 0):.0f} with (colour, shape) pairs held out of it."
    )
    series = {
        "names seen": {way: scores["alpha"][way] for way in ways},
        "held-out pairs": {
            way: scores["alpha"][_HELD_OUT + way]
            for way in ways
            if _HELD_OUT + way in scores["alpha"]
        },
    }
    plot_bars(series, "Alpha-CLIP, region top-1", pictures / "accuracy.png")
    report.picture(pictures / "accuracy.png", "region accuracy of Alpha-CLIP")
    return scores


def _parity(report: Report, folder: Path) -> float:
    """Load the export with stock transformers once more and compare."""
    from alpha_clip.export.huggingface import compare
    from alpha_clip.factory import load_checkpoint

    directory = folder / "export/huggingface"
    difference = compare(load_checkpoint(folder / "models/alpha"), directory)
    report.heading("Export")
    report.text(
        f"The image tower as a stock transformers CLIPVisionModelWithProjection with 4 channels; "
        f"its features differ from ours by at most {difference:.1e} (relative to the largest)."
    )
    report.code(
        "from transformers import CLIPVisionModelWithProjection\n"
        f'tower = CLIPVisionModelWithProjection.from_pretrained("{directory}")'
    )
    return difference
