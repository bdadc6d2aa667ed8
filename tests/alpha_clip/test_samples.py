import json
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from alpha_clip.regions import (
    RegionSample,
    SampleError,
    encode_rle,
    jpeg_size,
    pack_sample,
    parse_sample,
)

MakeSample = Callable[..., RegionSample]


def test_round_trip(make_sample: MakeSample) -> None:
    for sample in (
        make_sample("7"),
        make_sample("08", ("green",), 33, 57),
        replace(make_sample("9"), reencoded=True),
        replace(make_sample("10"), id="ключ/✓", source="grit"),
    ):
        jpeg, text = pack_sample(sample)
        assert jpeg == sample.jpeg
        assert parse_sample(sample.key, jpeg, text) == sample


def test_json_is_sorted_utf8_of_the_agreed_schema(make_sample: MakeSample) -> None:
    text = pack_sample(replace(make_sample(), id="é"))[1]
    assert "é".encode() in text
    record = json.loads(text)
    assert set(record) == {"v", "id", "source", "w", "h", "caption", "regions"}
    fields = "rid text kind span box rle area score sam_iou stability clip"
    assert set(record["regions"][0]) == set(fields.split())
    assert list(record) == sorted(record)
    assert record["v"] == 1
    assert record["regions"][0]["box"] == list(make_sample().regions[0].box)


def test_bytes_are_a_function_of_the_sample(make_sample: MakeSample) -> None:
    assert pack_sample(make_sample()) == pack_sample(make_sample())


def broken_region(**change: Any) -> Callable[[RegionSample], RegionSample]:
    def make(sample: RegionSample) -> RegionSample:
        first, *rest = sample.regions
        return replace(sample, regions=(replace(first, **change), *rest))

    return make


def broken(**change: Any) -> Callable[[RegionSample], RegionSample]:
    return lambda sample: replace(sample, **change)


UNSOUND: dict[str, tuple[str, Callable[[RegionSample], RegionSample]]] = {
    "empty phrase": ("empty_phrase", broken_region(text="  ", span=None)),
    "no phrase": ("empty_phrase", broken_region(text=None, span=None)),
    "unknown kind": ("bad_kind", broken_region(kind="poem")),
    "span of other words": ("bad_span", broken_region(span=(1, 4))),
    "negative span": ("bad_span", broken_region(span=(-10, -1))),
    "box below 0": ("box_outside", broken_region(box=(-1.0, 5.0, 9.0, 9.0))),
    "box too wide": ("box_outside", broken_region(box=(1.0, 5.0, 40.5, 9.0))),
    "box too high": ("box_outside", broken_region(box=(1.0, 5.0, 9.0, 30.5))),
    "box without area": ("box_outside", broken_region(box=(5.0, 5.0, 5.0, 9.0))),
    "box that is not a number": ("box_outside", broken_region(box=(float("nan"), 5.0, 9.0, 9.0))),
    "mask of another image": ("rle_size", broken_region(rle=encode_rle(np.ones((40, 30))))),
    "no mask size": ("rle_size", broken_region(rle={"counts": "0"})),
    "runs that do not sum": ("bad_rle", broken_region(rle={"size": [30, 40], "counts": [7, 5]})),
    "runs beyond 64 bits": (
        "bad_rle",
        broken_region(rle={"size": [30, 40], "counts": [1200, -(1 << 70)]}),
    ),
    "another area": ("bad_area", broken_region(area=5)),
    "empty mask": ("bad_area", broken_region(rle=encode_rle(np.zeros((30, 40))), area=0)),
    "score NaN": ("bad_score", broken_region(score=float("nan"))),
    "stability infinite": ("bad_score", broken_region(stability=float("inf"))),
    "sam_iou as text": ("bad_score", broken_region(sam_iou="0.9")),
    "clip as a list": ("bad_score", broken_region(clip=[0.2])),
    "stated size is another": ("size_mismatch", broken(w=41)),
    "sides swapped": ("size_mismatch", broken(w=30, h=40)),
    "no JPEG": ("corrupt_image", broken(jpeg=b"\x89PNG\r\n\x1a\n")),
    "nothing for a JPEG": ("corrupt_image", broken(jpeg=b"")),
    "no regions": ("no_regions", broken(regions=())),
    "rid used twice": ("duplicate_rid", broken_region(rid=1)),
}


@pytest.mark.parametrize(("reason", "damage"), UNSOUND.values(), ids=UNSOUND.keys())
def test_unsound_samples_are_refused_on_writing_and_on_reading(
    make_sample: MakeSample, reason: str, damage: Callable[[RegionSample], RegionSample]
) -> None:
    sound = make_sample()
    unsound = damage(sound)
    with pytest.raises(SampleError, match=reason) as caught:
        pack_sample(unsound)
    assert caught.value.reason == reason
    record = json.loads(pack_sample(sound)[1])
    record |= {name: getattr(unsound, name) for name in ("w", "h", "caption")}
    record["regions"] = [vars(region) for region in unsound.regions]
    with pytest.raises(SampleError) as caught:
        parse_sample(sound.key, unsound.jpeg, json.dumps(record).encode())
    assert caught.value.reason == reason


