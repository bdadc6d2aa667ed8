import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

import alpha_clip
from alpha_clip.drops import REASONS, Drops
from alpha_clip.reader import Shard, find_shards, read_samples
from alpha_clip.regions import RegionSample
from data_pipeline.runner import PipelineConfig, ShardTask, process_shard
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.shard_files import Layout
from data_pipeline.sources.grit import GritSource


@pytest.fixture
def folder(two_shards: Path, tmp_path: Path) -> Path:
    """Two finished shards to damage."""
    return Path(shutil.copytree(two_shards, tmp_path / "shards"))


def read(shard: Shard, *part: int) -> tuple[list[RegionSample], dict[str, int]]:
    drops = Drops()
    return list(read_samples(shard, drops, *part)), drops.counts()


def test_what_was_written_is_read_in_order(
    two_shards: Path, make_sample: Callable[..., RegionSample]
) -> None:
    shards = find_shards([str(two_shards)])
    assert [s.samples for s in shards] == [3, 3]
    samples, drops = read(shards[0])
    assert drops == {}
    assert samples[0] == make_sample("0", ("red", "blue"))
    assert [s.key for shard in shards for s in read(shard)[0]] == list("012345")


def test_folders_are_taken_in_the_order_given(two_shards: Path, folder: Path) -> None:
    names = [s.file.parent for s in find_shards([str(folder), str(two_shards)])]
    assert names == [folder, folder, two_shards, two_shards]
    assert find_shards([]) == []


def test_only_manifests_count(folder: Path) -> None:
    (folder / "00000.done.json").unlink()
    (folder / "00009-abcdef01.tar").write_bytes(b"not finished")
    (shard,) = find_shards([str(folder)])
    assert shard.file.name.startswith("00001-")


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "00000-abcdef01.tar").write_bytes(b"not finished")
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"no finished shards .*alpha-clip-data grit"):
            find_shards([str(directory)])


MANIFESTS: dict[str, Any] = {
    "a list": [],
    "a number": 5,
    "no tar": {"samples": 3, "bytes": 5},
    "no samples": {"tar": "a.tar", "bytes": 5},
    "no bytes": {"tar": "a.tar", "samples": 3},
    "tar a number": {"tar": 5, "samples": 3, "bytes": 5},
    "samples null": {"tar": "a.tar", "samples": None, "bytes": 5},
    "samples a word": {"tar": "a.tar", "samples": "many", "bytes": 5},
    "samples infinite": {"tar": "a.tar", "samples": float("inf"), "bytes": 5},
}


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_damaged_manifests_are_refused(folder: Path, manifest: Any) -> None:
    (folder / "00001.done.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"00001\.done\.json is no manifest of a shard"):
        find_shards([str(folder)])


@pytest.mark.parametrize("data", [b"", b'{"tar": ', b"\xff"], ids=["empty", "cut", "not UTF-8"])
def test_manifests_that_are_no_json_are_refused(folder: Path, data: bytes) -> None:
    (folder / "00000.done.json").write_bytes(data)
    with pytest.raises(ValueError, match="is no manifest of a shard"):
        find_shards([str(folder)])


def test_a_missing_tar_is_refused(folder: Path) -> None:
    next(folder.glob("00000-*.tar")).unlink()
    with pytest.raises(ValueError, match=r"00000-.*\.tar is missing or not \d+ bytes long"):
        find_shards([str(folder)])


@pytest.mark.parametrize("change", [-512, -1, 1])
def test_a_tar_of_another_size_is_refused(folder: Path, change: int) -> None:
    tar = next(folder.glob("00001-*.tar"))
    data = tar.read_bytes()
    tar.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(ValueError, match="is missing or not"):
        find_shards([str(folder)])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8])
def test_what_a_truncated_tar_lost_is_counted(folder: Path, share: float) -> None:
    shard = find_shards([str(folder)])[0]
    data = shard.file.read_bytes()
    content = len(data.rstrip(b"\0"))
    shard.file.write_bytes(data[: int(share * content)])
    samples, drops = read(shard)
    assert len(samples) < 3
    assert len(samples) + drops["lost_in_tar"] + drops["incomplete"] == 3
    assert drops["lost_in_tar"] + drops["incomplete"] > 0


def test_a_tar_cut_between_samples_is_noticed(folder: Path) -> None:
    """Such a tar reads without any error; the manifest's count alone tells."""
    shard = find_shards([str(folder)])[0]
    with tarfile.open(shard.file) as tar:
        end = next(m.offset for m in tar if m.name == "2.jpg")
    shard.file.write_bytes(shard.file.read_bytes()[:end])
    samples, drops = read(shard)
    assert [s.key for s in samples] == ["0", "1"]
    assert drops["lost_in_tar"] == 1


def test_a_corrupt_member_is_counted_and_the_others_are_read(folder: Path) -> None:
    shard = find_shards([str(folder)])[0]
    data = shard.file.read_bytes()
    assert data.count(b'"caption":') == 3
    second = data.index(b'"caption":', data.index(b'"caption":') + 1)
    shard.file.write_bytes(data[:second] + b"#" + data[second + 1 :])
    samples, drops = read(shard)
    assert [s.key for s in samples] == ["0", "2"]
    assert drops == {"bad_json": 1}


