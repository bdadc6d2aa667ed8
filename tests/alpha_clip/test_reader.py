import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alpha_clip.reader import Shard, find_shards, read_samples
from alpha_clip.regions import RegionSample


@pytest.fixture
def folder(two_shards: Path, tmp_path: Path) -> Path:
    """Two finished shards to damage."""
    return Path(shutil.copytree(two_shards, tmp_path / "shards"))


def read(shard: Shard) -> tuple[list[RegionSample], dict[str, int]]:
    drops: Counter[str] = Counter()
    return list(read_samples(shard, drops)), dict(drops)


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
    names = [s.tar.parent for s in find_shards([str(folder), str(two_shards)])]
    assert names == [folder, folder, two_shards, two_shards]
    assert find_shards([]) == []


def test_only_manifests_count(folder: Path) -> None:
    (folder / "00000.done.json").unlink()
    (folder / "00009-abcdef01.tar").write_bytes(b"not finished")
    (shard,) = find_shards([str(folder)])
    assert shard.tar.name.startswith("00001-")


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
    data = shard.tar.read_bytes()
    content = len(data.rstrip(b"\0"))
    shard.tar.write_bytes(data[: int(share * content)])
    samples, drops = read(shard)
    assert len(samples) < 3
    assert len(samples) + drops["lost_in_tar"] + drops.get("incomplete", 0) >= 3
    assert drops["lost_in_tar"] > 0


def test_a_tar_cut_between_samples_is_noticed(folder: Path) -> None:
    """Such a tar reads without any error; the manifest's count alone tells."""
    import tarfile

    shard = find_shards([str(folder)])[0]
    with tarfile.open(shard.tar) as tar:
        end = next(m.offset for m in tar if m.name == "2.jpg")
    shard.tar.write_bytes(shard.tar.read_bytes()[:end])
    samples, drops = read(shard)
    assert [s.key for s in samples] == ["0", "1"]
    assert drops["lost_in_tar"] == 1


def test_a_corrupt_member_is_counted_and_the_others_are_read(folder: Path) -> None:
    shard = find_shards([str(folder)])[0]
    data = shard.tar.read_bytes()
    assert data.count(b'"caption":') == 3
    second = data.index(b'"caption":', data.index(b'"caption":') + 1)
    shard.tar.write_bytes(data[:second] + b"#" + data[second + 1 :])
    samples, drops = read(shard)
    assert [s.key for s in samples] == ["0", "2"]
    assert drops == {"bad_json": 1}


def test_a_corrupt_picture_is_counted(folder: Path) -> None:
    shard = find_shards([str(folder)])[0]
    data = shard.tar.read_bytes()
    shard.tar.write_bytes(data.replace(b"\xff\xd8\xff", b"\0\0\0", 1))
    samples, drops = read(shard)
    assert [s.key for s in samples] == ["1", "2"]
    assert drops == {"corrupt_image": 1}


def test_a_sample_without_its_json_is_counted(folder: Path) -> None:
    import io
    import tarfile

    shard = find_shards([str(folder)])[0]
    buffer = io.BytesIO()
    with tarfile.open(shard.tar) as tar, tarfile.open(fileobj=buffer, mode="w") as out:
        for member in tar:
            if member.name != "1.json":
                out.addfile(member, tar.extractfile(member))
    shard.tar.write_bytes(buffer.getvalue())
    samples, drops = read(shard)
    assert [s.key for s in samples] == ["0", "2"]
    assert drops["incomplete"] == 1
