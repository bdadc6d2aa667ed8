"""Nothing is lost, nothing is there twice, whatever moment a worker is killed at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from alpha_clip.drops import Drops
from alpha_clip.reader import find_shards, read_samples
from data_pipeline.runner import PipelineConfig, ShardTask, process_shard
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.sources.grit import GritSource
from data_pipeline.verification import verify_shards

SHARDS, SAMPLES = 24, 6


@pytest.fixture(scope="module")
def inputs(grit, tmp_path_factory):
    """Tars of some pictures; in each, one sample and one phrase are bad."""
    folder = tmp_path_factory.mktemp("inputs")
    paths = []
    for i in range(SHARDS):
        samples = [grit.sample(f"{i:05d}{j:04d}") for j in range(SAMPLES)]
        samples.append(grit.sample(f"{i:05d}{SAMPLES:04d}", b"no picture"))
        bad = [*grit.ref_exps, [0, 9, 0.5, 0.5, 0.1, 0.1, 1.0]]
        samples.append(grit.sample(f"{i:05d}{SAMPLES + 1:04d}", ref_exps=bad))
        paths.append(str(grit.tar(folder / f"{i:05d}.tar", *samples)))
    return paths


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "kills"), [("tar", 100), ("sidecar", 50)])
def test_killed_at_random_moments(inputs, tmp_path, layout, kills):
    script = Path(__file__).with_name("kill_race.py")
    pattern = str(Path(inputs[0]).parent / "*.tar")
    command = [sys.executable, str(script), pattern, str(tmp_path), layout, str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["killed"] >= kills
    assert result["failed"] == 0, done.stderr
    config = PipelineConfig(GritSource(), BoxSegmenter(), layout=layout)
    for index, path in enumerate(inputs):
        process_shard(ShardTask(path, index), tmp_path / "alone", config)
    expected = contents(tmp_path / "alone")
    for folder in map(Path, result["folders"]):
        assert contents(folder) == expected
        assert [p.name for p in (folder / ".tmp").iterdir()] == ["lock"]
        found = verify_shards(folder)
        assert (found.problems, found.unfinished) == ([], [])
        assert (found.shards, found.samples) == (SHARDS, SHARDS * (SAMPLES + 1))
        assert (found.rejected_samples, found.rejected_regions) == (SHARDS, SHARDS * 3)
        drops = Drops()
        keys = [s.key for shard in find_shards([str(folder)]) for s in read_samples(shard, drops)]
        assert len(set(keys)) == len(keys) == SHARDS * (SAMPLES + 1)
        assert not drops.counts()
