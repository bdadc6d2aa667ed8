"""What the README tells people to type works as it stands."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import alpha_clip

REPO = Path(__file__).resolve().parent.parent
TEXT = (REPO / "README.md").read_text()
MAINS = {"alpha-clip": "alpha_clip.cli", "alpha-clip-data": "data_pipeline.__main__"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


COMMANDS = [
    line
    for block in blocks("bash")
    for line in block.splitlines()
    if line.split(" ")[0] in MAINS and "COMMAND" not in line
]


def test_the_five_lines_and_what_follows_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (240, 320, 3), np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    first, second = blocks("python")[:2]
    assert len([line for line in first.splitlines() if line.strip()]) == 5
    names = {}
    torch.manual_seed(0)
    exec(first, names)
    assert names["rgba"].shape == (4, 224, 224)
    assert names["features"].shape == (1, 512)
    mask = np.zeros((240, 320), bool)
    mask[60:200, 80:240] = True
    names |= {"image": Image.open("photo.jpg"), "mask": mask, "box": alpha_clip.Box(1, 2, 99, 88)}
    exec(second, names)
    assert names["texts"].shape == (2, 512)
    assert names["many"].shape == (1, 2, 512)
    assert alpha_clip.load_checkpoint("my-model").name == "ViT-B-16"


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_accepted(line, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr("sys.argv", ["alpha-clip"])  # Lightning minds pytest's
    program, *arguments = shlex.split(line)
    main = import_module(MAINS[program]).main
    try:
        code = main([*arguments, "--print_config"])
    except SystemExit as stop:
        code = stop.code
    assert not code, capsys.readouterr().err


def test_every_command_of_the_package_is_in_the_table():
    for command in ("demo", "fit", "eval", "export"):
        assert f"`alpha-clip {command}`" in TEXT
    for command in ("scenes", "grit", "inspect", "verify"):
        assert f"`alpha-clip-data {command}`" in TEXT


def test_pictures_are_there():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT)
    assert pictures
    assert [p for p in pictures if not (REPO / p).is_file()] == []
