import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alpha_clip.data import Collate, LoadedSample, RegionBatch, RegionDataModule, RegionShards
from alpha_clip.model import AlphaClip
from alpha_clip.reader import find_shards
from alpha_clip.regions import RegionSample, decode_rle
from alpha_clip.sampling import Sampling
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
    return RegionShards(find_shards([str(folder)]), sampling=sampling, **{**options, **more})


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
            monkeypatch.setattr("alpha_clip.data.get_worker_info", lambda info=info: info)
            part = captions(iter(stream(numbered, Sampling(1, 1.0), rank=rank, world=world)))
            assert part
            seen += part
    assert sorted(seen) == sorted(f"picture {i}" for i in range(14))


def test_more_readers_than_shards_leaves_some_without_work(
    numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = SimpleNamespace(id=7, num_workers=8)
    monkeypatch.setattr("alpha_clip.data.get_worker_info", lambda: info)
    for shuffle in (0, 4):
        assert list(stream(numbered, Sampling(), shuffle=shuffle)) == []


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
        data.shards = shards[:1] * 2
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
    with caplog.at_level(logging.WARNING, "alpha_clip.data"):
        samples = list(stream(tmp_path, Sampling(1, 0.0)))
    assert len(samples) == 1
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["0"]


def test_samples_without_the_wanted_kind_are_dropped(
    tmp_path: Path, make_sample: MakeSample, write_shards: Callable[..., Any]
) -> None:
    plain = make_sample("1")
    classes = tuple(replace(r, kind="class") for r in plain.regions)
    write_shards(tmp_path, [make_sample("0"), replace(plain, regions=classes)])
    samples = list(stream(tmp_path, Sampling(2, 0.0, ["class"])))
    assert len(samples) == 1


def test_shards_without_a_sound_sample_stop_an_endless_stream(two_shards: Path) -> None:
    shards = [replace(s, tar=s.tar.with_name("gone.tar")) for s in find_shards([str(two_shards)])]
    data = RegionShards(shards, RegionTransform(16), Sampling(), seed=0, shuffle=4)
    with pytest.raises(RuntimeError, match=r"no sound sample in 2 shards; dropped: .*lost_in_tar"):
        next(iter(data))


def test_collate_stacks_and_tokenizes(model: AlphaClip, two_shards: Path) -> None:
    tokenizer = model.tokenizer
    samples = list(stream(two_shards, Sampling(2, 0.5)))
    batch = Collate(tokenizer)(samples)
    assert batch.rgb.shape == (6, 3, 16, 16)
    assert batch.alphas.shape == (6, 2, 1, 16, 16)
    assert batch.whole.tolist() == [s.whole for s in samples]
    for row, sample in zip(batch.tokens, samples, strict=True):
        assert torch.equal(row, tokenizer(sample.texts))


def test_a_batch_moves_whole(model: AlphaClip, two_shards: Path) -> None:
    batch = Collate(model.tokenizer)(list(stream(two_shards, Sampling())))
    moved = batch.to("meta")
    assert isinstance(moved, RegionBatch)
    assert {t.device.type for t in vars(moved).values()} == {"meta"}


def attach(data: RegionDataModule, model: AlphaClip, world: int = 1, epoch: int = 0) -> None:
    """What the module asks of Lightning's trainer."""
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(model=model),
        world_size=world,
        global_rank=0,
        current_epoch=epoch,
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
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, again, strict=True))


def test_epochs_draw_differently(model: AlphaClip, two_shards: Path) -> None:
    data = RegionDataModule([str(two_shards)], batch_size=6, shuffle=3, workers=0)
    first = []
    for epoch in (0, 0, 1):
        attach(data, model, epoch=epoch)
        data.setup("fit")
        first.append(next(iter(data.train_dataloader())).rgb)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_no_validation_data_is_no_loader(model: AlphaClip, two_shards: Path) -> None:
    data = RegionDataModule([str(two_shards)], workers=0)
    attach(data, model)
    data.setup("fit")
    assert data.val_dataloader() == []


@pytest.mark.parametrize(("world", "workers"), [(1, 3), (3, 0), (2, 2)])
def test_more_readers_than_training_shards_are_refused(
    model: AlphaClip, two_shards: Path, world: int, workers: int
) -> None:
    data = RegionDataModule([str(two_shards)], workers=workers)
    attach(data, model, world)
    with pytest.raises(ValueError, match=r"2 training shards can't feed [34] readers"):
        data.setup("fit")
    data.setup("validate")  # there, a reader without work does no harm


def test_data_without_anything_wanted_stops_the_run_instead_of_hanging(two_shards: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no usable sample in 2 shards.*'no_wanted_kind'"):
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
