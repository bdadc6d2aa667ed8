"""The Ray engine: the same bytes as the local one, and no shard lost with an actor."""

import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from data_pipeline.engines.base import ignore
from data_pipeline.engines.local import LocalEngine
from data_pipeline.engines.ray import RayEngine, _Maker
from data_pipeline.planning import plan
from data_pipeline.runner import PipelineConfig, ShardTask
from data_pipeline.segmenters.base import Segmenter
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.shards import ShardManifest, read_manifests
from data_pipeline.sources.base import StorageError
from data_pipeline.sources.grit import GritSource

ray = pytest.importorskip("ray")
BOXES = PipelineConfig(GritSource(), BoxSegmenter())
FATAL_WIDTH = 90  # of the pictures in shard 2
STORE = 80 * 2**20  # the least that Ray takes


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@dataclass(frozen=True)
class Mortal(Segmenter):
    """Fills boxes; on wide pictures its process dies, `deaths` times in all."""

    notes: str
    deaths: int

    def segment(self, rgb, boxes_xyxy_px):
        died = len(list(Path(self.notes).glob("death-*")))
        if rgb.shape[1] == FATAL_WIDTH and died < self.deaths:
            Path(self.notes, f"death-{died}").touch()
            os._exit(9)
        return BoxSegmenter().segment(rgb, boxes_xyxy_px)


@dataclass(frozen=True)
class Patient(Segmenter):
    """Fills boxes; notes who works where on which picture; on wide ones it waits for a sign."""

    notes: str
    width: int = 0

    def load(self):
        Path(self.notes, f"load{os.getpid()}").touch()

    def segment(self, rgb, boxes_xyxy_px):
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        Path(self.notes, f"{rgb.sum()}-{os.getpid()}").write_text(gpus)
        if rgb.shape[1] >= self.width:
            wait_for(Path(self.notes, "go").exists)
        return BoxSegmenter().segment(rgb, boxes_xyxy_px)


@dataclass(frozen=True)
class Weightless(Segmenter):
    """Has no weights to load, or dies of trying."""

    dies: bool = False

    def load(self):
        if self.dies:
            os._exit(9)
        raise ValueError("nowhere.pth does not exist")

    def segment(self, rgb, boxes_xyxy_px):
        raise NotImplementedError


@dataclass(frozen=True)
class Breaks(Segmenter):
    """Fails as a device fails."""

    def segment(self, rgb, boxes_xyxy_px):
        raise RuntimeError("CUDA error: device lost")


@dataclass(frozen=True)
class Unreachable(GritSource):
    """Lies in a storage that fails for shard 2."""

    def read(self, shard):
        if Path(shard).name == "2.tar":
            raise StorageError("connection reset")
        return super().read(shard)


class Idle:
    """Somebody else's actor."""

    def wait(self):
        pass


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two CPU cores and, as far as Ray can tell, two GPUs, to be connected to."""
    from ray.cluster_utils import Cluster

    with (
        pytest.MonkeyPatch.context() as patch,
        TemporaryDirectory() as folder,  # sockets lie there, so its name must be short
    ):
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        here = str(Path(__file__).parent)
        patch.setenv("PYTHONPATH", here, prepend=os.pathsep)  # actors find the classes above
        patch.delenv("RAY_ADDRESS", raising=False)
        quick = {"health_check_period_ms": 200, "health_check_failure_threshold": 5}
        size = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": STORE}
        nodes = Cluster(True, head_node_args={"_system_config": quick, **size})
        try:
            yield nodes
        finally:
            nodes.shutdown()


@pytest.fixture
def engine(cluster):
    yield RayEngine(cluster.address, gpus_per_actor=0, attempts=2)
    ray.shutdown()


@pytest.fixture
def inputs(grit, tmp_path, monkeypatch):
    """Four tars in a folder we are in, the second of which is none; one picture is missing."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    paths = [f"in/{index}.tar" for index in range(4)]
    for index, path in enumerate(paths):
        wide = grit.encode(grit.image(width=FATAL_WIDTH)) if index == 2 else None
        samples = [grit.sample(f"{index}{key}", wide) for key in range(3)]
        grit.tar(Path(path), *samples, grit.sample(f"{index}9")[1:])
    Path(paths[1]).write_bytes(b"no tar")
    return paths