@pytest.mark.parametrize(("member", "left"), [("0.jpg", "12"), ("1.jpg", "02"), ("1.json", "02")])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_damaged_header_costs_its_own_sample(
    folder: Path, member: str, left: str, parts: int
) -> None:
    shard = find_shards([str(folder)])[0]
    with tarfile.open(shard.file) as tar:
        start = next(m.offset for m in tar if m.name == member)
    data = bytearray(shard.file.read_bytes())
    data[start + 130] ^= 8  # a digit of its size
    shard.file.write_bytes(data)
    found = [read(shard, part, parts) for part in range(parts)]
    assert sorted(s.key for samples, _ in found for s in samples) == list(left)
    lost = sum(d["incomplete"] + d["lost_in_tar"] for _, d in found)
    assert lost == 1


def test_a_corrupt_picture_is_counted(folder: Path) -> None:
    shard = find_shards([str(folder)])[0]
    data = shard.file.read_bytes()
    shard.file.write_bytes(data.replace(b"\xff\xd8\xff", b"\0\0\0", 1))
    samples, drops = read(shard)
    assert [s.key for s in samples] == ["1", "2"]
    assert drops == {"corrupt_image": 1}


def test_a_sample_without_its_json_is_counted(folder: Path) -> None:
    shard = find_shards([str(folder)])[0]
    buffer = io.BytesIO()
    with tarfile.open(shard.file) as tar, tarfile.open(fileobj=buffer, mode="w") as out:
        for member in tar:
            if member.name != "1.json":
                out.addfile(member, tar.extractfile(member))
    shard.file.write_bytes(buffer.getvalue())
    samples, drops = read(shard)
    assert [s.key for s in samples] == ["0", "2"]
    assert drops["incomplete"] == 1


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_of_a_shard_are_disjoint_and_complete(two_shards: Path, parts: int) -> None:
    shard = find_shards([str(two_shards)])[0]
    found = [read(shard, part, parts) for part in range(parts)]
    assert all(drops == {} for _, drops in found)
    assert [len(samples) for samples, _ in found] == [len(range(i, 3, parts)) for i in range(parts)]
    assert sorted(s.key for samples, _ in found for s in samples) == ["0", "1", "2"]


def test_a_loss_is_counted_by_the_part_that_it_belongs_to(folder: Path) -> None:
    shard = find_shards([str(folder)])[0]
    data = shard.file.read_bytes()
    shard.file.write_bytes(data.replace(b"\xff\xd8\xff", b"\0\0\0", 1))
    assert [read(shard, part, 2)[1] for part in (0, 1)] == [{"corrupt_image": 1}, {}]
    shard.file.write_bytes(b"")
    assert [read(shard, part, 2)[1]["lost_in_tar"] for part in (0, 1)] == [2, 1]
    assert [read(shard, part, 2)[1]["damaged_tar"] for part in (0, 1)] == [1, 0]


# --- masks beside the pixels -------------------------------------------------------------------


@pytest.fixture
def sidecar(grit: Any, tmp_path: Path) -> Path:
    """Shards of the same input in both layouts: `tar` and `sidecar`; pictures of many kinds."""
    turned = grit.image().getexif()
    turned[0x0112] = 6
    samples = [
        grit.sample("1"),
        grit.sample("2", grit.encode(grit.image(), "PNG"), "png"),
        grit.sample("3", grit.encode(grit.image(), exif=turned)),
        grit.sample("4", b"no picture"),
        grit.sample("1"),
        grit.sample("5", grit.encode(grit.image().convert("L"))),
        grit.sample("6", grit.encode(grit.image().convert("CMYK"))),
    ]
    task = ShardTask(str(grit.tar(tmp_path / "in.tar", *samples)), 0)
    for layout in get_args(Layout):
        config = PipelineConfig(GritSource(), BoxSegmenter(), layout=layout)
        manifest = process_shard(task, tmp_path / layout, config)
        assert manifest.rejects == {"corrupt_image": 1, "duplicate_key": 1}
    return tmp_path


def one_shard(folder: Path, **more: Any) -> Shard:
    (shard,) = find_shards([str(folder)], **more)
    return shard


def test_both_layouts_give_the_same_samples_to_the_byte(sidecar: Path) -> None:
    shard = one_shard(sidecar / "sidecar")
    assert (shard.file.name, shard.pictures) == ("00000.regions.jsonl", str(sidecar / "in.tar"))
    samples, drops = read(shard)
    assert [s.key for s in samples] == ["1", "2", "3", "5", "6"]
    assert [s.reencoded for s in samples] == [False, True, True, False, True]
    assert samples == read(one_shard(sidecar / "tar"))[0]
    assert drops == {}
    halves = [read(shard, part, 2)[0] for part in (0, 1)]
    assert [[s.key for s in half] for half in halves] == [["1", "3", "6"], ["2", "5"]]
    assert shard.file.stat().st_size < 6000 < one_shard(sidecar / "tar").file.stat().st_size


