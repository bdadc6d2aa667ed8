"""Reading tars: what is a sample, every way in which a tar ends, and storages that fail."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
import tracemalloc
from contextlib import suppress

import pytest

from data_pipeline.engines.local import LocalEngine
from data_pipeline.runner import PipelineConfig, ShardTask
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.sources import tars
from data_pipeline.sources.base import BadShardError, Reject, StorageError
from data_pipeline.sources.grit import GritSource
from data_pipeline.sources.tars import read_groups

PACK = {"tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.fixture
def tar(grit, tmp_path):
    """The bytes of a tar of samples with these keys."""

    def make(keys, *others):
        samples = [grit.sample(key) for key in keys]
        return grit.tar(tmp_path / "made.tar", *samples, *others).read_bytes()

    return make


@pytest.fixture
def groups(tmp_path):
    """Write bytes to a file; return what is read of it, as `key, extensions`."""

    def read(data):
        path = tmp_path / "in.tar"
        path.write_bytes(data)
        found = read_groups(str(path))
        return [(g.key if g.members else g.fault, " ".join(g.members)) for g in found]

    return read


WHOLE = "jpg txt json"


# --- what belongs together ---------------------------------------------------------------------


def test_neighbours_of_one_name_are_a_sample(tar, groups):
    others = [("4.jpg", b""), ("5.jpg", b""), ("5.JSON", b""), ("6.jpg", b""), ("6.jpg", b"")]
    assert groups(tar("12", others)) == [
        *[(key, WHOLE) for key in "12"],
        *[("4", "jpg"), ("5", "jpg json"), ("6", "jpg"), ("6", "jpg")],
    ]


def test_one_name_in_two_folders_is_two_samples(tar, groups):
    others = [("a/7.jpg", b"of a"), ("b/7.json", b"{}"), ("./b/7.txt", b"")]
    assert groups(tar("", others)) == [("7", "jpg"), ("7", "json"), ("7", "txt")]


@pytest.mark.parametrize("name", ["", ".", "..", "/", "x/", ".jpg", "no extension", "\udcff"])
def test_odd_names_are_groups_like_others(tar, groups, name):
    found = groups(tar("1", [(name, b"x")], [("2.jpg", b"y")]))
    assert (found[0], found[-1]) == (("1", WHOLE), ("2", "jpg"))


def test_what_is_no_file_is_passed_over(grit, groups):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name, data in grit.sample("1"):
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
                other = tarfile.TarInfo("other")
                other.type, other.linkname = kind, "/etc/passwd"
                made.addfile(other)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    assert groups(buffer.getvalue()) == [("1", WHOLE)]


def test_file_of_a_stated_terabyte_is_not_read_whole(groups, monkeypatch, tmp_path):
    monkeypatch.setattr(tars, "MAX_FILE_BYTES", 1 << 20)
    sparse = tarfile.TarInfo("1.jpg")
    sparse.size = 5
    sparse.pax_headers = {"GNU.sparse.map": "0,5", "GNU.sparse.size": str(1 << 40)}
    with tarfile.open(tmp_path / "in.tar", "w", format=tarfile.PAX_FORMAT) as made:
        made.addfile(sparse, io.BytesIO(b"x" * 5))
    group = next(read_groups(str(tmp_path / "in.tar")))
    assert len(group.members["jpg"]) == 1 << 20


# --- how a tar ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACK)
def test_compressed_tars_are_read(tar, groups, kind):
    assert groups(PACK[kind](tar("123"))) == [(key, WHOLE) for key in "123"]


def before_the_end_mark(data):
    end = data.rindex(b"}") + 1  # of the last json
    return data[: end + -end % 512]


def test_tar_that_ends_early_is_never_taken_for_a_whole_one(tar, groups):
    data = before_the_end_mark(tar("123"))
    for end in [*range(100), *range(100, len(data), 997), len(data)]:
        try:
            found = groups(data[:end])
        except BadShardError:
            continue
        assert found == [*[(key, WHOLE) for key in "123"[: len(found) - 1]], ("truncated_tar", "")]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tar_that_ends_early_loses_no_sample_silently(tar, groups, kind):
    data = PACK[kind](tar("123"))
    for end in [*range(100), *range(100, len(data), 997), len(data) - 1]:
        try:
            found = groups(data[:end])
        except BadShardError:
            continue
        whole = [(key, WHOLE) for key in "123"]
        assert found in (whole, [*whole[: len(found) - 1], ("truncated_tar", "")])


@pytest.mark.parametrize("zeros", [512, 1024, 10_240, 1 << 16])
def test_padding_after_the_end_mark_is_as_tools_make_it(tar, groups, zeros):
    data = before_the_end_mark(tar("12")) + bytes(zeros)
    assert groups(data) == [("1", WHOLE), ("2", WHOLE)]


def test_tail_of_zeros_is_not_taken_for_the_end(tar, groups):
    data = tar([str(i) for i in range(60)])
    half = len(data) // 2
    found = groups(data[:half] + bytes(len(data) - half))
    assert found[-1] == ("truncated_tar", "")
    assert 20 < len(found) < 40


def test_tar_behind_another_is_noticed(tar, groups):
    assert groups(tar("12") + tar("34")) == [("1", WHOLE), ("2", WHOLE), ("truncated_tar", "")]


def test_tar_without_members_is_empty(tar, groups):
    assert groups(tar("")) == []


@pytest.mark.parametrize("seed", range(4))
def test_damage_of_any_kind_is_a_reject_or_a_bad_shard(grit, tmp_path, tar, seed):
    chance = random.Random(seed)
    whole, path = tar("1234"), tmp_path / "in.tar"
    starts = [start for start, _ in grit.offsets(tmp_path / "made.tar").values()]
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 3])):
            start = chance.choice(starts)
            data[start + chance.choice([156, chance.randrange(512), *range(124, 136)])] = (
                chance.choice([*b"0789xLKSgD", 0, 0x80, 0xFF])
            )
            header = bytearray(data[start : start + 512])
            header[148:156] = b" " * 8  # a sum that fits, so that the header is believed
            data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        path.write_bytes(PACK[chance.choice(list(PACK))](bytes(data)))
        with suppress(BadShardError):
            list(GritSource().read(str(path)))


# --- a damaged header costs its own sample -----------------------------------------------------

# Which headers are damaged -> what is read. Samples are 1, 2, 3, each with jpg, txt and json.
HURT = {
    "jpg": (["2.jpg"], [("1", WHOLE, None), ("2", "txt json", "damaged_tar"), ("3", WHOLE, None)]),
    "txt": (["2.txt"], [("1", WHOLE, None), ("2", "jpg json", None), ("3", WHOLE, None)]),
    "json": (["2.json"], [("1", WHOLE, None), ("2", "jpg txt", "damaged_tar"), ("3", WHOLE, None)]),
    "two of them": (
        ["2.jpg", "2.txt"],
        [("1", WHOLE, None), ("2", "json", "damaged_tar"), ("3", WHOLE, None)],
    ),
    "a whole sample": (
        ["2.jpg", "2.txt", "2.json"],
        [("1", WHOLE, None), ("", "", "damaged_tar"), ("3", WHOLE, None)],
    ),
    "the first sample's second": (
        ["1.json"],
        [("1", "jpg txt", "damaged_tar"), ("2", WHOLE, None), ("3", WHOLE, None)],
    ),
    "the last": (
        ["3.json"],
        [("1", WHOLE, None), ("2", WHOLE, None), ("3", "jpg txt", "damaged_tar")],
    ),
    "all of the last sample": (
        ["3.jpg", "3.txt", "3.json"],
        [("1", WHOLE, None), ("2", WHOLE, None), ("", "", "damaged_tar")],
    ),
    "across two samples": (
        ["2.json", "3.jpg"],
        [("1", WHOLE, None), ("2", "jpg txt", "damaged_tar"), ("3", "txt json", "damaged_tar")],
    ),
}


@pytest.mark.parametrize("name", HURT)
@pytest.mark.parametrize("kind", PACK)
def test_reading_goes_on_behind_a_damaged_header(grit, tar, tmp_path, name, kind):
    headers, expected = HURT[name]
    data, path = bytearray(tar("123")), tmp_path / "made.tar"
    for header in headers:
        data[grit.offsets(path)[header][0] + 130] ^= 8  # a digit of its size or time
    path.write_bytes(PACK[kind](bytes(data)))
    found = [(g.key, " ".join(g.members), g.fault) for g in read_groups(str(path))]
    assert found == expected


def test_a_flipped_bit_in_any_header_costs_at_most_its_sample(grit, tar, tmp_path):
    """And what came in is what is there plus what was rejected."""
    data, path = tar("1234"), tmp_path / "made.tar"
    offsets = grit.offsets(path)
    chance = random.Random(0)
    for header, (start, _) in list(offsets.items())[1:]:
        for _ in range(12):
            damaged = bytearray(data)
            damaged[start + chance.randrange(500)] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            items = list(GritSource().read(str(path)))
            rejects = [item.reason for item in items if isinstance(item, Reject)]
            keys = [item.key for item in items if not isinstance(item, Reject)]
            lost = {} if header.endswith("txt") else {header[0]}
            assert {*"1234"} - {*keys} <= {*lost}
            assert len(items) == 4
            assert set(rejects) <= {"damaged_tar"}


# --- storages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACK)
def test_failure_in_the_middle_is_never_taken_for_an_early_end(tar, flaky, kind):
    data = flaky.files["0.tar"] = PACK[kind](tar("123"))
    for flaky.fail_at in [0, 1, 3, 100, 512, 5000, len(data) // 2, len(data) - 1]:
        with pytest.raises(StorageError, match="connection reset by peer"):
            list(read_groups("flaky://0.tar"))
    flaky.fail_at = None
    assert [group.key for group in read_groups("flaky://0.tar")] == list("123")


def test_storage_package_that_is_missing_is_no_bad_shard():
    with pytest.raises(ValueError, match="Protocol not known: nowhere"):
        list(read_groups("nowhere://0.tar"))


def test_shard_is_tried_again_after_a_failure(tar, flaky, monkeypatch, tmp_path):
    flaky.files["0.tar"] = tar("123")
    opened, open_file = [], flaky.open

    def heal(self, *arguments, **options):
        opened.append(1)
        flaky.fail_at = 20_000 if len(opened) == 1 else None
        return open_file(self, *arguments, **options)

    monkeypatch.setattr(flaky, "open", heal)
    config = PipelineConfig(GritSource(), BoxSegmenter())
    tasks = [ShardTask("flaky://0.tar", 0)]
    (outcome,) = LocalEngine().run(tasks, tmp_path / "out", config, workers=1)
    assert (outcome.manifest.samples, outcome.manifest.rejects, len(opened)) == (3, {}, 2)


@pytest.fixture
def large(grit, tmp_path):
    """A tar of twelve samples with a megabyte each."""
    samples = [grit.sample(str(i), random.Random(i).randbytes(1_000_000)) for i in range(12)]
    return grit.tar(tmp_path / "large.tar", *samples).read_bytes()


@pytest.mark.parametrize("fault", [None, "plain"])
def test_http_tar_streams(server, large, fault):
    server.files["/0.tar"], server.fault = large, fault
    found = read_groups(f"{server.url}/0.tar")
    next(found)
    assert len(server.requests) <= 2  # its size, and the first block
    assert [group.key for group in found] == [str(i) for i in range(1, 12)]
    assert len(server.requests) <= 6


@pytest.mark.parametrize("fault", ["cut", "page", "busy"])
def test_http_failure_is_never_taken_for_an_early_end(server, large, fault):
    server.files["/0.tar"], server.fault = large, fault
    found = read_groups(f"{server.url}/0.tar")
    assert [group.key for group in (next(found), next(found))] == ["0", "1"]
    with pytest.raises(StorageError):
        list(found)


def test_remote_tar_streams(flaky, large):
    flaky.files["0.tar"] = large
    next(read_groups("flaky://0.tar"))
    assert flaky.bytes_read < 1_100_000


def test_memory_does_not_grow_with_the_samples(grit, tmp_path):
    picture = grit.encode(grit.image(6, 8))

    def peak(count):
        path = grit.tar(
            tmp_path / f"{count}.tar", *(grit.sample(str(i), picture) for i in range(count))
        )
        tracemalloc.start()
        samples = sum(not isinstance(item, Reject) for item in GritSource().read(str(path)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert samples == count
        return peak

    peak(20)  # what is loaded at first use
    assert peak(2000) - peak(100) < 1900 * 200  # a key each; the members would be 15 times that