def run(engine, inputs, output, config=BOXES, workers=0, tick=ignore):
    outcomes = list(engine.run(plan(inputs, output, config), output, config, workers, tick))
    found = {outcome.task.index: outcome for outcome in outcomes}
    assert len(found) == len(outcomes)
    return found


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_same_bytes_and_outcomes_as_the_local_engine(engine, inputs):
    before = dict(os.environ)
    local = run(LocalEngine(), inputs, Path("local"), workers=1)
    samples = []
    found = run(engine, inputs, Path("ray"), tick=samples.append)
    assert sum(samples) == 3 * 4
    assert contents(Path("ray")) == contents(Path("local"))
    for index, outcome in found.items():
        assert (outcome.task, outcome.manifest) == (local[index].task, local[index].manifest)
        assert outcome.bad_input == local[index].bad_input
        assert outcome.failure is None
        assert outcome.seconds.keys() == local[index].seconds.keys()
    assert set(found) == {0, 1, 2, 3}
    assert "1.tar is no readable tar" in found[1].bad_input
    manifests = read_manifests(Path("ray"))
    assert manifests["00002"].input["path"] == "in/2.tar"
    assert manifests["00002"].rejects == {"missing_image": 1}
    assert not ray.is_initialized()
    assert os.environ.get("RAY_USAGE_STATS_ENABLED") == before.get("RAY_USAGE_STATS_ENABLED")


def test_every_actor_has_a_gpu_of_its_own(cluster, inputs, tmp_path):
    config = PipelineConfig(GritSource(), Patient(str(tmp_path)))

    def go_when_two_are_at_work():
        wait_for(lambda: len(list(tmp_path.glob("*-*"))) == 2)
        (tmp_path / "go").touch()

    with ThreadPoolExecutor(1) as thread:
        gone = thread.submit(go_when_two_are_at_work)
        run(RayEngine(cluster.address), inputs, Path("out"), config)
        gone.result()
    assert {note.read_text() for note in tmp_path.glob("*-*")} == {"0", "1"}


def test_shard_of_an_actor_that_died_is_made_by_another(engine, inputs, tmp_path):
    config = PipelineConfig(GritSource(), Mortal(str(tmp_path), deaths=1))
    found = run(engine, inputs, Path("ray"), config)
    assert Path("death-0").exists()
    assert [index for index, outcome in sorted(found.items()) if outcome.manifest] == [0, 2, 3]
    run(LocalEngine(), inputs, Path("local"), config, workers=1)
    assert contents(Path("ray")) == contents(Path("local"))


def test_shard_that_always_kills_is_given_up_and_others_are_made(engine, inputs, tmp_path):
    config = PipelineConfig(GritSource(), Mortal(str(tmp_path), deaths=99))
    found = run(engine, inputs, Path("out"), config, workers=1)
    assert found[2].manifest is None
    assert found[2].failure == "its actor was lost (ActorDiedError; out of memory?), 2 times"
    assert set(read_manifests(Path("out"))) == {"00000", "00003"}
    assert len(list(tmp_path.glob("death-*"))) == 2


def test_shard_whose_storage_fails_is_given_up_and_others_are_made(engine, inputs):
    found = run(engine, inputs, Path("out"), PipelineConfig(Unreachable(), BoxSegmenter()), 1)
    assert found[2].failure == "connection reset, 2 times"
    assert set(read_manifests(Path("out"))) == {"00000", "00003"}


def test_missing_weights_stop_the_run_before_any_work(engine, inputs):
    with pytest.raises(ValueError, match=r"^nowhere.pth does not exist$") as error:
        run(engine, inputs, Path("out"), PipelineConfig(GritSource(), Weightless()), 1)
    assert error.type is ValueError
    assert not Path("out").exists()


def test_actors_that_die_while_loading_stop_the_run(engine, inputs):
    config = PipelineConfig(GritSource(), Weightless(dies=True))
    with pytest.raises(RuntimeError, match="died 2 times before it could work"):
        run(engine, inputs, Path("out"), config, workers=1)
    assert not Path("out").exists()


def test_systemic_error_stops_the_run_as_itself_and_commits_nothing(engine, inputs):
    with pytest.raises(RuntimeError, match=r"^CUDA error: device lost$") as error:
        run(engine, inputs, Path("out"), PipelineConfig(GritSource(), Breaks()), 1)
    assert error.type is RuntimeError
    assert read_manifests(Path("out")) == {}


def test_output_that_is_not_shared_stops_the_run(engine, inputs, monkeypatch):
    monkeypatch.setattr(ShardManifest, "file", lambda manifest, folder: folder / "not-here.tar")
    with pytest.raises(OSError, match=r"made shard 0000\d, but it can't be seen here in .*out;"):
        run(engine, inputs, Path("out"), workers=1)


def test_connection_that_was_there_stays_and_actors_go(engine, cluster, inputs, tmp_path):
    config = PipelineConfig(GritSource(), Patient(str(tmp_path), FATAL_WIDTH))
    ray.init(cluster.address)
    outcomes = engine.run(plan(inputs, Path("out"), config), Path("out"), config, 2)
    assert sorted(next(outcomes).task.index for _ in range(3)) == [0, 1, 3]
    outcomes.close()  # the caller has had enough; shard 2 would wait for long
    assert ray.is_initialized()
    wait_for(lambda: ray.available_resources().get("CPU") == 2, seconds=20)


