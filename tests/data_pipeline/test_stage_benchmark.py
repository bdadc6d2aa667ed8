"""`grit --benchmark`: every stage timed, nothing kept, and the arithmetic of the projection."""

import re

import pytest

from data_pipeline.__main__ import main
from data_pipeline.runner import PipelineConfig
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.sources.grit import GritSource
from data_pipeline.stage_benchmark import STAGES, StageReport, benchmark_stages

BOXES = PipelineConfig(GritSource(), BoxSegmenter())


@pytest.fixture
def inputs(grit, tmp_path):
    return [
        str(grit.tar(tmp_path / f"{i}.tar", *(grit.sample(f"{i}{j}") for j in range(4)), BAD))
        for i in range(2)
    ]


BAD = [("9.jpg", b"no picture"), ("9.json", b'{"caption": "a", "ref_exps": []}')]


def test_every_stage_is_timed_over_as_many_samples_as_asked(inputs):
    report = benchmark_stages(inputs, BOXES, images=7, project_images=1000)
    assert (report.images, report.kept, report.regions) == (7, 6, 12)
    assert set(report.seconds) == set(STAGES)
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert sum(report.seconds.values()) < report.wall_s
    assert report.bytes > 0


def test_more_than_there_is_takes_what_there_is(inputs):
    assert benchmark_stages(inputs, BOXES, images=500, project_images=1).images == 10


def test_the_numbers_of_the_table_add_up():
    seconds = dict.fromkeys(STAGES, 0.1) | {"segment": 1.5}
    report = StageReport(100, 400, 100, seconds, 2.0, 5_000_000, 3_600_000)
    lines = str(report).splitlines()
    assert lines[0] == "100 pictures, 100 kept with 400 regions; one process"
    assert lines[4].split() == ["segment", "15.00", "66.7", "75%"]
    assert lines[-3].split() == ["all", "20.00", "50.0", "100%"]
    assert lines[-2].split() == ["all", "but", "segment", "5.00", "200.0", "25%"]
    assert lines[-1] == (
        "3,600,000 such pictures: 20.0 hours on one worker, 2.5 on eight; 180.0 GB"
    )


def test_the_command_draws_pictures_if_it_is_given_none(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    box = ("--segmenter", "data_pipeline.segmenters.box.BoxSegmenter")
    assert main(["grit", "--benchmark", "--benchmark_images", "2", *box]) == 0
    out = capsys.readouterr().out
    assert "2 pictures, 2 kept with 8 regions" in out
    assert re.search(r"20,000,000 such pictures: [\d,.]+ hours on one worker", out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-5, 1)])
def test_nonsense_numbers_are_refused(inputs, numbers):
    with pytest.raises(ValueError, match="must be at least 1"):
        benchmark_stages(inputs, BOXES, *numbers)


def test_nothing_to_time_is_refused(grit, tmp_path):
    import io
    import tarfile

    buffer = io.BytesIO()
    tarfile.open(fileobj=buffer, mode="w").close()
    (tmp_path / "empty.tar").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"empty\.tar and what follows hold no sample"):
        benchmark_stages([str(tmp_path / "empty.tar")], BOXES, 5, 5)
