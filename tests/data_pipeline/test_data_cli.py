"""`alpha-clip-data` as it is typed: commands, exit codes, and what stands on stderr."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_pipeline.__main__ import main
from data_pipeline.shards import read_manifests
from data_pipeline.sources import scenes

BOX = ("--segmenter", "data_pipeline.segmenters.box.BoxSegmenter", "--workers", "1")


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Draw scenes in this process: starting others takes a second."""
    monkeypatch.setattr(
        scenes, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1)
    )


@pytest.fixture
def run(capsys):
    """Run a command; return its exit code, stdout and stderr."""

    def call(*arguments):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def tars(grit, tmp_path):
    """A folder with two tars of one sample."""
    (tmp_path / "in").mkdir()
    for key in "12":
        grit.tar(tmp_path / "in" / f"{key}.tar", grit.sample(key))
    return tmp_path / "in"


# --- help and mistakes -------------------------------------------------------------------------


def test_help_lists_the_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    for words in ("scenes", "grit", "inspect", "Draw scenes", "Make region–text shards"):
        assert words in out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("scenes", ("--output", "--scenes.seed", "--config", "Folder for the tars")),
        ("grit", ("--input", "--segmenter", "--source", "--workers", "Makes a mask for each box")),
        ("inspect", ("--input", "--masks", "--tiles", "Folder of finished shards")),
    ],
)
def test_help_of_a_command_explains_its_keys(run, command, words):
    code, out, _ = run(command, "--help")
    assert code == 0
    for word in words:
        assert word in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("scenes", "--output", "x", "--sceens.seed", "1"),
        ("scenes", "--output", "x", "--scenes.seeed", "1"),
        ("grit", "--input", "x", "--output", "y", "--worker", "1"),
        ("grit", "--input", "x", "--output", "y", "--source.phrase", "both"),
        ("inspect", "--input", "x", "--output", "y", "--tile", "1"),
        ("inspcet", "--input", "x"),
    ],
)
def test_misspelt_key_exits_2(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "error" in err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("scenes",),
        ("grit", "--input", "x", "--output", "y", "--workers", "many"),
        ("grit", "--input", "x", "--output", "y", "--segmenter", "no.such.Segmenter"),
        ("grit", "--input", "x", "--output", "y", "--source.phrases", "verbs"),
    ],
)
def test_missing_and_wrong_values_exit_2(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "error" in err


def test_misspelt_key_in_a_config_file_exits_2(run, tmp_path):
    (tmp_path / "c.yaml").write_text("output: x\nscenes: {sample: 3}\n")
    code, _, err = run("scenes", "--config", tmp_path / "c.yaml")
    assert code == 2
    assert "sample" in err


def test_values_that_make_no_sense_exit_2_with_the_reason(run, tmp_path):
    code, _, err = run("scenes", "--output", tmp_path / "out", "--scenes.size_px", "9")
    assert code == 2
    assert "size_px must lie in 64..1024, got 9" in err
    assert not (tmp_path / "out").exists()


# --- the commands ------------------------------------------------------------------------------


def test_scenes_grit_inspect_one_after_the_other(run, tmp_path):
    (tmp_path / "scenes.yaml").write_text(
        f"output: {tmp_path / 'scenes'}\nscenes: {{samples: 5, shard_size: 3, size_px: 64}}\n"
    )
    code, out, _ = run("scenes", "--config", tmp_path / "scenes.yaml")
    assert code == 0
    assert f"5 pictures in {tmp_path / 'scenes'}" in out

    pattern, shards = tmp_path / "scenes" / "*.tar", tmp_path / "shards"
    code, out, _ = run(
        *("grit", "--input", pattern, "--output", shards, *BOX),
        *("--source.phrases", "noun_chunks"),
    )
    assert code == 0
    assert "2 shards: 5 samples, 15 regions" in out

    code, out, _ = run(
        *("inspect", "--input", shards, "--output", tmp_path / "report"),
        *("--masks", tmp_path / "scenes" / "*.masks.jsonl", "--tiles", "4"),
    )
    assert code == 0
    found = json.loads((tmp_path / "report" / "inspection.json").read_text())
    assert (found["samples"], found["true_masks"]) == (5, 15)
    assert 0.3 < found["mean_iou"] < 0.9  # boxes are no masks
    assert f"mean IoU {found['mean_iou']:.3f} with 15 true masks" in out
    assert (tmp_path / "report" / "contact_sheet.png").exists()


def test_key_on_the_command_line_wins_over_the_config(run, tmp_path):
    (tmp_path / "c.yaml").write_text("output: x\nscenes: {samples: 9, size_px: 64}\n")
    arguments = ("--config", tmp_path / "c.yaml", "--output", tmp_path / "out")
    code, out, _ = run("scenes", *arguments, "--scenes.samples", "1")
    assert (code, out.startswith("1 pictures in")) == (0, True)


def test_scenes_of_other_settings_are_refused(run, tmp_path):
    arguments = ("scenes", "--output", tmp_path, "--scenes.samples", "1")
    assert run(*arguments)[0] == 0
    code, _, err = run(*arguments, "--scenes.seed", "1")
    assert code == 2
    assert "drawn with other settings; draw into another folder, or delete it" in err


def test_grit_again_makes_nothing_anew(run, tars, tmp_path):
    arguments = ("grit", "--input", tars / "*.tar", "--output", tmp_path / "out", *BOX)
    assert run(*arguments)[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("0*")}
    code, out, _ = run(*arguments)
    assert (code, "2 shards: 2 samples, 4 regions" in out) == (0, True)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("0*")} == before


