"""What makes reading quick must not change what is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alpha_clip import datasets
from alpha_clip.mask_stack import MaskStack
from alpha_clip.reader import find_shards
from alpha_clip.regions import RegionSample, decode_rle, encode_rle
from alpha_clip.rle import all_runs, rle_areas, rle_runs
from alpha_clip.samples import SampleError, pack_sample, parse_sample
from alpha_clip.sampling import Sampling
from alpha_clip.streams import ShardSet
from alpha_clip.transforms import RegionAugment, RegionTransform


def random_masks(rng: np.random.Generator, height: int, width: int) -> list[Any]:
    """Masks of all kinds: spots, noise, a box, whole, runs of no length, lists of runs."""
    box = np.zeros((height, width), bool)
    box[rng.integers(height) :, rng.integers(width) :] = True
    noise = rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])
    noise[rng.integers(height), rng.integers(width)] = True
    first, *others = rle_runs(encode_rle(noise)).tolist()
    padded = {"size": [height, width], "counts": [first, *others[:1], 0, 0, *others[1:]]}
    return [encode_rle(box), encode_rle(noise), padded, None, encode_rle(box | noise)]


@pytest.mark.parametrize("geometry", ["squash", "pad", "center_crop"])
@pytest.mark.filterwarnings("ignore:center_crop cut a region away")
def test_stored_masks_give_what_their_pixels_give(geometry: Any) -> None:
    rng = np.random.default_rng(0)
    for turn in range(40):
        height, width = (int(v) for v in rng.integers(2, 90, 2))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        kinds = random_masks(rng, height, width)
        stored = [kinds[i] for i in rng.integers(0, len(kinds), rng.integers(1, 7))]
        pixels = [np.ones((height, width), bool) if s is None else decode_rle(s) for s in stored]
        transforms = [
            RegionTransform(16, geometry=geometry),
            RegionAugment(16, scale=(0.1, 1), min_kept=0.3, flip=0.5, geometry=geometry),
        ]
        for transform in transforms:
            results = []
            for regions in (stored, pixels):
                torch.manual_seed(turn)
                results.append(transform.many(image, regions))
            for quick, plain in zip(*results, strict=True):
                assert torch.equal(quick, plain)


def test_masks_are_measured_in_any_window() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        height, width = (int(v) for v in rng.integers(1, 30, 2))
        stored = random_masks(rng, height, width)
        pixels = [np.ones((height, width), bool) if s is None else decode_rle(s) for s in stored]
        masks = MaskStack.of(stored, height, width)
        top, left = int(rng.integers(height)), int(rng.integers(width))
        rows, columns = rng.integers(1, height - top + 1), rng.integers(1, width - left + 1)
        inside = [p[top : top + rows, left : left + columns] for p in pixels]
        assert masks.areas().tolist() == [p.sum() for p in pixels]
        assert masks.crop(top, left, rows, columns).areas().tolist() == [p.sum() for p in inside]


def test_an_unsound_mask_is_told_by_the_way_of_one_mask() -> None:
    image, sound = Image.new("RGB", (6, 4)), encode_rle(np.ones((4, 6)))
    for unsound, reason in {
        "of another size": (encode_rle(np.ones((6, 4))), "as large as the image"),
        "empty": (encode_rle(np.zeros((4, 6))), "selects no pixel"),
        "damaged": ({"size": [4, 6], "counts": "oo"}, "not COCO's compressed text"),
        "too long": ({"size": [4, 6], "counts": [0, 25]}, "must sum to"),
    }.values():
        assert MaskStack.of([sound, unsound], 4, 6) is None
        with pytest.raises(ValueError, match=reason):
            RegionTransform(8).many(image, [sound, unsound])


def test_runs_of_several_masks_are_those_of_each() -> None:
    rng = np.random.default_rng(2)
    rles = [m for _ in range(30) for m in random_masks(rng, 7, 11) if m is not None]
    assert [r.tolist() for r in all_runs(rles)] == [rle_runs(r).tolist() for r in rles]
    assert rle_areas(rles) == [int(decode_rle(r).sum()) for r in rles]
    assert all_runs([]) == []
    # What one text leaves open may not be closed by the next one.
    broken = [{"size": [7, 11], "counts": "o"}, rles[0]]
    for order in (broken, broken[::-1]):
        with pytest.raises(ValueError, match="not COCO's compressed text"):
            all_runs(order)


@pytest.mark.parametrize("which", [0, 1])
def test_one_bad_mask_of_a_record_is_told_alone(
    make_sample: Callable[..., RegionSample], which: int
) -> None:
    jpeg, text = pack_sample(make_sample())
    for damage, reason in (
        ({"counts": "o"}, "bad_rle"),
        ({"counts": [0, 40 * 30]}, "bad_area"),
        ({"size": [40, 30]}, "rle_size"),
        (None, "bad_schema"),
    ):
        record = json.loads(text)
        rle = record["regions"][which]["rle"]
        record["regions"][which]["rle"] = damage and {**rle, **damage}
        with pytest.raises(SampleError) as caught:
            parse_sample("0", jpeg, json.dumps(record).encode())
        assert caught.value.reason == reason


def test_freed_memory_is_kept_by_each_reader(
    two_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    monkeypatch.setattr(datasets, "_keep_freed_memory", lambda: taken.append(True))
    sets = [ShardSet(tuple(find_shards([str(two_shards)])))]
    stream = datasets.RegionShards(sets, RegionTransform(16), Sampling(), seed=0, shuffle=0)
    assert len(list(stream)) == 6
    assert taken == [True]
