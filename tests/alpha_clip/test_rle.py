import json
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from alpha_clip.rle import decode_rle, encode_rle, rle_area, rle_runs


def random_masks(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(count):
        height, width = rng.integers(1, 40, 2)
        mask = rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])
        masks.append(mask)
    return [*masks, np.zeros((3, 5), bool), np.ones((3, 5), bool), np.ones((1, 1), bool)]


def coco_encode(mask: np.ndarray) -> dict[str, Any]:
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def uncompressed(mask: np.ndarray) -> list[int]:
    """Runs by a loop, as COCO describes them: column by column, the first one outside."""
    runs, inside, length = [], False, 0
    for pixel in mask.T.reshape(-1):
        if bool(pixel) != inside:
            runs.append(length)
            inside, length = not inside, 0
        length += 1
    return [*runs, length]


@pytest.mark.parametrize("mask", random_masks(60), ids=lambda m: f"{m.shape[0]}x{m.shape[1]}")
def test_agrees_with_pycocotools(mask: np.ndarray) -> None:
    theirs, ours = coco_encode(mask), encode_rle(mask)
    assert ours == {"size": list(mask.shape), "counts": theirs["counts"].decode()}
    for rle in (theirs, ours, {"size": list(mask.shape), "counts": uncompressed(mask)}):
        decoded = decode_rle(rle)
        assert decoded.dtype == np.bool_
        np.testing.assert_array_equal(decoded, mask)
        assert rle_area(rle) == mask.sum()
        assert rle_runs(rle).tolist() == uncompressed(mask)


def test_long_runs_take_several_characters() -> None:
    mask = np.zeros((3000, 2000), bool)
    mask[1500:, 1000:] = True
    mask[0, 0] = True
    np.testing.assert_array_equal(decode_rle(encode_rle(mask)), mask)
    assert rle_area(encode_rle(mask)) == 1500 * 1000 + 1


def test_encoded_rle_survives_json() -> None:
    rle = encode_rle(np.eye(9))
    np.testing.assert_array_equal(decode_rle(json.loads(json.dumps(rle))), np.eye(9) > 0)


def test_every_value_above_zero_is_inside() -> None:
    mask = np.array([[0, 1, 2], [255, 0, 0]], np.uint8)
    np.testing.assert_array_equal(decode_rle(encode_rle(mask)), mask > 0)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1)])
def test_encode_wants_two_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[H, W\]"):
        encode_rle(np.zeros(shape, bool))


HOSTILE_COUNTS = {
    "too few pixels": [3, 5],
    "too many pixels": [10, 6],
    "no runs": [],
    "negative run": [20, -5],
    "far beyond 64 bits": [15, 1 << 70],
    "far below 64 bits": [15, -(1 << 70)],
    "33 bits": [15, 1 << 33],
    "fraction": [7.5, 7.5],
    "truth value": [14, True],
    "text in the list": ["15"],
    "nothing": None,
    "a number": 15,
    "empty text": "",
    "below the alphabet": "\x00",
    "above the alphabet": "\x7f",
    "not ASCII": "é",
    "lone surrogate": "\ud800",
    "stops inside a number": "o",
    "run of more than 32 bits": "ooooooo0",
    "negative in text": "O",
    "bytes that are not ASCII": b"\xff",
}


@pytest.mark.parametrize("counts", HOSTILE_COUNTS.values(), ids=HOSTILE_COUNTS.keys())
@pytest.mark.parametrize("function", [decode_rle, rle_area, rle_runs])
def test_hostile_counts_are_refused(function: Any, counts: Any) -> None:
    with pytest.raises(ValueError, match="RLE"):
        function({"size": [3, 5], "counts": counts})


@pytest.mark.parametrize(
    "size",
    [
        None,
        15,
        "35",
        [15],
        [3, 5, 1],
        [0, 15],
        [-3, -5],
        [3.0, 5.0],
        ["3", "5"],
        [1 << 20, 1 << 20],
    ],
    ids=str,
)
def test_hostile_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="RLE size"):
        decode_rle({"size": size, "counts": "?"})


def test_empty_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="RLE size"):
        decode_rle({})


def test_random_text_never_passes_for_another_size() -> None:
    """Whatever the bytes are, the result has the stated size or there is none."""
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        counts = bytes(rng.integers(40, 120, rng.integers(1, 12)).astype(np.uint8))
        try:
            assert decode_rle({"size": [4, 6], "counts": counts}).shape == (4, 6)
        except ValueError:
            refused += 1
    assert refused > 450


def test_damaged_text_is_noticed_or_has_the_stated_size() -> None:
    rng = np.random.default_rng(1)
    mask = rng.random((20, 30)) < 0.5
    text = bytearray(encode_rle(mask)["counts"].encode())
    for place in range(len(text)):
        damaged = bytearray(text)
        damaged[place] ^= 1
        with pytest.raises(ValueError, match="RLE"):
            decode_rle({"size": [20, 30], "counts": bytes(damaged[:-1])})


def test_messages_stay_short() -> None:
    with pytest.raises(ValueError, match="RLE counts") as caught:
        decode_rle({"size": [3, 5], "counts": "\x00" * 100_000})
    assert len(str(caught.value)) < 200