@pytest.mark.parametrize("given", [(), ("--input", "x"), ("--output", "y")])
def test_grit_needs_an_input_and_an_output(run, given):
    code, out, err = run("grit", *given)
    assert (code, out) == (2, "")
    assert "expected --input (a pattern of GRIT tars, in quotes) and --output (a folder)" in err


def test_grit_pattern_without_a_match_says_what_to_give(run, tmp_path):
    code, out, err = run("grit", "--input", tmp_path / "*.tar", "--output", tmp_path / "out", *BOX)
    assert (code, out) == (2, "")
    assert "no file matches" in err
    assert "give a pattern of inputs such as" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"no tar"])
def test_grit_bad_tar_alone_returns_1_and_is_listed(run, tmp_path, data):
    (tmp_path / "bad.tar").write_bytes(data)
    code, out, _ = run("grit", "--input", tmp_path / "*.tar", "--output", tmp_path / "out", *BOX)
    assert code == 1
    assert f"skipped the whole of {tmp_path / 'bad.tar'}" in out
    assert read_manifests(tmp_path / "out") == {}


def test_grit_bad_tar_among_good_ones_is_listed_and_the_others_are_made(run, tars, tmp_path):
    (tars / "0.tar").write_bytes(b"no tar")
    code, out, _ = run("grit", "--input", tars / "*.tar", "--output", tmp_path / "out", *BOX)
    assert code == 0
    assert "2 shards: 2 samples, 4 regions" in out
    assert f"skipped the whole of {tars / '0.tar'}" in out
    assert set(read_manifests(tmp_path / "out")) == {"00001", "00002"}


def test_grit_tells_what_was_skipped_and_why(run, grit, tars, tmp_path):
    grit.tar(tars / "3.tar", grit.sample("3", b"no picture"), grit.sample("4", ref_exps=[]))
    _, out, _ = run("grit", "--input", tars / "*.tar", "--output", tmp_path / "out", *BOX)
    assert "skipped        1 corrupt_image" in out
    assert "skipped        1 no_phrases" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--source.min_score", "0.8"), "other settings"),
        (("--segmenter", "data_pipeline.segmenters.grabcut.GrabCutSegmenter"), "other settings"),
        (("--input", "{tars}/2.tar"), "keep the list of inputs as it was"),
    ],
)
def test_grit_into_a_folder_of_something_else_exits_2(run, tars, tmp_path, change, message):
    arguments = ("grit", "--input", tars / "*.tar", "--output", tmp_path / "out", *BOX)
    assert run(*arguments)[0] == 0
    code, _, err = run(*arguments, *(c.format(tars=tars) for c in change))
    assert code == 2
    assert message in err


def test_grit_missing_weights_exit_2(run, tars, tmp_path):
    code, _, err = run(
        *("grit", "--input", tars / "*.tar", "--output", tmp_path / "out"),
        *("--segmenter", "data_pipeline.segmenters.sam.SamSegmenter"),
        *("--segmenter.checkpoint", tmp_path / "sam.pth"),
    )
    assert code == 2
    assert "sam.pth' does not exist; download it" in err


def test_grit_damaged_manifest_exits_2_with_what_to_do(run, tars, tmp_path):
    arguments = ("grit", "--input", tars / "*.tar", "--output", tmp_path / "out", *BOX)
    run(*arguments)
    (tmp_path / "out" / "00000.done.json").write_text("{")
    code, _, err = run(*arguments)
    assert code == 2
    assert "00000.done.json is damaged" in err
    assert "delete it to make the shard again" in err
    (tmp_path / "out" / "00000.done.json").unlink()
    assert run(*arguments)[0] == 0


def test_inspect_without_shards_exits_2(run, tmp_path):
    code, _, err = run("inspect", "--input", tmp_path, "--output", tmp_path / "report")
    assert code == 2
    assert "holds no finished shards" in err
