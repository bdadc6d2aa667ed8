import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sources.base import BadShardError, Reject
from data_pipeline.sources.imagenet import ClassPicture, ImageNetSource, read_class_names

TENCH, CRANE = "n01440764", "n02012849"


def draw(path: Path, seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, "JPEG")
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Two classes, three pictures."""
    folder = tmp_path / "train"
    for number, (wnid, picture) in enumerate([(TENCH, 10026), (TENCH, 7), (CRANE, 1)]):
        draw(folder / wnid / f"{wnid}_{picture}.JPEG", number)
    return folder


def read(source: ImageNetSource, shard: str) -> list[ClassPicture | Reject]:
    return list(source.read(shard))


def test_folders_are_classes_and_their_pictures_are_in_order(train: Path) -> None:
    source = ImageNetSource()
    shards = source.shards(str(train))
    assert shards == [str(train / TENCH), str(train / CRANE)]
    first, second = read(source, shards[0])
    assert isinstance(first, ClassPicture)
    assert isinstance(second, ClassPicture)
    assert (first.id, first.image, first.wnid) == (
        "n01440764_10026",
        "n01440764_10026.JPEG",
        "n01440764",
    )
    assert first.name == "tench"  # the first of timm's lemmas
    assert first.data == (train / TENCH / first.image).read_bytes()
    assert [first.key, second.key] == ["01440764000010026", "01440764000000007"]
    assert source.shards([str(train / CRANE)]) == [str(train / CRANE)]


def test_only_some_pictures_are_read(train: Path) -> None:
    found = ImageNetSource().read(str(train / TENCH), {"n01440764_7.JPEG"})
    assert [p.id for p in found if isinstance(p, ClassPicture)] == ["n01440764_7"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_is_a_class_or_holds_several(train: Path, tmp_path: Path, suffix: str) -> None:
    mode = "w:gz" if suffix == ".tar.gz" else "w"
    one, all_ = tmp_path / "tars" / f"{TENCH}{suffix}", tmp_path / "tars" / f"train{suffix}"
    one.parent.mkdir()
    with tarfile.open(one, mode) as tar:
        for file in sorted((train / TENCH).iterdir()):
            tar.add(file, file.name)
    with tarfile.open(all_, mode) as tar:
        tar.add(train, "train")
    source = ImageNetSource()
    assert source.shards(str(tmp_path / "tars")) == [str(one), str(all_)]
    assert source.shards(str(tmp_path / "tars" / f"*{suffix}")) == [str(one), str(all_)]
    folders = {p.key: p for shard in source.shards(str(train)) for p in read(source, shard)}
    for shard, count in ((one, 2), (all_, 3)):
        found = read(source, str(shard))
        assert len(found) == count
        for picture in found:
            assert isinstance(picture, ClassPicture)
            twin = folders[picture.key]
            assert isinstance(twin, ClassPicture)
            assert (picture.data, picture.name, picture.id) == (twin.data, twin.name, twin.id)
    assert len(list(source.read(str(all_), {"n02012849_1.jpeg"}))) == 1


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({TENCH: "tench", CRANE: ["crane_(bird)", "Grus"]}),
        f"{TENCH} tench, Tinca tinca\n{CRANE} crane (bird)\n",
        f"{TENCH}\ttench, Tinca tinca\n{CRANE}\tcrane\n",
    ],
    ids=["JSON", "mapping", "words.txt"],
)
def test_class_names_of_any_kind_become_readable(train: Path, tmp_path: Path, text: str) -> None:
    names = tmp_path / "names"
    names.write_text(text)
    source = ImageNetSource(str(names))
    found = [p for shard in source.shards(str(train)) for p in read(source, shard)]
    assert [p.name for p in found if isinstance(p, ClassPicture)] == ["tench", "tench", "crane"]
    assert source.settings() != ImageNetSource().settings()
    assert read_class_names(names).keys() == {TENCH, CRANE}


def test_a_class_without_a_name_is_told(train: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text(json.dumps({TENCH: "tench"}))
    source = ImageNetSource(str(names))
    with pytest.raises(BadShardError, match=rf"{names} has no name for the class '{CRANE}'"):
        read(source, str(train / CRANE))
    tar = tmp_path / "train.tar"
    with tarfile.open(tar, "w") as out:
        out.add(train, "train")
    found = read(source, str(tar))
    (lost,) = (item for item in found if isinstance(item, Reject))
    assert (lost.reason, lost.key) == ("no_class_name", "02012849000000001")
    assert len(found) == 3


def test_what_is_no_synset_is_told(train: Path) -> None:
    draw(train / "cats" / "1.JPEG")
    source = ImageNetSource()
    assert str(train / "cats") in source.shards(str(train))
    with pytest.raises(BadShardError, match=r"cats is no synset; expected .* such as n01440764"):
        read(source, str(train / "cats"))


def test_other_files_and_second_numbers_are_counted(train: Path) -> None:
    (train / TENCH / "notes.txt").write_text("mine")
    draw(train / TENCH / "n01440764_7.png")
    (train / TENCH / "n01440764_8.JPEG").symlink_to(train / "gone")
    reasons = [
        p.reason for p in read(ImageNetSource(), str(train / TENCH)) if isinstance(p, Reject)
    ]
    assert sorted(reasons) == ["duplicate_key", "no_picture", "no_picture"]


def test_pictures_of_other_names_have_keys_of_their_own(train: Path) -> None:
    draw(train / TENCH / "ILSVRC2012_val_00000293.JPEG")
    draw(train / TENCH / "my fish.jpg")
    found = read(ImageNetSource(), str(train / TENCH))
    keys = [p.key for p in found]
    assert len(set(keys)) == 4
    assert all(key.isdigit() and key.startswith("01440764") and int(key) < 2**63 for key in keys)
    assert [p.key for p in read(ImageNetSource(), str(train / TENCH))] == keys


def test_errors_say_what_to_give(train: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither folders of classes, nor tars, nor pictures"):
        ImageNetSource().shards(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no file matches"):
        ImageNetSource().shards(str(tmp_path / "none" / "*.tar"))
    bad = tmp_path / "names"
    for text, message in (("cat\ndog\n", "names no class"), ("{", "can't be read")):
        bad.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(ImageNetSource(str(bad)), str(train / TENCH))
    with pytest.raises(ValueError, match=r"can't be read: .*No such file"):
        ImageNetSource(str(tmp_path / "gone")).settings()
