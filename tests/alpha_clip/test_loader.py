"""A stopped training stream goes on exactly where its state was taken."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from alpha_clip.batches import Collate, RegionBatch
from alpha_clip.datasets import RegionShards
from alpha_clip.drops import Drops
from alpha_clip.loader import TrainingBatches
from alpha_clip.model import AlphaClip
from alpha_clip.reader import find_shards
from alpha_clip.regions import RegionSample
from alpha_clip.sampling import Sampling
from alpha_clip.streams import Mark, Place, Reader, ShardSet, endless
from alpha_clip.transforms import RegionAugment

MakeSample = Callable[..., RegionSample]


@pytest.fixture
def sets(
    tmp_path: Path, make_sample: MakeSample, write_shards: Callable[..., Any]
) -> list[ShardSet]:
    """Two data sets, of 5 x 3 and 2 x 4 samples with captions of their own; one does not decode."""

    def sample(name: str, number: int) -> RegionSample:
        plain = make_sample(str(number), (("red", "blue"), ("green", "red"))[number % 2])
        regions = tuple(replace(r, span=None) for r in plain.regions)
        return replace(plain, caption=f"{name} {number}", source=name, regions=regions)

    first = [[sample("a", 3 * i + j) for j in range(3)] for i in range(5)]
    first[2][1] = replace(first[2][1], jpeg=first[2][1].jpeg[:-300])
    second = [[sample("b", 4 * i + j) for j in range(4)] for i in range(2)]
    found = []
    for name, shards, weight in (("a", first, 1.0), ("b", second, 2.0)):
        write_shards(tmp_path / name, *shards)
        found.append(ShardSet(tuple(find_shards([str(tmp_path / name)])), weight))
    return found


def batches(
    model: AlphaClip, sets: list[ShardSet], workers: int, rank: int = 0, world: int = 1
) -> TrainingBatches:
    augment = RegionAugment(16, scale=(0.4, 1.0), flip=0.5)
    drops = Drops(max(1, workers))
    data = RegionShards(sets, augment, Sampling(2, 0.3), 7, 5, rank=rank, world=world, drops=drops)
    return TrainingBatches(data, 2, workers, Collate(model.tokenizer))


def content(batch: RegionBatch) -> list[torch.Tensor]:
    return [batch.rgb, batch.alphas, batch.phrase_ids, batch.image_ids, batch.whole]


def same(one: RegionBatch, other: RegionBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(content(one), content(other), strict=True))


@pytest.mark.parametrize("hold", [1, 4, 100])
@pytest.mark.parametrize("reader", [Reader(0, 1), Reader(1, 2), Reader(5, 6)])
def test_from_any_place_the_stream_goes_on_as_if_never_stopped(
    sets: list[ShardSet], reader: Reader, hold: int
) -> None:
    def take(start: Place, count: int) -> list[tuple[str, Place]]:
        samples = endless(sets, reader, Drops(), [3], hold, start)
        return [(s.caption, place) for s, place in islice(samples, count)]

    whole = take(Place(), 90)
    assert len({caption for caption, _ in whole}) > 5
    for stop in range(0, 60, 7):
        place = whole[stop][1]
        assert Place.of(json.loads(json.dumps(place.numbers()))) == place
        assert take(place, 25) == whole[stop + 1 : stop + 26]


def test_a_window_holds_no_more_than_a_readers_part_of_a_pass(sets: list[ShardSet]) -> None:
    """So a pass gives every sample once, also where the data are smaller than the window."""
    samples = endless(sets[:1], Reader(), Drops(), [3], 1000)
    seen = [sample.caption for sample, _ in islice(samples, 45)]
    for turn in range(3):
        assert len(set(seen[15 * turn : 15 * turn + 15])) == 15


def test_going_on_reads_a_window_again_and_not_the_pass(
    sets: list[ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alpha_clip import streams

    place = list(islice(endless(sets[:1], Reader(), Drops(), [3], 2), 12))[-1][1]
    assert place.marks[0].turn == 0
    read = []
    whole = streams.read_samples

    def counted(shard: Any, *more: Any) -> Any:
        read.append(shard.file)
        return whole(shard, *more)

    monkeypatch.setattr(streams, "read_samples", counted)
    next(endless(sets[:1], Reader(), Drops(), [3], 2, place))
    assert len(read) <= 2  # of the five shards


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("stop", [0, 1, 4, 11])
def test_a_loader_goes_on_from_its_state(
    model: AlphaClip, sets: list[ShardSet], workers: int, stop: int
) -> None:
    straight = list(islice(batches(model, sets, workers), stop + 5))
    stopped = batches(model, sets, workers)
    for batch in islice(stopped, stop):
        stopped.took(batch)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = batches(model, sets, workers)
    waiting = iter(resumed)  # Lightning asks for the iterator before it loads the state
    resumed.load_state_dict(state)
    for expected, batch in zip(straight[stop:], waiting, strict=False):
        assert same(expected, batch)


def test_what_was_read_ahead_is_not_lost(model: AlphaClip, sets: list[ShardSet]) -> None:
    """Workers are several batches ahead of what is trained on."""
    straight = list(islice(batches(model, sets, 2), 6))
    loader = batches(model, sets, 2)
    for first in (0, 2, 4):  # three short epochs
        for expected, batch in zip(straight[first : first + 2], loader, strict=False):
            assert same(expected, batch)
            loader.took(batch)


def test_another_number_of_workers_begins_anew_with_a_word(
    model: AlphaClip, sets: list[ShardSet], caplog: pytest.LogCaptureFixture
) -> None:
    loader = batches(model, sets, 0)
    first = next(iter(loader))
    loader.took(first)
    other = batches(model, sets, 2)
    with caplog.at_level("WARNING", "alpha_clip.loader"):
        other.load_state_dict(loader.state_dict())
    assert "[1, 0] processes x workers and 2 data sets, this run has [1, 2] and 2" in caplog.text
    plain = batches(model, sets, 2)
    assert not same(next(iter(other)), next(iter(plain)))


def test_a_step_of_one_region_is_refused(model: AlphaClip, sets: list[ShardSet]) -> None:
    def loader(regions: int) -> TrainingBatches:
        sampling = Sampling(regions, 0.1)
        data = RegionShards(sets, RegionAugment(16), sampling, seed=0, shuffle=4)
        return TrainingBatches(data, 1, 0, Collate(model.tokenizer))

    assert len(loader(2)) == 23
    with pytest.raises(ValueError, match="at least two regions to tell apart"):
        loader(1)


def test_more_workers_than_images_are_refused(model: AlphaClip, sets: list[ShardSet]) -> None:
    with pytest.raises(ValueError, match=r"8 images .* 12 readers \(2 processes x 6 workers\)"):
        batches(model, sets, 6, world=2)


def test_the_state_is_plain(model: AlphaClip, sets: list[ShardSet], tmp_path: Path) -> None:
    loader = batches(model, sets, 0)
    for batch in islice(loader, 3):
        loader.took(batch)
    torch.save(loader.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    assert state == loader.state_dict()
    assert state["taken"] == 3
    place = Place.of(state["places"][0][0])
    assert place.draws >= 6
    assert isinstance(place.marks[1], Mark)


_SCRIPT = """
import os, signal, sys, time
from torch.utils.data import DataLoader, Dataset
from alpha_clip.loader import start_worker

class Pids(Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        return os.getpid()

if __name__ == "__main__":
    batches = iter(DataLoader(Pids(), num_workers=1, worker_init_fn=start_worker))
    print(int(next(batches)), flush=True)
    sys.stdin.readline()
    print(int(next(batches)), flush=True)
"""


def test_a_script_that_ends_in_the_middle_ends_and_signals_of_others_do_not_end_its_readers(
    tmp_path: Path,
) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py")]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as script:
        assert script.stdin is not None
        assert script.stdout is not None
        try:
            worker = int(script.stdout.readline())
            for number in (signal.SIGTERM, signal.SIGINT):  # as a cluster or a terminal does
                os.kill(worker, number)
            rest, _ = script.communicate("\n", timeout=60)
        except BaseException:
            script.kill()
            raise
    assert int(rest) == worker
    assert script.returncode == 0
