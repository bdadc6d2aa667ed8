"""Every shipped config is accepted by the command in its first line; misspelt keys are not."""

import shlex
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
CONFIGS = sorted((REPO / "configs").rglob("*.yaml"))
COMMAND = {"alpha-clip": "alpha_clip.cli", "alpha-clip-data": "data_pipeline.__main__"}


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["alpha-clip"])  # Lightning minds pytest's


def typed(config: Path) -> list[str]:
    """The command in a config's first line."""
    first = config.read_text().splitlines()[0]
    assert first.startswith("# alpha-clip"), f"{config} does not begin with its command"
    return shlex.split(first[1:])


def run(arguments: list[str]) -> int:
    """Run a command of ours in this process; return its exit code."""
    from importlib import import_module

    main = import_module(COMMAND[arguments[0]]).main
    try:
        return main(arguments[1:])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_first_line_runs_the_config(config, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    arguments = typed(config)
    assert arguments[arguments.index("--config") + 1] == str(config.relative_to(REPO))
    assert run([*arguments, "--print_config"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_misspelt_key_stops_at_once(config, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    assert run([*typed(config), "--no_such_key", "1"]) == 2
    assert "no_such_key" in capsys.readouterr().err


def test_there_is_a_config_for_every_kind_of_work():
    assert {c.parent.name for c in CONFIGS} == {"train", "data", "eval", "export"}
