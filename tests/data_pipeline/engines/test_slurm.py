"""The SLURM engine: tasks of an array share the shards out, whenever each of them starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.engines.local import LocalEngine
from data_pipeline.engines.slurm import SlurmEngine, place_in_array
from data_pipeline.planning import plan
from data_pipeline.runner import PipelineConfig, ShardTask
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.shards import read_manifests
from data_pipeline.sources.grit import GritSource

BOXES = PipelineConfig(GritSource(), BoxSegmenter())


def array_task(task, first=0, last=3, step=1, **changes):
    """What SLURM tells a task of `--array=first-last:step`; of 0-99:2, that 98 is the last."""
    ids = range(first, last + 1, step)
    numbers = {"ID": task, "MIN": first, "MAX": ids[-1], "STEP": step, "COUNT": len(ids)}
    environ = {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}
    return {**environ, **{f"SLURM_{name}": str(value) for name, value in changes.items()}}


def step_task(rank, count):
    return {"PROCID": rank, "NTASKS": count, "STEP_NUM_TASKS": count}


@pytest.fixture
def slurm(monkeypatch):
    """Puts this process into a SLURM job."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def enter(environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)

    return enter


@pytest.fixture
def inputs(grit, tmp_path):
    """Five tars, the second of which is none; one picture in each is missing."""
    paths = [
        grit.tar(tmp_path / f"{i}.tar", grit.sample(f"{i}1"), grit.sample(f"{i}2")[1:])
        for i in range(5)
    ]
    paths[1].write_bytes(b"no tar")
    return [str(path) for path in paths]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (array_task(0), (0, 4)),
        (array_task(3), (3, 4)),
        (array_task(5, 5, 24), (0, 20)),
        (array_task(24, 5, 24), (19, 20)),
        (array_task(98, 0, 99, 2), (49, 50)),
        (array_task(7, 7, 7), (0, 1)),
        (array_task(2, 0, 3, **step_task(1, 4)), (9, 16)),
        (array_task(2, 0, 3, **step_task(0, 1)), (2, 4)),
        (array_task(2, 0, 3, NTASKS=4, STEP_NUM_TASKS=1, PROCID=0), (2, 4)),  # srun --ntasks=1
        (array_task(2, 0, 3, NTASKS=1, PROCID=0), (2, 4)),  # without srun
    ],
)
def test_place_in_array(environ, place):
    assert place_in_array(environ) == place


