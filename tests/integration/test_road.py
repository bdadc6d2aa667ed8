"""The whole road by its commands, small: drawn or real GRIT tars in, a report and a tower out."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.sources.scene_drawing import SceneConfig
from data_pipeline.sources.scenes import write_scenes

pytestmark = pytest.mark.slow


def demo(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Run the demo in a process of its own; return what it said."""
    command = [sys.executable, "-m", "alpha_clip", "demo", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars of 20 drawn scenes; the second one ends early."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(str(folder), SceneConfig(samples=40, shard_size=20, size_px=96), workers=1)
    tar = folder / "00001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    return folder


@pytest.fixture(scope="module")
def finished(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished road on those tars, and what it said."""
    folder = tmp_path_factory.mktemp("road")
    masks = scenes / "*.masks.jsonl"
    arguments = ("--input", f"{scenes}/*.tar", "--masks", str(masks), "--steps", "2")
    return folder, demo(*arguments, "--output", "out", cwd=folder)


def test_the_report_is_one_page_with_its_pictures(finished: tuple[Path, str]) -> None:
    folder, said = finished
    page = (folder / "out/report.html").read_text()
    assert "The report is out/report.html" in said
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(sources) >= 2
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    assert "nan" not in re.sub(r"base64,[^\"]+", "", page).lower()


def test_masks_are_scored_and_losses_counted(finished: tuple[Path, str]) -> None:
    folder, said = finished
    facts = json.loads((folder / "out/report.json").read_text())
    grabcut, box = facts["masks"]["grabcut"], facts["masks"]["box"]
    assert 20 < grabcut["samples"] < 40
    assert grabcut["rejects"] == {"truncated_tar": 1}
    assert "skipped        1 truncated_tar" in said
    assert grabcut["mean_iou"] > box["mean_iou"] > 0.4
    assert facts["parity"] <= 1e-5


def test_the_exported_tower_loads_with_stock_transformers(finished: tuple[Path, str]) -> None:
    from transformers import CLIPVisionModelWithProjection

    folder, _ = finished
    tower = CLIPVisionModelWithProjection.from_pretrained(folder / "out/export/huggingface").eval()
    rgba = torch.randn(2, 4, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = tower(pixel_values=rgba).image_embeds
        other = tower(pixel_values=torch.cat([rgba[:, :3], -rgba[:, 3:]], 1)).image_embeds
    assert whole.shape == (2, 128)
    assert not torch.allclose(whole, other)  # two steps have moved alpha away from zero


def test_what_the_demo_says_to_type_next_works(finished: tuple[Path, str]) -> None:
    from PIL import Image

    folder, said = finished
    (code,) = re.findall(r'python -c "(.*)"', said)
    pixels = np.zeros((100, 120, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "torch.Size([1, 128])", done.stderr


def test_run_again_it_only_does_what_is_missing(finished: tuple[Path, str], scenes: Path) -> None:
    folder, _ = finished
    (folder / "out/.steps/export.json").unlink()
    (folder / "out/report.html").unlink()
    arguments = ("--input", f"{scenes}/*.tar", "--masks", str(scenes / "*.masks.jsonl"))
    said = demo(*arguments, "--steps", "2", "--output", "out", cwd=folder)
    steps = len(list((folder / "out/.steps").iterdir()))
    assert said.count("done before") == steps - 1
    assert (folder / "out/report.html").is_file()


def test_photographs_give_every_phrase_a_mask(photos: Path, tmp_path: Path) -> None:
    tar = sorted((photos / "grit").glob("*.tar"))[0]
    masks = str(photos / "instances.json")
    arguments = ("--input", str(tar), "--masks", masks, "--steps", "2")
    demo(*arguments, "--output", "out", cwd=tmp_path)
    facts = json.loads((tmp_path / "out/report.json").read_text())["masks"]
    for numbers in facts.values():
        lost = sum(numbers["rejects"].values())
        assert numbers["regions"] + lost == numbers["true_masks"] + lost > 0
    assert facts["grabcut"]["mean_iou"] > facts["box"]["mean_iou"]