def test_actor_that_finds_no_place_holds_nobody_up(engine, cluster, inputs, tmp_path):
    config = PipelineConfig(GritSource(), Patient(str(tmp_path), 2 * FATAL_WIDTH))
    ray.init(cluster.address)
    other = ray.remote(num_cpus=1)(Idle).remote()
    ray.get(other.wait.remote())
    assert set(run(engine, inputs, Path("out"), config, workers=2)) == {0, 1, 2, 3}
    assert len(list(tmp_path.glob("load*"))) == 1  # when all is done, no other begins


@pytest.mark.slow
def test_shard_of_a_lost_node_is_made_on_another(engine, cluster, inputs, tmp_path):
    config = PipelineConfig(GritSource(), Patient(str(tmp_path)))
    tasks = [task for task in plan(inputs, Path("out"), config) if task.index != 1]
    ray.init(cluster.address)
    extra = cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=STORE)

    def lose_node_when_all_are_at_work():
        wait_for(lambda: len(list(tmp_path.glob("*-*"))) == 3)
        cluster.remove_node(extra, allow_graceful=False)
        wait_for(lambda: ray.cluster_resources().get("CPU") == 2)
        (tmp_path / "go").touch()

    with ThreadPoolExecutor(1) as thread:
        lost = thread.submit(lose_node_when_all_are_at_work)
        outcomes = list(engine.run(tasks, Path("out"), config, 3))
        lost.result()
    assert sorted(outcome.task.index for outcome in outcomes if outcome.manifest) == [0, 2, 3]
    begun = Counter(note.name.split("-")[0] for note in tmp_path.glob("*-*"))
    assert max(begun.values()) == 2


@pytest.mark.parametrize(
    ("changes", "workers", "room"),
    [({"gpus_per_actor": 3}, 0, 0), ({}, 3, 2), ({"cpus_per_actor": 2}, 2, 1)],
)
def test_more_actors_than_there_is_room_for_are_refused(cluster, inputs, changes, workers, room):
    engine = RayEngine(cluster.address, **{"gpus_per_actor": 0, **changes})
    with pytest.raises(ValueError, match=rf"\(2 GPUs, 2 cores\) has room for {room}; lower"):
        run(engine, inputs, Path("out"), workers=workers)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("gpus", "cpus", "room"),
    [(1, 1, 4), (0.5, 1, 8), (0.3, 1, 12), (0.1, 0, 40), (2, 1, 2), (3, 0, 1), (0, 0.1, 160)],
)
def test_room_on_a_node_of_four_gpus_and_sixteen_cores(gpus, cpus, room):
    engine = RayEngine(gpus_per_actor=gpus, cpus_per_actor=cpus)
    assert engine._room({"GPU": 4.0, "CPU": 16.0}) == room


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"attempts": 0}, "attempts"),
        ({"gpus_per_actor": 0, "cpus_per_actor": 0}, "nor both 0"),
        ({"gpus_per_actor": -1}, "negative"),
        ({"gpus_per_actor": 1.5}, "whole"),
    ],
)
def test_impossible_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        RayEngine(**settings)


@pytest.mark.parametrize("before", ["1", None])
def test_nothing_is_reported_to_anyone(inputs, monkeypatch, before):
    def init(address):
        assert (address, os.environ["RAY_USAGE_STATS_ENABLED"]) == (None, "0")
        raise ConnectionError("seen")

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    if before is None:
        monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionError, match="seen"):
        run(RayEngine(), inputs, Path("out"))
    assert os.environ.get("RAY_USAGE_STATS_ENABLED") == before


def test_missing_ray_names_the_extra(inputs, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'alpha-clip\[ray\]'"):
        run(RayEngine(), inputs, Path("out"))


def test_nothing_to_do_starts_nothing(tmp_path):
    assert list(RayEngine("nowhere:1").run([], tmp_path / "out", BOXES, 2)) == []


def test_what_a_node_does_not_see_stops_the_run(tmp_path):
    maker = _Maker(str(tmp_path / "nowhere"), tmp_path, BOXES)
    with pytest.raises(ValueError, match=r"can't enter .*nowhere.*that all nodes share"):
        maker.load()
    with pytest.raises(FileNotFoundError, match=r"does not see in/0\.tar"):
        maker.make(ShardTask("in/0.tar", 0), seen=True)
    assert maker.make(ShardTask("in/0.tar", 0), seen=False).bad_input  # nobody sees it