@pytest.mark.parametrize(
    ("environ", "match"),
    [
        ({}, "this is none; submit `sbatch configs/data/slurm/grit.sbatch`, or leave out"),
        ({"SLURM_JOB_ID": "9", "SLURM_PROCID": "0"}, "this is none"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_MIN must be a number from 0.* got ''"),
        (array_task("three"), "SLURM_ARRAY_TASK_ID must be a number from 0.* got 'three'"),
        (array_task("-1"), "got '-1'"),
        (array_task("٣"), "SLURM_ARRAY_TASK_ID must be a number"),
        (array_task(0) | {"SLURM_ARRAY_TASK_STEP": "0"}, "in steps of 0"),
        (array_task(1) | {"SLURM_ARRAY_TASK_MAX": "7"}, "4 tasks from 0 to 7.*range without gaps"),
        (array_task(4), "is 4, but the array goes from 0 to 3"),
        (array_task(4, 5, 24), "is 4, but the array goes from 5 to 24"),
        (array_task(3, 0, 8, 2), "is 3, but the array goes from 0 to 8 in steps of 2"),
        (array_task(0, **step_task(2, 2)), "SLURM_PROCID is 2, but the job step has 2 tasks"),
        (array_task(0, STEP_NUM_TASKS=2), "SLURM_PROCID must be a number"),
        (array_task(0, STEP_NUM_TASKS=0, PROCID=0), "SLURM_PROCID is 0, but the job step has 0"),
        (array_task(0, NTASKS=4, PROCID=0), "has 4 tasks, but this is none of them; .* with srun"),
    ],
)
def test_other_places_are_refused(environ, match):
    with pytest.raises(ValueError, match=match):
        place_in_array(environ)


@pytest.mark.parametrize(("first", "last", "step", "tasks"), [(0, 3, 1, 1), (5, 12, 3, 2)])
def test_shares_are_disjoint_and_together_everything(slurm, first, last, step, tasks):
    everything = [ShardTask(f"{index}.tar", index) for index in range(50)]
    shares = []
    for task in range(first, last + 1, step):
        for rank in range(tasks):
            slurm(array_task(task, first, last, step, **step_task(rank, tasks)))
            shares.append(SlurmEngine().share(everything))
    assert sorted((t for share in shares for t in share), key=lambda t: t.index) == everything
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_share_does_not_depend_on_what_is_done_already(slurm):
    everything = [ShardTask(f"{index}.tar", index) for index in range(20)]
    slurm(array_task(2))
    share = SlurmEngine().share(everything)
    assert SlurmEngine().share(everything[7:]) == [task for task in share if task.index >= 7]


def test_share_outside_slurm_is_refused(slurm):
    with pytest.raises(ValueError, match="this is none"):
        SlurmEngine().share([])


def test_attempts_are_those_of_the_local_engine():
    with pytest.raises(ValueError, match="expected attempts >= 1"):
        SlurmEngine(attempts=0)


def test_array_makes_the_same_bytes_as_the_local_engine(slurm, inputs, tmp_path):
    local, out = tmp_path / "local", tmp_path / "out"
    list(LocalEngine().run(plan(inputs, local, BOXES), local, BOXES, 1))
    engine, found, samples = SlurmEngine(), [], []
    for task in (7, 5, 6):
        slurm(array_task(task, 5, 7))
        share = engine.share(plan(inputs, out, BOXES))
        outcomes = list(engine.run(share, out, BOXES, 1, samples.append))
        assert [outcome.task for outcome in outcomes] == share
        found += [outcome.task.index for outcome in outcomes]
    assert found == [2, 0, 3, 1, 4]
    assert sum(samples) == 4 * 2
    assert set(read_manifests(out)) == {"00000", "00002", "00003", "00004"}
    assert contents(out) == contents(local)
    slurm(array_task(0, 0, 0))  # submitted again, in another size
    assert [task.index for task in engine.share(plan(inputs, out, BOXES))] == [1]


@pytest.mark.slow
def test_script_runs_its_share_and_hands_on_the_exit_code(slurm, inputs, tmp_path, repo):
    """The script itself, with stand-ins for srun and for the installed command."""
    tools = {
        "srun": 'test "$1" = --cpus-per-task=4; shift; export SLURM_STEP_NUM_TASKS=1; exec "$@"',
        "alpha-clip-data": f'exec {sys.executable} -m data_pipeline "$@"',
    }
    for name, line in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\nset -e\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_PROCID": "0"}
    out = tmp_path / "out"

    def submit(task, *changes):
        command = ["bash", "configs/data/slurm/grit.sbatch", *changes, "--output", str(out)]
        environ.update(array_task(task, 0, 1, CPUS_PER_TASK=4))
        return subprocess.run(command, cwd=repo, env=environ, capture_output=True, text=True)

    boxes = ["--segmenter", "data_pipeline.segmenters.box.BoxSegmenter"]
    boxes += ["--input", str(Path(inputs[0]).parent / "*.tar")]
    second, first = submit(1, *boxes), submit(0, *boxes)
    assert (second.returncode, first.returncode) == (0, 0), second.stderr + first.stderr
    assert set(read_manifests(out)) == {"00000", "00002", "00003", "00004"}
    missing = submit(0, "--input", str(tmp_path / "nothing-*.tar"))
    assert missing.returncode == 2
    assert "no file matches" in missing.stderr


def test_script_asks_for_what_a_task_needs(repo):
    lines = (repo / "configs/data/slurm/grit.sbatch").read_text().splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH --")
    )
    assert asked["gpus"] == "1"
    assert {"array", "requeue", "time", "output"} <= asked.keys()
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])  # sbatch reads no further
