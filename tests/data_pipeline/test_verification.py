"""Whatever is wrong with finished shards is found, and named."""

import json

import pytest

from data_pipeline.__main__ import main
from data_pipeline.runner import PipelineConfig, ShardTask, process_shard
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.sources.grit import GritSource
from data_pipeline.verification import verify_shards


@pytest.fixture
def dataset(grit, tmp_path):
    """Two shards of two samples of two regions; a phrase and a sample were rejected in each."""
    for index in range(2):
        bad = grit.sample(f"{index}2", ref_exps=[*grit.ref_exps, [0, 9, 0.5, 0.5, 0.1, 0.1, 1.0]])
        lost = grit.sample(f"{index}3", ref_exps=[], noun_chunks=[])
        path = grit.tar(tmp_path / f"{index}.tar", grit.sample(f"{index}1"), bad, lost)
        config = PipelineConfig(GritSource(), BoxSegmenter())
        process_shard(ShardTask(str(path), index), tmp_path / "shards", config)
    return tmp_path / "shards"


def change(dataset, **changes):
    """Change the first manifest."""
    file = dataset / "00000.done.json"
    record = {**json.loads(file.read_text()), **changes}
    file.unlink()
    file.write_text(json.dumps(record))
    return record


def tar_of(dataset, index=0):
    return dataset / json.loads((dataset / f"0000{index}.done.json").read_text())["tar"]


@pytest.mark.parametrize("workers", [1, 2])
def test_sound_shards(dataset, workers):
    found = verify_shards(dataset, workers)
    assert (found.shards, found.samples, found.regions) == (2, 4, 8)
    assert (found.rejected_samples, found.rejected_regions) == (2, 2)
    assert found.bytes == tar_of(dataset).stat().st_size + tar_of(dataset, 1).stat().st_size
    assert found.problems == found.unfinished == []


def test_a_changed_byte_anywhere(dataset):
    tar = tar_of(dataset)
    data = bytearray(tar.read_bytes())
    data[len(data) // 3] ^= 1
    tar.write_bytes(data)
    problems = verify_shards(dataset).problems
    assert any("00000.done.json" in p and "digest" in p for p in problems)


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_cut_shard(dataset, keep):
    tar = tar_of(dataset)
    tar.write_bytes(tar.read_bytes()[: int(keep * tar.stat().st_size)])
    assert any("bytes with digest" in p for p in verify_shards(dataset).problems)


def test_a_missing_shard_and_a_damaged_manifest(dataset):
    tar_of(dataset).unlink()
    (dataset / "00001.done.json").write_text("{")
    problems = verify_shards(dataset).problems
    assert len([p for p in problems if "the manifest or its shard can't be read" in p]) == 2


def test_counts_that_do_not_add_up(dataset):
    record = change(dataset, samples=3)
    problems = " ".join(verify_shards(dataset).problems)
    assert "2 samples and 4 regions can be read, the manifest says 3 and 4" in problems
    assert "3 samples came in, but 3 are there and 1 were rejected" in problems
    change(dataset, samples=2, input={**record["input"], "regions": 99})
    problems = " ".join(verify_shards(dataset).problems)
    assert "99 regions came in, but 4 are there and 1 were rejected" in problems


def test_rejects_that_are_not_listed(dataset):
    file = dataset / "00000.rejects.jsonl"
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n")
    (problem,) = verify_shards(dataset).problems
    assert "00000.rejects.jsonl lists" in problem
    file.unlink()
    (problem,) = verify_shards(dataset).problems
    assert "00000.rejects.jsonl can't be read" in problem


def test_a_shard_twice(dataset):
    record = json.loads((dataset / "00000.done.json").read_text())
    (dataset / "00002.done.json").write_text(json.dumps(record))
    (dataset / "00002.rejects.jsonl").write_text((dataset / "00000.rejects.jsonl").read_text())
    (problem,) = verify_shards(dataset).problems
    assert problem == "00002.done.json: 2 keys occur before, in it or in another shard"


def test_shards_of_other_settings(dataset):
    change(dataset, config_hash="other")
    (problem,) = verify_shards(dataset).problems
    assert "made with 2 settings: 1 like 00000.done.json, 1 like 00001" in problem


def test_what_is_not_finished_is_no_problem(dataset):
    (dataset / "00007-12345678.tar").write_bytes(b"half")
    (dataset / "00007.rejects.jsonl").write_text("")
    found = verify_shards(dataset)
    assert found.unfinished == ["00007-12345678.tar", "00007.rejects.jsonl"]
    assert found.problems == []


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no finished shards"):
        verify_shards(tmp_path)


def test_the_command(dataset, capsys):
    assert main(["verify", "--input", str(dataset), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "samples          4" in out
    assert out.endswith("sound\n")
    tar_of(dataset).write_bytes(b"")
    assert main(["verify", "--input", str(dataset), "--workers", "1"]) == 1
    printed = capsys.readouterr()
    assert "3 problems" in printed.out
    assert "bytes with digest" in printed.err
    assert main(["verify", "--input", str(dataset / "nothing")]) == 2