def test_originals_that_moved_are_found_again(sidecar: Path) -> None:
    before = read(one_shard(sidecar / "sidecar"))[0]
    (sidecar / "elsewhere").mkdir()
    (sidecar / "in.tar").rename(sidecar / "elsewhere" / "in.tar")
    with pytest.raises(ValueError, match=r"in\.tar, which is missing; say where .* \(originals\)"):
        find_shards([str(sidecar / "sidecar")])
    for place in (str(sidecar / "elsewhere"), f"file://{sidecar}/elsewhere/"):
        assert read(one_shard(sidecar / "sidecar", originals=place))[0] == before


def test_originals_over_any_storage(sidecar: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/in.tar", (sidecar / "in.tar").read_bytes())
    shard = one_shard(sidecar / "sidecar", originals="memory://bucket")
    assert read(shard) == read(one_shard(sidecar / "sidecar"))
    memory.rm("/bucket/in.tar")
    samples, drops = read(shard)
    assert samples == []
    assert drops == {"damaged_tar": 1, "missing_image": 5}


def test_a_sidecar_notices_other_pictures(sidecar: Path, grit: Any) -> None:
    """The third picture is another now, the fourth is gone, the rest are as they were."""
    shard = one_shard(sidecar / "sidecar")
    kept = [grit.sample("1"), grit.sample("2", grit.encode(grit.image(), "PNG"), "png")]
    grit.tar(sidecar / "in.tar", *kept, grit.sample("3", grit.encode(grit.image(seed=9))))
    samples, drops = read(shard)
    assert [s.key for s in samples] == ["1", "2"]
    assert drops == {"other_image": 1, "missing_image": 2}


def test_a_truncated_original_is_counted(sidecar: Path) -> None:
    tar = sidecar / "in.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 3])
    samples, drops = read(one_shard(sidecar / "sidecar"))
    assert 0 < len(samples) < 5
    assert len(samples) + drops["missing_image"] == 5


@pytest.mark.parametrize("parts", [1, 2])
def test_a_damaged_header_of_the_original_costs_one_sample(sidecar: Path, parts: int) -> None:
    tar = sidecar / "in.tar"
    with tarfile.open(tar) as members:
        start = next(m.offset for m in members if m.name == "2.png")
    data = bytearray(tar.read_bytes())
    data[start + 130] ^= 8  # a digit of its size
    tar.write_bytes(data)
    shard = one_shard(sidecar / "sidecar")
    found = [read(shard, part, parts) for part in range(parts)]
    assert sorted(s.key for samples, _ in found for s in samples) == ["1", "3", "5", "6"]
    assert sum(drops["missing_image"] for _, drops in found) == 1


def test_damaged_lines_of_a_sidecar_are_counted(sidecar: Path) -> None:
    shard = one_shard(sidecar / "sidecar")
    lines = shard.file.read_bytes().splitlines(keepends=True)
    lines[0] = lines[0][:40] + b"\n"
    lines[1] = lines[1].replace(b'"area":', b'"area":1')
    lines[2] = b'{"key": "3", "crc32": "x"}\n'
    shard.file.write_bytes(b"".join(lines))
    samples, drops = read(shard)
    assert [s.key for s in samples] == ["5", "6"]
    assert drops == {"bad_json": 1, "bad_area": 1, "bad_schema": 1}


def test_a_cut_sidecar_is_refused_before_work(sidecar: Path) -> None:
    file = sidecar / "sidecar" / "00000.regions.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"00000\.regions\.jsonl is missing or not \d+ bytes"):
        find_shards([str(sidecar / "sidecar")])


# --- what was dropped --------------------------------------------------------------------------


def test_drops_are_told_a_few_times_and_counted_always(caplog: pytest.LogCaptureFixture) -> None:
    drops = Drops(2)
    with caplog.at_level("WARNING", "alpha_clip.drops"):
        for i in range(10):
            drops.reader(1).add("bad_rle", f"sample {i}")
        drops.add("a new reason", "sample 11", times=2)
    assert drops.counts() == {"bad_rle": 10, "other": 2}
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "dropped (bad_rle): sample 0",
        "dropped (bad_rle): sample 1",
        "dropped (bad_rle): sample 2; further ones are only counted",
        "dropped (a new reason): sample 11",
    ]


def test_every_reason_that_readers_give_has_a_name_of_its_own() -> None:
    package = Path(alpha_clip.__file__).parent
    files = ("samples", "jpegs", "sidecar", "sampling", "reader", "data")
    text = "".join((package / f"{name}.py").read_text() for name in files)
    given = set(re.findall(r"SampleError\(\s*\"(\w+)\"", text))
    given |= set(re.findall(r"drops\.add\(\"(\w+)\"", text))
    assert len(given) > 15
    assert given <= set(REASONS)
