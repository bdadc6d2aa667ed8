"""The benchmark of reading, with two pictures; and what the quick way of reading rests on."""

import csv
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as T

from alpha_clip.drops import Drops
from alpha_clip.reader import find_shards, read_samples
from alpha_clip.regions import decode_jpeg, decode_rle
from alpha_clip.transforms import RegionTransform
from benchmarks import reader as module
from benchmarks.pictures import write_shard
from benchmarks.reader import (
    EVALUATION,
    FLOOR,
    PUBLISHED,
    TRAINING,
    check_sample,
    each,
    published_way,
    reader,
    ways_to_read,
)
from benchmarks.timing import Measured

# pycocotools with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder, np.random.default_rng(0), 2)
    return folder


@pytest.fixture(scope="module")
def samples(folder):
    return [s for shard in find_shards([str(folder)]) for s in read_samples(shard, Drops())]


def test_table_and_picture_of_ways_and_stages(folder, tmp_path, capsys):
    output = tmp_path / "new" / "reader.csv"
    threads = torch.get_num_threads()
    rows = reader([str(folder)], samples=50, size=SIZE, rounds=2, budget_s=0, output=output)
    assert torch.get_num_threads() == threads
    with output.open() as stream:
        written = list(csv.DictReader(stream))
    assert [(w["case"], w["variant"]) for w in written] == [(r.case, r.variant) for r in rows]
    assert output.with_suffix(".png").stat().st_size > 10_000
    ways, stages = (
        {row.variant: row for row in rows if (row.case.startswith("2 images")) == first}
        for first in (True, False)
    )
    assert list(ways)[1:] == [PUBLISHED, "ours, 1 region an image", TRAINING, EVALUATION]
    first, *_, rest, floor = stages
    assert (first, rest, floor) == ("all", "the rest", FLOOR)
    assert stages["all"].of_floor == pytest.approx(stages[FLOOR].ratio)
    assert not any(row.of_floor for row in rows if row.variant != "all")
    assert all(row.per_second == pytest.approx(1000 / row.milliseconds) for row in ways.values())
    told = capsys.readouterr().out.splitlines()
    rate = 1000 / ways[TRAINING].milliseconds
    assert f"{TRAINING}: {rate:.0f} regions/s, {rate / 4:.0f} images/s a core" in told
    assert "2 x required" in told[-1]


def test_the_last_line_is_the_ratio_of_neighbours(capsys):
    times = {"x": [1.0] * 3, PUBLISHED: [4.0, 8.0, 6.0], TRAINING: [1.0, 2.0, 1.0]}
    module._tell(Measured("case", {**times, EVALUATION: [2.0, 2.0, 3.0]}))
    assert capsys.readouterr().out.endswith(
        "4.0 x the regions/s of the published script in training, 2.0 x with the same work; "
        "2 x required: reached\n"
    )
    module._tell(Measured("case", {**times, EVALUATION: [2.1, 4.1, 3.1]}))
    assert capsys.readouterr().out.endswith("2 x required: NOT reached\n")


def test_times_are_those_of_a_region(monkeypatch):
    clock = iter([10.0, 16.0, 10.0, 16.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    assert each(lambda: iter([4, 4])) == 0.75
    assert each(lambda: iter([4, 4]), 4) == 3


def test_ways_make_as_many_regions_as_they_say(folder):
    ways = ways_to_read(find_shards([str(folder)]), SIZE, 2)
    assert [list(way()) for way in ways.values()] == [[1, 1], [1, 1], [1, 1], [4, 4], [4, 4]]


def test_both_ways_give_the_same(samples):
    for sample in samples:
        check_sample(sample, 224)


WRONG = {
    "colours swapped": (lambda rgb, alpha: (rgb.flip(0), alpha), "colour"),
    "mirrored": (lambda rgb, alpha: (rgb.flip(-1), alpha), "colour"),
    "another mask": (lambda rgb, alpha: (rgb, alpha.flip(-1)), "alpha"),
    "not a number": (lambda rgb, alpha: (rgb * torch.nan, alpha), "colour"),
}


@pytest.mark.parametrize(("damage", "part"), WRONG.values(), ids=WRONG.keys())
def test_another_picture_is_refused(monkeypatch, samples, damage, part):
    monkeypatch.setattr(module, "published_way", lambda *given: damage(*published_way(*given)))
    with pytest.raises(ValueError, match=f"disagree about {part}: expected .* below 0.02"):
        check_sample(samples[0], SIZE)


def test_upright_pictures_are_compared_inside_their_padding(samples):
    image = decode_jpeg(samples[0].jpeg).crop((0, 0, 200, 480))
    mask = decode_rle(samples[0].regions[0].rle)[:, :200]
    mask[200:300, 50:150] = True
    rgb, alphas = RegionTransform(SIZE, geometry="pad").many(image, [mask])
    wide = T.rotate(torch.cat([rgb, alphas[0]]), 90, expand=True)
    module._check_same((rgb, alphas[0]), (rgb, alphas[0]), 200 / 480)
    with pytest.raises(ValueError, match="colour"):
        module._check_same((rgb, alphas[0]), (wide[:3], alphas[0]), 200 / 480)


@pytest.mark.parametrize("option", [{"samples": 0}, {"size": 15}, {"rounds": 1}])
def test_numbers_too_small_are_refused(option, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be at least"):
        reader(output=tmp_path / "reader.csv", **option)


def test_stages_are_those_of_the_reader(folder):
    spent = module.stages(find_shards([str(folder)]), 2, SIZE)
    assert [*spent][:2] == ["tar", "JSON and checks"]
    assert [*spent][-1] == "normalise"
    assert min(spent.values()) > 0


def test_stages_may_take_longer_than_the_whole(folder):
    timed = partial(module.measure, rounds=2, device="cpu", items=1)
    rows = module._stage_rows(timed, lambda: iter([4]), find_shards([str(folder)]), 2, SIZE)
    (rest,) = (row for row in rows if row.variant == "the rest")
    assert rest.milliseconds == pytest.approx(0, abs=1e-5)


def test_shards_without_a_sound_sample_are_refused(folder):
    shards = [replace(shard, file=folder / "missing.tar") for shard in find_shards([str(folder)])]
    with pytest.raises(ValueError, match=r"expected sound samples.*lost_in_tar': 2"):
        module._sound(shards, 1)


def test_shards_without_pictures_are_refused(folder):
    (shard,) = find_shards([str(folder)])
    with pytest.raises(ValueError, match=r"holds no pictures.*layout: tar"):
        module._sound([replace(shard, pictures="elsewhere.tar")], 1)
