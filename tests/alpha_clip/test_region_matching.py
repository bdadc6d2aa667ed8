import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

import alpha_clip.region_matching as region_matching
from alpha_clip.region_matching import RegionMatching

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_rows(count: int, phrases: int, pictures: int, seed: int = 0, dim: int = 8) -> Rows:
    """Regions that lean towards their phrases; ids are any 64-bit numbers."""
    random = torch.Generator().manual_seed(seed)
    names = torch.randint(-(2**62), 2**62, (phrases,), generator=random)
    places = torch.randint(-(2**62), 2**62, (pictures,), generator=random)
    text = normalize(torch.randn(phrases, dim, generator=random), dim=-1)
    phrase = torch.randint(phrases, (count,), generator=random)
    image = normalize(text[phrase] + 0.5 * torch.randn(count, dim, generator=random), dim=-1)
    picture = torch.randint(pictures, (count,), generator=random)
    return image, text[phrase], names[phrase], places[picture]


def by_hand(rows: Rows) -> dict[str, float]:
    """Row by row, in plain Python."""
    image, text = (part.double().numpy() for part in rows[:2])
    phrase, picture = (part.tolist() for part in rows[2:])
    text_of = {p: text[i] for i, p in enumerate(phrase)}
    of_picture: dict[int, list[int]] = {}
    for i, p in enumerate(picture):
        of_picture.setdefault(p, []).append(i)

    def right(i: int, candidates: Sequence[int]) -> bool:
        return max(candidates, key=lambda p: float(image[i] @ text_of[p])) == phrase[i]

    anywhere = [right(i, list(text_of)) for i in range(len(phrase))]
    within, chance, cosines = [], [], []
    for members in of_picture.values():
        candidates = sorted({phrase[i] for i in members})
        if len(candidates) > 1:
            within += [right(i, candidates) for i in members]
            chance += [1 / len(candidates)] * len(members)
        cosines += [
            float(image[i] @ image[j])
            for i in members
            for j in members
            if i < j and phrase[i] != phrase[j]
        ]
    return {
        "region_top1": float(np.mean(anywhere)),
        "within_image_top1": float(np.mean(within)),
        "within_image_chance": float(np.mean(chance)),
        "within_image_cosine": float(np.mean(cosines)),
    }


def figures(*batches: Rows) -> dict[str, float]:
    metric = RegionMatching()
    for batch in batches:
        metric.update(*batch)
    return {name: float(value) for name, value in metric.compute().items()}


def take(rows: Rows, places: slice | torch.Tensor) -> Rows:
    image, text, phrase, picture = (part[places] for part in rows)
    return image, text, phrase, picture


@pytest.mark.parametrize(
    ("count", "phrases", "pictures"), [(300, 40, 60), (200, 3, 9), (90, 80, 2)]
)
def test_figures_equal_a_count_by_hand(count: int, phrases: int, pictures: int) -> None:
    rows = random_rows(count, phrases, pictures)
    expected = by_hand(rows)
    assert 0.1 < expected["region_top1"] < 1  # else this compares nothing
    assert figures(rows) == pytest.approx(expected, abs=1e-5)


