"""GRIT as parquet: both layouts, every bad row counted alone, every bad file a bad shard."""

import json
import os
import random
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.runner import PipelineConfig, ShardTask, process_shard
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.shard_files import read_shard
from data_pipeline.shards import read_manifests
from data_pipeline.sources.base import BadShardError, Reject, SourceSample, StorageError
from data_pipeline.sources.grit import GritSource
from data_pipeline.sources.grit_parquet import GritParquetSource


class Folder:
    """A parquet file and a folder of pictures, and what is read of them."""

    def __init__(self, path, grit):
        self.path = path
        self.grit = grit
        self.file = path / "part_0.parquet"
        (path / "images").mkdir()

    def row(self, id, **changes):
        """A row of GRIT's own columns, with its picture in the folder."""
        if isinstance(id, int):
            picture = self.grit.encode(self.grit.image(seed=id))
            (self.path / "images" / f"{id}.jpg").write_bytes(picture)
        return {
            "clip_similarity_vitb32": 0.27,
            "clip_similarity_vitl14": 0.21,
            "id": id,
            "url": f"http://example.org/{id}.jpg",
            "width": 80,
            "height": 60,
            **self.grit.record(),
            **changes,
        }

    def write(self, *rows, schema=None, **options):
        pq.write_table(pa.Table.from_pylist(list(rows), schema), self.file, **options)

    def source(self, **settings):
        return GritParquetSource(**{"images": f"{self.path}/images/{{id}}", **settings})

    def read(self, *rows, schema=None, **settings):
        """Write rows, if there are any, and read them: good samples by key, and the rejects."""
        if rows:
            self.write(*rows, schema=schema)
        items = list(self.source(**settings).read(str(self.file)))
        good = {item.key: item for item in items if isinstance(item, SourceSample)}
        return good, [item for item in items if isinstance(item, Reject)]


@pytest.fixture
def folder(tmp_path, grit):
    return Folder(tmp_path, grit)


def reasons(rejects):
    return [reject.reason for reject in rejects]


# --- a large file is several shards --------------------------------------------------------------


