import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alpha_clip.batches import Collate, LoadedSample, RegionBatch
from alpha_clip.data import DataSet, RegionDataModule
from alpha_clip.datasets import RegionShards
from alpha_clip.drops import Drops
from alpha_clip.model import AlphaClip
from alpha_clip.reader import find_shards
from alpha_clip.regions import RegionSample, decode_rle
from alpha_clip.sampling import Sampling
from alpha_clip.streams import ShardSet
from alpha_clip.transforms import RegionAugment, RegionTransform

MakeSample = Callable[..., RegionSample]


@pytest.fixture
def numbered(tmp_path: Path, make_sample: MakeSample, write_shards: Callable[..., Any]) -> Path:
    """Seven shards of two samples, each with a caption of its own."""

    def sample(number: int) -> RegionSample:
        plain = make_sample(str(number))
        regions = tuple(replace(r, span=None) for r in plain.regions)
        return replace(plain, caption=f"picture {number}", regions=regions)

    write_shards(tmp_path / "numbered", *[[sample(2 * i), sample(2 * i + 1)] for i in range(7)])
    return tmp_path / "numbered"


def stream(folder: Path, sampling: Sampling, **more: Any) -> RegionShards:
    options = {"transform": RegionTransform(16, geometry="squash"), "seed": 0, "shuffle": 0}
    sets = [ShardSet(tuple(find_shards([str(folder)])))]
    return RegionShards(sets, sampling=sampling, **{**options, **more})


def captions(samples: Iterator[LoadedSample]) -> list[str]:
    return [text for sample in samples for text in sample.texts]


def test_two_regions_an_image_share_its_pixels(two_shards: Path) -> None:
    samples = list(stream(two_shards, Sampling(2, 0.0)))
    assert len(samples) == 6
    for sample in samples:
        assert sample.rgb.shape == (3, 16, 16)
        assert sample.alphas.shape == (2, 1, 16, 16)
        assert len(set(sample.texts)) == 2
        assert sample.whole == [False, False]
        assert not ((sample.alphas[0] > 0) & (sample.alphas[1] > 0)).any()


def test_each_alpha_belongs_to_its_text(two_shards: Path) -> None:
    channel = {"red thing": 0, "green thing": 1, "blue thing": 2}
    for sample in stream(two_shards, Sampling(2, 0.0)):
        for alpha, text in zip(sample.alphas, sample.texts, strict=True):
            colour = sample.rgb[:, (alpha[0] > 1.8)].mean(1)
            assert int(colour.argmax()) == channel[text]


def test_whole_image_ratio_1_gives_captions(numbered: Path) -> None:
    samples = list(stream(numbered, Sampling(2, 1.0)))
    assert captions(iter(samples)) == [f"picture {i}" for i in range(14) for _ in range(2)]
    for sample in samples:
        assert sample.whole == [True, True]
        torch.testing.assert_close(sample.alphas, torch.full((2, 1, 16, 16), 0.5 / 0.26))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_processes_and_workers_share_the_shards_without_overlap(
    numbered: Path, monkeypatch: pytest.MonkeyPatch, workers: int, world: int
) -> None:
    seen = []
    for rank in range(world):
        for worker in range(workers):
            info = SimpleNamespace(id=worker, num_workers=workers)
            monkeypatch.setattr("alpha_clip.datasets.get_worker_info", lambda info=info: info)
            part = captions(iter(stream(numbered, Sampling(1, 1.0), rank=rank, world=world)))
            assert part
            seen += part
    assert sorted(seen) == sorted(f"picture {i}" for i in range(14))


@pytest.mark.parametrize("shuffle", [0, 4])
def test_more_readers_than_shards_share_them(
    two_shards: Path, monkeypatch: pytest.MonkeyPatch, shuffle: int
) -> None:
    """Five readers, two shards of three samples: nobody starves in training, nothing is lost."""
    seen = []
    for worker in range(5):
        info = SimpleNamespace(id=worker, num_workers=5)
        monkeypatch.setattr("alpha_clip.datasets.get_worker_info", lambda info=info: info)
        data = stream(two_shards, Sampling(), shuffle=shuffle, drops=Drops(5))
        seen.append(len(list(islice(data, 10))))
    assert sum(seen) == 50 if shuffle else 6


def test_without_shuffling_one_pass_in_order(numbered: Path) -> None:
    assert captions(iter(stream(numbered, Sampling(1, 1.0)))) == [f"picture {i}" for i in range(14)]


