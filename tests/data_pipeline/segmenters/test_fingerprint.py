"""Weights are known by what is in them."""

import pytest

from data_pipeline.segmenters.fingerprint import fingerprint

SMALL = {"blocks": 4, "block_bytes": 10}


def test_moving_a_file_changes_nothing(tmp_path):
    (tmp_path / "a.pth").write_bytes(bytes(range(200)))
    before = fingerprint(str(tmp_path / "a.pth"))
    (tmp_path / "a.pth").rename(tmp_path / "b.bin")
    assert fingerprint(str(tmp_path / "b.bin")) == before
    assert str(tmp_path) not in before


@pytest.mark.parametrize("size", [1, 39, 40, 41, 1000])
@pytest.mark.parametrize("place", ["first", "last"])
def test_another_content_is_another_fingerprint(tmp_path, size, place):
    path, content = tmp_path / "a.pth", bytearray(size)
    path.write_bytes(content)
    before = fingerprint(str(path), **SMALL)
    content[{"first": 0, "last": size - 1}[place]] ^= 1
    path.write_bytes(content)
    assert fingerprint(str(path), **SMALL) != before


def test_every_byte_of_a_small_file_counts(tmp_path):
    path = tmp_path / "a.pth"
    seen = set()
    for place in range(40):
        path.write_bytes(bytes(place) + b"1" + bytes(39 - place))
        seen.add(fingerprint(str(path), **SMALL))
    assert len(seen) == 40


def test_length_counts_where_the_blocks_are_the_same(tmp_path):
    (tmp_path / "a.pth").write_bytes(bytes(1000))
    (tmp_path / "b.pth").write_bytes(bytes(1001))
    one, other = (fingerprint(str(tmp_path / n), **SMALL) for n in ("a.pth", "b.pth"))
    assert one != other


def test_large_file_is_read_in_part(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(bytes(2**20))
    before = fingerprint(str(path), **SMALL)
    path.write_bytes(bytes(1000) + b"1" + bytes(2**20 - 1001))
    assert fingerprint(str(path), **SMALL) == before


def test_folder_is_its_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "deeper").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text("weights")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert fingerprint(one) == fingerprint(two)
    (tmp_path / "two" / "config.json").write_text("{ }")
    assert fingerprint(one) != fingerprint(two)


def test_what_is_not_there_stands_for_itself(tmp_path):
    assert fingerprint("facebook/sam2.1-hiera-large") == "facebook/sam2.1-hiera-large"
    assert fingerprint(str(tmp_path)) == str(tmp_path)