def test_neither_order_nor_batches_matter() -> None:
    rows = random_rows(100, 20, 30)
    shuffled = take(rows, torch.randperm(100))
    parts = [take(shuffled, slice(a, b)) for a, b in ((0, 1), (1, 64), (64, 64), (64, 100))]
    assert figures(*parts) == pytest.approx(figures(rows), abs=1e-6)


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_small_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    rows = random_rows(120, 25, 20)
    expected = figures(rows)
    monkeypatch.setattr(region_matching, "_ALL", limit)
    monkeypatch.setattr(region_matching, "_ONE_PICTURE", limit)
    assert figures(rows) == pytest.approx(expected, abs=1e-6)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product of features is larger than the limit, or than one row needs."""
    largest = 0
    inside = region_matching._inside

    def watch(start: torch.Tensor, stop: torch.Tensor, columns: slice) -> torch.Tensor:
        nonlocal largest
        made = inside(start, stop, columns)
        largest = max(largest, made.numel())
        return made

    monkeypatch.setattr(region_matching, "_inside", watch)
    monkeypatch.setattr(region_matching, "_ALL", 5000)
    monkeypatch.setattr(region_matching, "_ONE_PICTURE", 5000)
    figures(random_rows(2000, 400, 50))
    assert 2500 < largest <= 5000


def test_what_a_perfect_and_a_blind_model_reach() -> None:
    text = torch.eye(4)
    phrase, picture = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    perfect = figures((text[phrase], text[phrase], phrase, picture))
    assert perfect == {
        "region_top1": 1,
        "within_image_top1": 1,
        "within_image_chance": 0.5,
        "within_image_cosine": 0,
    }
    blind = figures((text[phrase[picture * 2]], text[phrase], phrase, picture))
    assert blind["within_image_top1"] == blind["within_image_chance"] == 0.5
    assert blind["within_image_cosine"] == 1


def test_pictures_without_two_phrases_do_not_count_within() -> None:
    """Two regions of one name, and a region alone, have nothing to be told from."""
    text = torch.eye(3)
    phrase, picture = torch.tensor([0, 0, 1]), torch.tensor([5, 5, 6])
    alone = figures((text[phrase], text[phrase], phrase, picture))
    assert alone.pop("region_top1") == 1
    assert all(math.isnan(value) for value in alone.values())
    more = torch.tensor([2, 0, 1]), torch.tensor([7, 7, 8])
    both = figures(
        (text[phrase], text[phrase], phrase, picture),
        (text[torch.tensor([0, 0, 1])], text[more[0]], *more),
    )
    assert both["within_image_top1"] == 0.5
    assert both["within_image_cosine"] == 1


def test_nothing_seen_is_nan_and_reset_forgets() -> None:
    metric = RegionMatching()
    nothing = take(random_rows(1, 1, 1), slice(0, 0))
    metric.update(*nothing)
    assert all(value.isnan() for value in metric.compute().values())
    metric.update(*random_rows(20, 5, 4))
    assert not metric.compute()["region_top1"].isnan()
    metric.reset()
    metric.update(*nothing)
    assert metric.compute()["region_top1"].isnan()


def test_half_precision_features_are_compared_in_full() -> None:
    image, text, *ids = random_rows(200, 30, 40)
    half = image.bfloat16(), text.bfloat16()
    metric = RegionMatching()
    metric.update(*half, *ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx(by_hand((half[0].float(), half[1].float(), *ids)), abs=1e-6)


def test_rows_that_do_not_belong_together_are_refused() -> None:
    image, text, phrase, picture = random_rows(6, 3, 2)
    metric = RegionMatching()
    with pytest.raises(ValueError, match=r"of one shape \[rows, dim\], got \[6, 8\] and \[5, 8\]"):
        metric.update(image, text[:5], phrase, picture)
    with pytest.raises(ValueError, match=r"each of 6 rows, got shapes \[6\] and \[3, 2\]"):
        metric.update(image, text, phrase, picture.view(3, 2))
    image[2, 1] = torch.nan
    metric.update(image, text, phrase, picture)
    with pytest.raises(ValueError, match="1 of 6 rows have NaN or infinite features"):
        metric.compute()


CUTS = {"uneven": [0, 7, 20, 41, 60], "one process has none": [0, 60], "none at all": [0]}


def run_process(rank: int, folder: Path) -> None:
    """One of two processes: even steps of a case are its share of the rows, or odd ones."""
    join = {"init_method": f"file://{folder}/join", "timeout": timedelta(minutes=2)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **join)
    rows, results = random_rows(60, 12, 15), {}
    for name, cuts in CUTS.items():
        metric = RegionMatching()
        for step in range(rank, len(cuts) - 1, 2):
            metric.update(*take(rows, slice(cuts[step], cuts[step + 1])))
        found = {figure: float(value) for figure, value in metric.compute().items()}
        results[name] = (metric.update_count, found)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_two_processes_give_the_figures_of_the_joined_rows(tmp_path: Path) -> None:
    """This process is the second one: a fresh one takes seconds to import everything."""
    other = torch.multiprocessing.spawn(run_process, (tmp_path,), nprocs=1, join=False)
    run_process(1, tmp_path)
    other.join()
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    joined = figures(random_rows(60, 12, 15))
    for name, steps in zip(CUTS, ([2, 2], [1, 0], [0, 0]), strict=True):
        assert [r[name][0] for r in results] == steps
        expected = joined if any(steps) else dict.fromkeys(joined, math.nan)
        for result in results:
            assert result[name][1] == pytest.approx(expected, abs=1e-6, nan_ok=True), name
