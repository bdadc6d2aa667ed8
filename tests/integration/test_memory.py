"""A run's memory is that of a shard, however many there are."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
from pathlib import Path
from data_pipeline.planning import RunSummary, plan
from data_pipeline.engines.local import LocalEngine
from data_pipeline.runner import PipelineConfig
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.sources.grit import GritSource

inputs = [sys.argv[1]] * int(sys.argv[3])
output, summary = Path(sys.argv[2]), RunSummary()
config = PipelineConfig(GritSource(), BoxSegmenter())
peaks = []
for outcome in LocalEngine().run(plan(inputs, output, config), output, config, 1):
    summary.add(outcome.manifest)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(summary.shards, peaks[len(peaks) // 8], peaks[-1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_shards(grit, tmp_path):
    """After the first eighth of 80 shards of 3 MB each, the peak stays where it is."""
    samples = [
        grit.sample(str(i), grit.encode(grit.image(480, 640, i), quality=98)) for i in range(25)
    ]
    path = grit.tar(tmp_path / "in.tar", *samples)
    command = [sys.executable, "-c", CODE, str(path), str(tmp_path / "out"), "80"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    shards, early, late = (int(word) for word in run.stdout.split())
    assert shards == 80
    assert late - early < 8_000, f"{early} kB after 10 shards, {late} kB after 80"