@pytest.mark.parametrize("rows_per_group", [1, 3, 4, 100])
@pytest.mark.parametrize("rows_per_shard", [1, 4, 10, 50])
def test_shards_of_a_file_are_its_rows_in_order(folder, rows_per_group, rows_per_shard):
    folder.write(*(folder.row(i) for i in range(10)), row_group_size=rows_per_group)
    source = folder.source(rows_per_shard=rows_per_shard)
    names = source.shards([str(folder.file)])
    assert len(names) == -(-10 // rows_per_shard)
    parts = [[item.key for item in source.read(name)] for name in names]
    assert [len(part) for part in parts[:-1]] == [rows_per_shard] * (len(parts) - 1)
    assert [key for part in parts for key in part] == [str(i) for i in range(10)]


def test_names_of_shards(folder):
    folder.write(*(folder.row(i) for i in range(5)))
    path = str(folder.file)
    assert folder.source(rows_per_shard=5).shards([path]) == [path]
    names = [f"{path}#000000000", f"{path}#000000002", f"{path}#000000004"]
    assert folder.source(rows_per_shard=2).shards([path]) == names
    whole = folder.source(rows_per_shard=2).read(path)
    assert len(list(whole)) == 5  # a file's own name is all of it


def test_what_is_no_parquet_is_a_shard_that_says_so(folder, tmp_path):
    folder.write(folder.row(1))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    names = [str(folder.file), str(tmp_path / "bad.parquet")]
    assert folder.source().shards(names) == names
    with pytest.raises(BadShardError, match="no readable parquet"):
        list(folder.source().read(names[1]))


def test_a_large_file_makes_several_shards_by_the_command(folder, tmp_path, monkeypatch):
    from data_pipeline.__main__ import main

    folder.write(*(folder.row(i) for i in range(5)))
    source = "data_pipeline.sources.grit_parquet.GritParquetSource"
    arguments = ["grit", "--input", str(folder.file), "--output", str(tmp_path / "out")]
    arguments += ["--source", source, "--source.images", f"{tmp_path}/images/{{id}}"]
    arguments += ["--source.rows_per_shard", "2", "--workers", "1"]
    arguments += ["--segmenter", "data_pipeline.segmenters.box.BoxSegmenter"]
    assert main(arguments) == 0
    manifests = read_manifests(tmp_path / "out").values()
    assert [manifest.samples for manifest in manifests] == [2, 2, 1]
    assert main(arguments) == 0


@pytest.mark.parametrize("rows", [0, -1])
def test_rows_per_shard_is_checked(rows):
    with pytest.raises(ValueError, match="rows_per_shard must be at least 1"):
        GritParquetSource(rows_per_shard=rows)


# --- both layouts ------------------------------------------------------------------------------


def test_rows_give_the_samples_that_the_same_tar_gives(folder, grit, tmp_path):
    folder.write(*(folder.row(i) for i in (1795296605919, 12, 345)))
    tar = grit.tar(tmp_path / "t.tar", *(grit.sample(k, id=int(k)) for k in ("12", "345")))
    from_tar = {item.key: item for item in GritSource(phrases="both").read(str(tar))}
    good, rejects = folder.read(phrases="both")
    assert (list(good), rejects) == (["1795296605919", "12", "345"], [])
    assert {key: good[key] for key in from_tar} == from_tar


def files_layout(folder, grit, write_lists=lambda value: value):
    """What img2dataset's `--output_format files` writes: every fourth download failed."""
    (folder.path / "00003").mkdir()
    folder.file = folder.path / "00003.parquet"
    for i in range(8):
        found = i % 4 != 2
        if found:
            path = folder.path / "00003" / f"00003{i:04d}.jpg"
            path.write_bytes(grit.encode(grit.image(seed=i)))
        record = grit.record()
        yield {
            "url": "http://example.org",
            "caption": record["caption"],
            "key": f"00003{i:04d}",
            "status": "success" if found else "failed_to_download",
            "error_message": None if found else "HTTP Error 404: Not Found",
            "width": 80 if found else None,
            "height": 60 if found else None,
            "original_width": 1024 if found else None,
            "original_height": 768 if found else None,
            "id": 1000 + i,
            "noun_chunks": write_lists(record["noun_chunks"]),
            "ref_exps": write_lists(record["ref_exps"]),
        }


@pytest.mark.parametrize("write_lists", [list, json.dumps], ids=["lists", "JSON text"])
def test_layout_of_img2dataset(folder, grit, write_lists):
    rows = files_layout(folder, grit, write_lists)
    good, rejects = folder.read(*rows, images=f"{folder.path}/{{shard}}/{{key}}", key="key")
    assert list(good) == [f"00003{i:04d}" for i in (0, 1, 3, 4, 5, 7)]
    assert [sample.id for sample in good.values()] == [
        "1000",
        "1001",
        "1003",
        "1004",
        "1005",
        "1007",
    ]
    assert all([p.text for p in s.phrases] == ["a red box", "a blue thing"] for s in good.values())
    assert [(r.key, r.reason, r.regions) for r in rejects] == [
        ("000030002", "missing_image", 2),
        ("000030006", "missing_image", 2),
    ]


def test_whole_road_from_a_storage(folder, grit, memory, tmp_path):
    rows = list(files_layout(folder, grit))
    folder.write(*rows)
    memory.pipe("/grit/00003.parquet", folder.file.read_bytes())
    for picture in (folder.path / "00003").iterdir():
        memory.pipe(f"/grit/00003/{picture.name}", picture.read_bytes())
    source = GritParquetSource(images="memory://grit/{shard}/{key}", key="key", phrases="both")
    config = PipelineConfig(source, BoxSegmenter())
    manifest = process_shard(ShardTask("memory://grit/00003.parquet", 0), tmp_path / "out", config)
    assert (manifest.samples, manifest.regions) == (6, 18)
    assert manifest.rejects == {"missing_image": 2}
    assert manifest.input == {"path": "memory://grit/00003.parquet", "samples": 8, "regions": 24}
    assert len(list(read_shard(tmp_path / "out" / manifest.tar))) == 6


def test_whole_numbers_beside_a_null_are_whole_though_pandas_makes_them_floats(folder):
    schema = pa.schema(
        [("id", pa.float64()), *[f for f in fields(folder.row(1)) if f.name != "id"]]
    )
    good, rejects = folder.read(folder.row(1795296605919), folder.row(None), schema=schema)
    assert [(key, sample.id) for key, sample in good.items()] == [("1795296605919",) * 2]
    assert reasons(rejects) == ["bad_key"]


def fields(row):
    return list(pa.Table.from_pylist([row]).schema)


@pytest.mark.parametrize("kind", [pa.large_list(pa.large_list(pa.float32())), pa.string()])
def test_types_that_other_tools_choose(folder, kind):
    row = folder.row(7)
    if kind == pa.string():
        row["ref_exps"] = json.dumps(row["ref_exps"])
    schema = pa.schema(
        [
            ("id", pa.uint64()),
            ("caption", pa.large_string()),
            ("ref_exps", kind),
        ]
    )
    good, _ = folder.read(row, schema=schema)
    assert good["7"].phrases[0].box_xyxy_px == pytest.approx((8, 12, 40, 48), abs=0.01)


def test_sample_without_an_id_is_named_by_its_key(folder, grit):
    rows = [{**row, "id": None} for row in files_layout(folder, grit)]
    good, _ = folder.read(*rows, images=f"{folder.path}/{{shard}}/{{key}}", key="key")
    assert good["000030000"].id == "000030000"


# --- the pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp"])
def test_extension_is_found(folder, grit, extension):
    row = folder.row(1)
    picture = (folder.path / "images" / "1.jpg").rename(folder.path / "images" / f"1.{extension}")
    assert list(folder.read(row)[0]) == ["1"]
    picture.unlink()
    assert reasons(folder.read()[1]) == ["missing_image"]


@pytest.mark.parametrize("name", ["1.jpg", "deep/down/1.jpg", "a b/1 (x).JPG", "ü/1", "1"])
def test_column_may_hold_a_path_in_the_folder(folder, name):
    row = folder.row(1, file=name.replace("(x)", "x"))
    place = folder.path / "images" / (row["file"] if "." in name else row["file"] + ".png")
    place.parent.mkdir(parents=True, exist_ok=True)
    (folder.path / "images" / "1.jpg").rename(place)
    good, rejects = folder.read(row, images=f"{folder.path}/images/{{file}}")
    assert (list(good), rejects) == (["1"], [])


OUTSIDE = [
    "../secret",
    "../secret.jpg",
    "a/../../secret",
    "..",
    "{path}/secret",
    "//secret",
    "..\\secret",
    "file://{path}/secret",
    "a::file://{path}/secret",
    "*/secret",
    ".hidden",
    "",
    "a/",
    "a\0b",
    "a\nb",
    "%2e%2e/secret",
]


@pytest.mark.parametrize("name", [*OUTSIDE, None])
def test_name_that_leads_out_of_the_folder_is_not_followed(folder, name):
    row = folder.row(1, name=name and name.format(path=folder.path))
    (folder.path / "secret.jpg").write_bytes((folder.path / "images" / "1.jpg").read_bytes())
    good, (reject,) = folder.read(
        row, folder.row(2, name="2"), images=f"{folder.path}/images/{{name}}"
    )
    assert list(good) == ["2"]
    assert (reject.key, reject.reason, reject.regions) == ("1", "bad_path", 2)


def test_what_is_no_picture_is_rejected_for_what_it_is(folder, grit):
    rows = [folder.row(i) for i in range(1, 7)]
    images = folder.path / "images"
    (images / "1.jpg").unlink()
    (images / "2.jpg").write_bytes(b"")
    (images / "3.jpg").write_bytes(b"<html></html>")
    (images / "4.jpg").unlink()
    (images / "4.jpg").mkdir()
    header = grit.encode(grit.image())
    at = header.index(b"\xff\xc0") + 5
    (images / "5.jpg").write_bytes(header[:at] + (60_000).to_bytes(2, "big") * 2 + header[at + 4 :])
    good, rejects = folder.read(*rows)
    assert list(good) == ["6"]
    expected = ["missing_image", "corrupt_image", "corrupt_image", "missing_image", "huge_image"]
    assert reasons(rejects) == expected


def test_name_that_is_too_long_for_a_file_is_missing(folder):
    _, rejects = folder.read(folder.row(9, name="x" * 300), images=f"{folder.path}/{{name}}")
    assert reasons(rejects) == ["missing_image"]


def test_missing_picture_is_named(folder):
    row = folder.row(1)
    (folder.path / "images" / "1.jpg").unlink()
    _, (reject,) = folder.read(row)
    assert reject.detail.startswith(f"there is no {folder.path}/images/1.jpg or ")


def test_turned_picture_is_measured_upright(folder, grit):
    row = folder.row(1, original_width=800, original_height=600)
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder.path / "images" / "1.jpg").write_bytes(grit.encode(grit.image(), exif=exif))
    good, _ = folder.read(row)
    assert (good["1"].width, good["1"].height) == (60, 80)


