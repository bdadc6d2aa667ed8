"""Scenes on disk: GRIT's layout, true masks beside it, and runs that go on where they were."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from alpha_clip.regions import decode_rle, read_image
from data_pipeline.sources import scenes
from data_pipeline.sources.grit import GritSource
from data_pipeline.sources.scene_drawing import HELD_OUT_NAMES, NAMES, SceneConfig
from data_pipeline.sources.scenes import write_scenes

CONFIG = SceneConfig(samples=7, shard_size=3, pairs="all", size_px=96)


@pytest.fixture
def in_process(monkeypatch):
    """Draw in this process: starting others takes a second."""
    monkeypatch.setattr(
        scenes, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven pictures in three tars, drawn by two processes. Read only."""
    path = tmp_path_factory.mktemp("scenes")
    write_scenes(str(path), CONFIG, workers=2)
    return path


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def samples(folder):
    """Every sample as `key, picture, text, record, true masks`, in order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        truth = {}
        for line in path.with_name(f"{path.stem}.masks.jsonl").read_text().splitlines():
            record = json.loads(line)
            truth[record["key"]] = record["masks"]
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            data = {m.name: tar.extractfile(m).read() for m in members}
        keys = [m.name.removesuffix(".jpg") for m in members[::3]]
        assert [m.name for m in members] == [
            f"{key}.{extension}" for key in keys for extension in ("jpg", "txt", "json")
        ]
        assert list(truth) == keys
        for key in keys:
            picture = Image.open(io.BytesIO(data[f"{key}.jpg"]))
            text = data[f"{key}.txt"].decode()
            found.append((key, picture, text, json.loads(data[f"{key}.json"]), truth[key]))
    return found


def test_files(folder):
    tars = ("00000", "00001", "00002")
    parts = [f"{tar}{end}" for tar in tars for end in (".tar", ".masks.jsonl", "_stats.json")]
    assert sorted(contents(folder)) == sorted([*parts, "names.json"])
    counts = [json.loads((folder / f"{tar}_stats.json").read_text())["count"] for tar in tars]
    assert counts == [3, 3, 1]


def test_names_file(folder):
    names = json.loads((folder / "names.json").read_text())
    assert names == {"names": list(NAMES), "held_out": list(HELD_OUT_NAMES)}


def test_keys_are_digits_and_unique(folder):
    keys = [key for key, *_ in samples(folder)]
    assert len(set(keys)) == CONFIG.samples
    assert all(key.isdigit() for key in keys)


def test_tars_are_ustar_without_a_date(folder):
    for path in folder.glob("*.tar"):
        assert path.read_bytes()[257:265] == b"ustar\x0000"
        with tarfile.open(path) as tar:
            assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "")}


def test_records_are_as_grit_has_them(folder):
    for key, picture, text, record, truth in samples(folder):
        assert picture.format == "JPEG"
        assert (record["width"], record["height"]) == picture.size
        assert record["key"] == key
        assert record["id"] == int(key)
        assert text == record["caption"]
        assert len(record["ref_exps"]) == len(record["noun_chunks"]) == len(truth) >= 3
        for chunk, expression, true in zip(
            record["noun_chunks"], record["ref_exps"], truth, strict=True
        ):
            name = true["text"]
            article = "an" if name.startswith("orange") else "a"
            assert text[chunk[0] : chunk[1]] == name
            assert text[expression[0] : expression[1]] == f"{article} {name}"
            assert chunk[2:] == expression[2:]
            assert chunk[6] == 1.0


def test_boxes_are_tight_around_the_true_masks(folder):
    for _, picture, _, record, truth in samples(folder):
        width, height = picture.size
        for chunk, true in zip(record["noun_chunks"], truth, strict=True):
            mask = decode_rle(true["rle"])
            assert mask.shape == (height, width)
            ys, xs = np.nonzero(mask)
            tight = (
                xs.min() / width,
                ys.min() / height,
                (xs.max() + 1) / width,
                (ys.max() + 1) / height,
            )
            assert chunk[2:6] == pytest.approx(tight, abs=1e-6)
            assert true["box"] == chunk[2:6]


def test_grit_source_reads_all_of_it(folder):
    items = [i for tar in sorted(folder.glob("*.tar")) for i in GritSource().read(str(tar))]
    assert [item.key for item in items] == [key for key, *_ in samples(folder)]
    assert not any(item.rejects or read_image(item.image).reencoded for item in items)


def test_one_worker_draws_the_same_bytes_as_two(folder, tmp_path):
    write_scenes(str(tmp_path), CONFIG, workers=1)
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("change", [{"seed": 1}, {"pairs": "seen"}])
def test_seed_and_pairs_decide_the_pictures(folder, tmp_path, in_process, change):
    write_scenes(str(tmp_path), SceneConfig(**{**vars(CONFIG), **change}), workers=1)
    assert contents(tmp_path)["00000.tar"] != contents(folder)["00000.tar"]


def test_picture_does_not_depend_on_the_size_of_the_shards(folder, tmp_path, in_process):
    write_scenes(str(tmp_path), SceneConfig(**{**vars(CONFIG), "shard_size": 4}), workers=1)
    assert [text for _, _, text, *_ in samples(tmp_path)] == [t for _, _, t, *_ in samples(folder)]


def test_second_run_draws_nothing_anew(tmp_path, in_process, monkeypatch):
    write_scenes(str(tmp_path), CONFIG)
    before = {f.name: (f.stat().st_mtime_ns, f.stat().st_ino) for f in tmp_path.glob("0*")}

    def fail(*_):
        raise AssertionError("drew a picture")

    monkeypatch.setattr(scenes, "draw_scene", fail)
    write_scenes(str(tmp_path), CONFIG)
    after = {f.name: (f.stat().st_mtime_ns, f.stat().st_ino) for f in tmp_path.glob("0*")}
    assert after == before


def test_interrupted_run_goes_on_with_what_is_missing(tmp_path, in_process):
    write_scenes(str(tmp_path), CONFIG)
    whole = contents(tmp_path)
    (tmp_path / "00001_stats.json").unlink()  # statistics are written last
    (tmp_path / "00001.tar").rename(tmp_path / "00001.tar.tmp")
    kept = (tmp_path / "00000.tar").stat().st_ino
    write_scenes(str(tmp_path), CONFIG)
    assert contents(tmp_path) == whole
    assert (tmp_path / "00000.tar").stat().st_ino == kept


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"samples": 9}, {"samples": 2}, {"size_px": 80}, {"pairs": "seen"}]
)
def test_other_settings_into_the_same_folder_are_refused(tmp_path, in_process, change):
    write_scenes(str(tmp_path), CONFIG)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"00000_stats.json was drawn with other settings"):
        write_scenes(str(tmp_path), SceneConfig(**{**vars(CONFIG), **change}))
    assert contents(tmp_path) == before