def test_shuffled_stream_is_endless_and_even(numbered: Path) -> None:
    seen = captions(islice(stream(numbered, Sampling(1, 1.0), shuffle=5), 140))
    counts = {text: seen.count(text) for text in seen}
    assert len(counts) == 14
    assert min(counts.values()) >= 5
    assert seen[:14] != sorted(seen[:14], key=lambda text: int(text.split()[1]))


def test_the_stream_is_a_function_of_the_seed(two_shards: Path) -> None:
    runs = []
    for seed in (3, 3, 4):
        augment = RegionAugment(16, scale=(0.4, 1.0), flip=0.5)
        data = stream(two_shards, Sampling(2, 0.3), transform=augment, seed=seed, shuffle=3)
        samples = list(islice(data, 12))
        runs.append((captions(iter(samples)), torch.cat([s.alphas.flatten() for s in samples])))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_ranks_and_workers_draw_differently(
    two_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that happen to hold the same pictures must not make the same batch."""
    shards = find_shards([str(two_shards)])
    texts = []
    for rank in (0, 1):
        data = stream(two_shards, Sampling(1, 0.0), shuffle=3, rank=rank, world=2)
        data.sets = [ShardSet(tuple(shards[:1] * 2))]
        texts.append(captions(islice(data, 20)))
    assert texts[0] != texts[1]


def test_a_damaged_picture_is_dropped_with_a_word(
    tmp_path: Path,
    make_sample: MakeSample,
    write_shards: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sound = make_sample("1")
    damaged = replace(make_sample("0"), jpeg=make_sample("0").jpeg[:-200])
    write_shards(tmp_path, [damaged, sound])
    drops = Drops()
    with caplog.at_level(logging.WARNING, "alpha_clip.drops"):
        samples = list(stream(tmp_path, Sampling(1, 0.0), drops=drops))
    assert len(samples) == 1
    assert [r.getMessage()[:26] for r in caplog.records] == ["dropped (corrupt_image): 0"]
    assert drops.counts() == {"corrupt_image": 1}


def test_samples_without_the_wanted_kind_are_dropped(
    tmp_path: Path, make_sample: MakeSample, write_shards: Callable[..., Any]
) -> None:
    plain = make_sample("1")
    classes = tuple(replace(r, kind="class") for r in plain.regions)
    write_shards(tmp_path, [make_sample("0"), replace(plain, regions=classes)])
    samples = list(stream(tmp_path, Sampling(2, 0.0, ["class"])))
    assert len(samples) == 1


def test_shards_without_a_sound_sample_stop_an_endless_stream(two_shards: Path) -> None:
    shards = [replace(s, file=s.file.with_name("gone.tar")) for s in find_shards([str(two_shards)])]
    sets = [ShardSet(tuple(shards))]
    data = RegionShards(sets, RegionTransform(16), Sampling(), seed=0, shuffle=4)
    with pytest.raises(RuntimeError, match=r"no sound sample in 2 shards .*lost_in_tar"):
        next(iter(data))


def test_collate_stacks_and_tokenizes(model: AlphaClip, two_shards: Path) -> None:
    tokenizer = model.tokenizer
    samples = list(stream(two_shards, Sampling(2, 0.5)))
    batch = Collate(tokenizer)(samples)
    assert batch.rgb.shape == (6, 3, 16, 16)
    assert batch.alphas.shape == (6, 2, 1, 16, 16)
    assert batch.whole.tolist() == [s.whole for s in samples]
    for row, sample in zip(batch.phrase, samples, strict=True):
        assert torch.equal(batch.tokens[row], tokenizer(sample.texts))
    assert len(batch.tokens) == len({text for s in samples for text in s.texts})
    assert len(set(batch.image_ids.tolist())) == 6


def test_equal_phrases_have_equal_numbers_in_every_batch(
    model: AlphaClip, two_shards: Path
) -> None:
    samples = list(stream(two_shards, Sampling(2, 0.0)))
    known: dict[str, int] = {}
    for part in (samples[:2], samples[2:], samples):
        ids = Collate(model.tokenizer)(part).phrase_ids.flatten().tolist()
        for text, number in zip((t for s in part for t in s.texts), ids, strict=True):
            assert known.setdefault(text, number) == number
    assert len(set(known.values())) == len(known) == 3


def test_a_batch_moves_whole(model: AlphaClip, two_shards: Path) -> None:
    batch = Collate(model.tokenizer)(list(stream(two_shards, Sampling())))
    moved = batch.to("meta")
    assert isinstance(moved, RegionBatch)
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert {t.device.type for t in tensors} == {"meta"}
    assert len(tensors) == 7
    assert moved.place == batch.place


def attach(data: RegionDataModule, model: AlphaClip, world: int = 1) -> None:
    """What the module asks of Lightning's trainer."""
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(model=model),
        world_size=world,
        global_rank=0,
        training=True,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def test_size_and_tokens_are_the_models_own(model: AlphaClip, two_shards: Path) -> None:
    folder = str(two_shards)
    data = RegionDataModule([folder], [folder], 2, Sampling(2), shuffle=3, workers=0)
    attach(data, model)
    data.setup("fit")
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        assert batch.rgb.shape == (2, 3, model.image_size, model.image_size)
        assert batch.tokens.shape[-1] == model.config["text_cfg"]["context_length"]


def test_validation_sees_every_region_once_and_never_whole(
    model: AlphaClip, two_shards: Path
) -> None:
    folder = str(two_shards)
    data = RegionDataModule([folder], [folder], 4, Sampling(2, 1.0), shuffle=3, workers=0)
    attach(data, model)
    data.setup("validate")
    batches = list(data.val_dataloader())
    assert [tuple(b.alphas.shape[:2]) for b in batches] == [(4, 1), (4, 1), (4, 1)]
    assert not torch.cat([b.whole for b in batches]).any()
    (first, second) = batches[0].alphas[:2]
    assert torch.equal(batches[0].rgb[0], batches[0].rgb[1])  # two regions of one image
    assert not torch.equal(first, second)
    again = list(data.val_dataloader())
    assert all(torch.equal(a.phrase_ids, b.phrase_ids) for a, b in zip(batches, again, strict=True))


def test_an_epoch_is_one_pass_and_the_next_goes_on_behind_it(
    model: AlphaClip, numbered: Path
) -> None:
    data = RegionDataModule([str(numbered)], [], 2, Sampling(1, 1.0), shuffle=7, workers=0)
    attach(data, model)
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(loader) == 7
    epochs = []
    for _ in range(2):
        seen = []
        for batch in islice(loader, len(loader)):
            seen += batch.phrase_ids.flatten().tolist()
            data.on_before_batch_transfer(batch, 0)
        epochs.append(seen)
    assert [len(set(seen)) for seen in epochs] == [14, 14]  # a pass: every caption once
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_validation_batches_do_not_move_training_on(model: AlphaClip, two_shards: Path) -> None:
    folder = str(two_shards)
    data = RegionDataModule([folder], [folder], 2, shuffle=3, workers=0)
    attach(data, model)
    data.setup("fit")
    first = next(iter(data.train_dataloader()))
    data.trainer.training = False
    data.on_before_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert data.state_dict()["taken"] == 0
    data.trainer.training = True
    data.on_before_batch_transfer(first, 0)
    assert data.state_dict()["taken"] == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"shuffle": 0}, "shuffle of at least 1, got 0"),
        ({"workers": -1}, "workers of at least 0, got -1"),
        ({"train": []}, "at least one data set in data.train"),
    ],
)
def test_settings_out_of_range_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegionDataModule(**{"train": ["folder"], **option})