def test_cropped_picture_is_refused(folder):
    crop = {"original_width": 600, "original_height": 600}
    good, rejects = folder.read(folder.row(1, **crop), folder.row(2))
    assert list(good) == ["2"]
    assert reasons(rejects) == ["cropped_image"]


# --- one bad row costs itself alone ------------------------------------------------------------

NAN = float("nan")
BAD_ROWS = {
    "no caption": ({"caption": None}, "missing_caption", 2),
    "no id": ({"id": None}, "bad_key", 2),
    "negative id": ({"id": -5}, "bad_key", 2),
    "same id": ({"id": 1}, "duplicate_key", 2),
    "no phrases": ({"ref_exps": []}, "no_phrases", 0),
    "phrases null": ({"ref_exps": None}, "no_phrases", 0),
}
BAD_PHRASES = {
    "NaN in the box": ([0.0, 9.0, NAN, 0.2, 0.5, 0.8, 0.9], "bad_phrase"),
    "NaN as score": ([0.0, 9.0, 0.1, 0.2, 0.5, 0.8, NAN], "bad_phrase"),
    "null in the box": ([0.0, 9.0, None, 0.2, 0.5, 0.8, 0.9], "bad_phrase"),
    "phrase null": (None, "bad_phrase"),
    "phrase empty": ([], "bad_phrase"),
    "outside": ([0.0, 9.0, 0.1, 0.2, 1.5, 0.8, 0.9], "box_outside"),
    "span beyond": ([0.0, 99.0, 0.1, 0.2, 0.5, 0.8, 0.9], "bad_span"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_costs_itself_alone(folder, name):
    change, reason, regions = BAD_ROWS[name]
    good, (reject,) = folder.read(folder.row(1), {**folder.row(2), **change}, folder.row(3))
    assert list(good) == ["1", "3"]
    assert (reject.rid, reject.reason, reject.regions) == (None, reason, regions)


@pytest.mark.parametrize("name", BAD_PHRASES)
def test_bad_phrase_costs_itself_alone(folder, grit, name):
    phrase, reason = BAD_PHRASES[name]
    good, rejects = folder.read(folder.row(1, ref_exps=[phrase, *grit.record()["ref_exps"]]))
    assert [p.rid for p in good["1"].phrases] == [1, 2]
    assert [(r.rid, r.reason) for r in good["1"].rejects] == [(0, reason)]
    assert rejects == []


@pytest.mark.parametrize("text", ["", "[[1, 2", "nan", "[" * 100_000])
def test_text_that_is_no_json_costs_its_row_alone(folder, text):
    rows = [folder.row(i) for i in (1, 2)]
    rows[0]["ref_exps"], rows[1]["ref_exps"] = text, json.dumps(rows[1]["ref_exps"])
    good, (reject,) = folder.read(*rows)
    assert list(good) == ["2"]
    assert (reject.key, reject.reason) == ("1", "bad_json")


@pytest.mark.parametrize("text", ["null", "7", '"words"', '{"a": 1}', "[]"])
def test_json_text_that_is_no_list_has_no_phrases(folder, text):
    _, (reject,) = folder.read(folder.row(1, ref_exps=text))
    assert reject.reason == "no_phrases"


def test_text_that_is_not_utf_8_costs_its_row_alone(folder):
    rows = [folder.row(i, caption=f"{folder.grit.caption} {i}") for i in (1, 2, 3)]
    folder.write(*rows, use_dictionary=False, compression="none")
    data = folder.file.read_bytes()
    assert data.count(b"thing 2") >= 1
    folder.file.write_bytes(data.replace(b"thing 2", b"th\xffng 2"))
    good, (reject,) = folder.read()
    assert list(good) == ["1", "3"]
    assert (reject.reason, "UTF-8" in reject.detail) == ("bad_text", True)


def test_key_that_is_no_file_name_is_refused(folder):
    rows = [folder.row(i, key=key) for i, key in enumerate(["1" * 65, "2" * 64, "3b", "", None])]
    good, rejects = folder.read(*rows, key="key")
    assert list(good) == ["2" * 64]
    assert reasons(rejects) == ["bad_key"] * 4


# --- bad files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "settings"),
    [
        ("id", {}),
        ("caption", {}),
        ("ref_exps", {}),
        ("ref_exps", {"phrases": "both"}),
        ("noun_chunks", {"phrases": "noun_chunks"}),
        ("key", {"key": "key"}),
        ("name", {"images": "/data/{name}"}),
    ],
)
def test_missing_column_is_a_bad_shard_and_is_named(folder, lost, settings):
    row = folder.row(1)
    row.pop(lost, None)
    with pytest.raises(BadShardError, match=rf"lacks the columns \['{lost}'\]; it has \['c"):
        folder.read(row, **settings)


def test_column_that_is_not_asked_for_may_be_missing(folder):
    row = folder.row(1)
    del row["noun_chunks"], row["width"], row["height"]
    assert list(folder.read(row)[0]) == ["1"]


def test_file_without_rows_has_no_samples(folder):
    folder.write(schema=pa.schema(fields(folder.row(1))))
    assert folder.read() == ({}, [])


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" * 20, b"<html></html>", bytes(5000)])
def test_what_is_no_parquet_is_a_bad_shard(folder, data):
    folder.file.write_bytes(data)
    with pytest.raises(BadShardError, match=r"part_0\.parquet is no readable parquet file"):
        folder.read()


def test_missing_file_is_a_bad_shard(folder):
    with pytest.raises(BadShardError, match="No such file"):
        folder.read()


def test_parquet_that_ends_early_is_a_bad_shard(folder):
    folder.write(*(folder.row(i) for i in range(9)), row_group_size=3)
    data = folder.file.read_bytes()
    for end in range(0, len(data), len(data) // 50):
        folder.file.write_bytes(data[:end])
        with pytest.raises(BadShardError):
            folder.read()


def test_damage_is_noticed_where_the_file_has_checksums(folder):
    rows = [folder.row(i, caption=f"{folder.grit.caption} {i}") for i in range(9)]
    folder.write(*rows, write_page_checksum=True, compression="none", use_dictionary=False)
    data = folder.file.read_bytes()
    folder.file.write_bytes(data.replace(b"thing 5", b"thong 5"))
    with pytest.raises(BadShardError, match="CRC checksum verification failed"):
        folder.read()


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_damage_of_any_kind_is_a_reject_or_a_bad_shard(folder, compression):
    folder.write(*(folder.row(i) for i in range(9)), compression=compression, row_group_size=4)
    whole, chance = folder.file.read_bytes(), random.Random(0)
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for _ in range(120):
        data = bytearray(whole)
        area = chance.choice([len(data), footer])
        for _ in range(chance.choice([1, 3, 20])):
            data[-chance.randrange(1, area + 1)] ^= 1 << chance.randrange(8)
        folder.file.write_bytes(data)
        with suppress(BadShardError):
            folder.read(phrases="both")


# --- storages ----------------------------------------------------------------------------------


def test_storage_that_fails_is_no_damaged_file(folder, flaky):
    folder.write(*(folder.row(i) for i in range(3000)), row_group_size=100, compression="none")
    data = flaky.files["p.parquet"] = folder.file.read_bytes()
    source = folder.source()
    for flaky.fail_at in (0, 1000, len(data) // 2, len(data) - 1):
        with pytest.raises(StorageError, match="connection reset by peer"):
            list(source._rows("flaky://p.parquet", 0, None))
    flaky.fail_at = None
    assert len(list(source._rows("flaky://p.parquet", 0, None))) == 3000


def test_storage_of_the_pictures_that_fails_is_no_missing_picture(folder, flaky):
    folder.write(folder.row(1))
    flaky.files["1.jpg"] = (folder.path / "images" / "1.jpg").read_bytes()
    source = folder.source(images="flaky://{id}")
    assert [item.key for item in source.read(str(folder.file))] == ["1"]
    flaky.fail_at = 100
    with pytest.raises(StorageError, match=r"reading flaky://1\.jpg failed"):
        list(source.read(str(folder.file)))


def test_large_row_group_is_not_read_whole(folder, flaky):
    texts = [os.urandom(500).hex() for _ in range(20_000)]  # which do not compress
    table = pa.table(
        {"id": range(len(texts)), "caption": texts, "ref_exps": [[[0.0]]] * len(texts)}
    )
    pq.write_table(table, folder.file, compression="none", row_group_size=len(texts))
    flaky.files["p.parquet"] = folder.file.read_bytes()
    rows = folder.source()._rows("flaky://p.parquet", 0, None)
    assert next(rows)["caption"] == texts[0]
    assert flaky.bytes_read < len(flaky.files["p.parquet"]) / 3


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["", "/data/images", "/data/{shard}", "/data/{shard"])
def test_images_without_a_column_are_refused(images):
    with pytest.raises(ValueError, match=r"images must name a column in braces.*got '"):
        GritParquetSource(images=images)


def test_settings_are_all_in_the_hash():
    expected = {"phrases", "min_score", "max_phrases", "max_image_px", "images", "key"}
    expected |= {"rows_per_shard"}
    assert set(GritParquetSource().settings()) == expected