@pytest.mark.parametrize("key", ["", "a1", "-1", "1.5", "../1", "¹", "٣"])
def test_keys_are_ascii_digits(make_sample: MakeSample, key: str) -> None:
    sample = make_sample()
    with pytest.raises(SampleError, match="bad_key"):
        pack_sample(replace(sample, key=key))
    with pytest.raises(SampleError, match="bad_key"):
        parse_sample(key, *pack_sample(sample))


def test_lone_surrogates_are_refused(make_sample: MakeSample) -> None:
    with pytest.raises(SampleError, match="bad_text"):
        pack_sample(replace(make_sample(), id="\ud800"))


def edit(**change: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda record: {**record, **change}


def edit_region(**change: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda r: {**r, "regions": [{**r["regions"][0], **change}, *r["regions"][1:]]}


def without(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda record: {k: v for k, v in record.items() if k not in names}


MISSHAPEN: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "a list": ("bad_schema", lambda record: [record]),
    "null": ("bad_schema", lambda record: None),
    "another version": ("bad_schema", edit(v=2)),
    "no version": ("bad_schema", without("v")),
    "no regions": ("bad_schema", without("regions")),
    "no width": ("bad_schema", without("w")),
    "a field too many": ("bad_schema", edit(surprise=1)),
    "another key inside": ("bad_schema", edit(key="5")),
    "regions a number": ("bad_schema", edit(regions=5)),
    "regions of numbers": ("bad_schema", edit(regions=[1, 2])),
    "regions as an object": ("bad_schema", edit(regions={"rid": 1})),
    "caption a number": ("bad_schema", edit(caption=5)),
    "caption null": ("bad_schema", edit(caption=None)),
    "box null": ("bad_schema", edit_region(box=None)),
    "box of three": ("bad_schema", edit_region(box=[1, 2, 3])),
    "box of words": ("bad_schema", edit_region(box=["a", "b", "c", "d"])),
    "box beyond floats": ("bad_schema", edit_region(box=[0, 0, 10**400, 5])),
    "score beyond floats": ("bad_schema", edit_region(score=10**400)),
    "span of one": ("bad_schema", edit_region(span=[1])),
    "span of fractions": ("bad_span", edit_region(span=[0.0, 9.0])),
    "span of truth values": ("bad_span", edit_region(span=[False, True])),
    "mask null": ("bad_schema", edit_region(rle=None)),
    "mask size a number": ("bad_schema", edit_region(rle={"size": 5, "counts": "0"})),
    "rid a list": ("bad_schema", edit_region(rid=[1])),
    "a region's field too many": ("bad_schema", edit_region(surprise=1)),
}


@pytest.mark.parametrize(("reason", "change"), MISSHAPEN.values(), ids=MISSHAPEN.keys())
def test_misshapen_records_are_refused(
    make_sample: MakeSample, reason: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    sample = make_sample()
    # Without spans, nothing but the change itself can be wrong.
    sample = replace(sample, regions=tuple(replace(r, span=None) for r in sample.regions))
    record = json.loads(pack_sample(sample)[1])
    with pytest.raises(SampleError) as caught:
        parse_sample("0", sample.jpeg, json.dumps(change(record)).encode())
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000],
    ids=["empty", "cut", "not UTF-8", "deep", "a number of 5000 digits"],
)
def test_damaged_json_is_refused(make_sample: MakeSample, text: bytes) -> None:
    with pytest.raises(SampleError) as caught:
        parse_sample("0", make_sample().jpeg, text)
    assert caught.value.reason == "bad_json"


def test_random_damage_never_raises_anything_else(make_sample: MakeSample) -> None:
    """A reader drops a damaged sample under a reason; it is never stopped by one."""
    sample = make_sample()
    jpeg, text = pack_sample(sample)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(text)
        for place in rng.integers(0, len(text), rng.integers(1, 4)):
            damaged[place] = rng.integers(32, 127)
        try:
            parse_sample("0", jpeg, bytes(damaged))
        except SampleError:
            refused += 1
    assert refused > 100


def test_jpeg_size_reads_the_header_alone(make_jpeg: Callable[..., bytes]) -> None:
    data = make_jpeg(31, 17)
    assert jpeg_size(data) == (31, 17)
    assert jpeg_size(data[:-10]) == (31, 17)


@pytest.mark.parametrize("side", [8001, 20_000, 65_535])
def test_huge_images_are_refused_by_their_header(
    make_jpeg: Callable[..., bytes], side: int
) -> None:
    data = bytearray(make_jpeg(16, 16))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    with pytest.raises(SampleError) as caught:
        jpeg_size(bytes(data))
    assert caught.value.reason == "huge_image"