def test_too_few_images_for_a_batch_are_refused(model: AlphaClip, two_shards: Path) -> None:
    data = RegionDataModule([str(two_shards)], batch_size=4, workers=0)
    attach(data, model, world=2)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"6 images in 1 data sets .*2 processes x batch_size 4"):
        data.train_dataloader()


def test_no_validation_data_is_no_loader(model: AlphaClip, two_shards: Path) -> None:
    data = RegionDataModule([str(two_shards)], workers=0)
    attach(data, model)
    data.setup("fit")
    assert data.val_dataloader() == []


def test_data_without_anything_wanted_stops_the_run_instead_of_hanging(two_shards: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no usable sample in the shards.*'no_wanted_kind'"):
        next(iter(stream(two_shards, Sampling(1, 0.0, ["class"]), shuffle=3)))


def test_missing_training_data_stops_the_run_at_setup(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished shards"):
        RegionDataModule([str(tmp_path)]).setup("fit")


def test_sampled_mask_is_the_stored_one(two_shards: Path, make_sample: MakeSample) -> None:
    sample = make_sample("0", ("red", "blue"))
    exact = RegionTransform(sample.h, geometry="center_crop")
    loaded = next(iter(stream(two_shards, Sampling(2, 0.0), transform=exact)))
    left = (sample.w - sample.h) // 2
    for alpha, text in zip(loaded.alphas, loaded.texts, strict=True):
        (region,) = [r for r in sample.regions if r.text == text]
        mask = torch.from_numpy(decode_rle(region.rle))[:, left : left + sample.h]
        assert torch.equal(alpha[0] > 0, mask)


# --- data sets together ------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path, make_sample: MakeSample, write_shards: Callable[..., Any]) -> Path:
    """One shard of two samples, with captions that tell them from `numbered`."""
    samples = [replace(make_sample(str(i)), caption=f"other {i}") for i in range(2)]
    plain = [replace(s, regions=tuple(replace(r, span=None) for r in s.regions)) for s in samples]
    write_shards(tmp_path / "other", plain)
    return tmp_path / "other"


def sets_of(*folders: tuple[Path, float]) -> list[ShardSet]:
    return [ShardSet(tuple(find_shards([str(folder)])), weight) for folder, weight in folders]


def test_data_sets_are_mixed_by_weight_however_large_they_are(numbered: Path, other: Path) -> None:
    sets = sets_of((numbered, 1.0), (other, 3.0))
    data = RegionShards(sets, RegionTransform(16), Sampling(1, 1.0), seed=0, shuffle=8)
    seen = captions(islice(data, 2000))
    share = sum(text.startswith("other") for text in seen) / len(seen)
    assert share == pytest.approx(0.75, abs=0.03)
    assert set(seen) == {f"picture {i}" for i in range(14)} | {"other 0", "other 1"}


def test_validation_takes_all_of_every_set_once(numbered: Path, other: Path) -> None:
    sets = sets_of((numbered, 1.0), (other, 3.0))
    seen = captions(
        iter(RegionShards(sets, RegionTransform(16), Sampling(1, 1.0), seed=0, shuffle=0))
    )
    assert seen == [f"picture {i}" for i in range(14)] + ["other 0", "other 1"]


def test_every_pass_brings_a_reader_other_shards(numbered: Path) -> None:
    data = stream(numbered, Sampling(1, 1.0), shuffle=1, rank=0, world=7)
    assert len(set(captions(islice(data, 60)))) > 8


@pytest.mark.parametrize("world", [1, 2, 3, 7, 20])
def test_a_training_pass_of_all_readers_is_every_sample_once(numbered: Path, world: int) -> None:
    from alpha_clip.streams import Reader, _passes

    (part,) = sets_of((numbered, 1.0))
    seen = []
    for rank in range(world):
        reader = Reader(rank, world)
        mine = sum(
            len(range(k, shard.samples, parts)) for shard, k, parts in reader.shares([*part.shards])
        )
        samples = _passes(part, reader, Drops(), seed=[5])
        seen += [next(samples)[0].caption for _ in range(mine)]
    assert sorted(seen) == sorted(f"picture {i}" for i in range(14))


def test_the_module_mixes_and_counts_what_it_dropped(
    model: AlphaClip,
    numbered: Path,
    other: Path,
    make_sample: MakeSample,
    write_shards: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damaged = replace(make_sample("9"), jpeg=make_sample("9").jpeg[:-200])
    write_shards(tmp_path / "bad", [damaged, make_sample("8")])
    folders = [str(numbered), DataSet(str(other), 2.0), str(tmp_path / "bad")]
    data = RegionDataModule(folders, folders, 4, shuffle=2, workers=2)
    attach(data, model)
    data.setup("fit")
    batches = list(data.val_dataloader())
    assert sum(len(batch.rgb) for batch in batches) == 2 * (14 + 2 + 1)
    assert data.drops.counts() == {"corrupt_image": 1}
    assert len(next(iter(data.train_dataloader())).rgb) == 4
    with caplog.at_level("WARNING", "alpha_clip.data"):
        data.teardown("fit")
    assert "dropped while reading: {'corrupt_image': " in caplog.text


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_above_zero(weight: float) -> None:
    with pytest.raises(ValueError, match="weight of folder must be above 0"):
        DataSet("folder", weight)
