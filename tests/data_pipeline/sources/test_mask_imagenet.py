"""MaskImageNet: every record found and read, every bad one counted alone, nothing in memory."""

import json
import os
import pickle
import random
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from alpha_clip.regions import decode_rle, encode_rle
from data_pipeline.caption_maker import CaptionMaker, Words
from data_pipeline.captioners.template import TemplateCaptioner
from data_pipeline.shard_files import read_shard
from data_pipeline.shard_maker import ShardTask, StageClock
from data_pipeline.sources import json_list
from data_pipeline.sources.base import BadShardError, Reject, StorageError
from data_pipeline.sources.imagenet import ClassPicture, ImageNetSource
from data_pipeline.sources.json_list import scan_list
from data_pipeline.sources.mask_imagenet import MaskImageNetSource
from data_pipeline.sources.masked import MaskedPicture

TENCH, CRANE, NAMELESS = "n01440764", "n02012849", "n09999999"
NAMES = {TENCH: "tench, Tinca tinca", CRANE: "crane_(bird)"}
W, H = 40, 30
BOX = (5, 4, 12, 20)  # x, y, width, height


def mask(x=BOX[0], y=BOX[1], width=BOX[2], height=BOX[3], size=(H, W)):
    pixels = np.zeros(size, bool)
    pixels[y : y + height, x : x + width] = True
    return pixels


class Published:
    """A folder of pictures and annotations of them, and what is read of both."""

    def __init__(self, path):
        self.path = path
        self.file = path / "M_ImageNet_top_460k.json"
        self.names = path / "names.json"
        self.names.write_text(json.dumps(NAMES))
        (path / "images").mkdir()

    def draw(self, wnid, number, size=(W, H), **options):
        """Draw a picture and return its path as the records have it."""
        path = self.path / "images" / wnid / f"{wnid}_{number}.JPEG"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path, "JPEG", **options)
        return f"data/imagenet-21k/images/{wnid}/{wnid}_{number}.JPEG"

    def write(self, *records, **options):
        self.file.write_text(json.dumps(records, **options), encoding="utf-8")

    def source(self, **settings):
        given = {"class_names": str(self.names), **settings}
        return MaskImageNetSource(str(self.file), str(self.path / "images"), **given)

    def read(self, *records, **settings):
        """Write records, if there are any, and read all shards: pictures, and rejects."""
        if records:
            self.write(*records)
        source = self.source(**settings)
        items = [i for n, s in enumerate(source.shards()) for i in source.read(s, n)]
        pictures = [item for item in items if isinstance(item, MaskedPicture)]
        return pictures, [item for item in items if isinstance(item, Reject)]


@pytest.fixture
def published(tmp_path):
    return Published(tmp_path)


def record(path, caption="a fish on the ground.", rle=None, box=BOX):
    return [
        17,
        None,
        path,
        rle or encode_rle(mask()),
        None if box is None else list(box),
        0,
        caption,
    ]


# --- what a record becomes -----------------------------------------------------------------------


def test_pictures_come_with_all_their_records(published):
    crane, tench = published.draw(CRANE, 1), published.draw(TENCH, 10026)
    other = encode_rle(mask(0, 0, 3, 2))
    found, lost = published.read(
        record(crane, "a bird ."), record(tench), record(crane, "its  head\n", other, (0, 0, 3, 2))
    )
    assert lost == []
    fish, bird = found
    assert (fish.key, fish.id, fish.name) == (
        "01440764000010026",
        "n01440764/n01440764_10026.JPEG",
        "tench",
    )
    assert fish.data == (published.path / "images" / fish.id).read_bytes()
    (region,) = fish.regions
    assert (region.rid, region.name, region.caption) == (0, "tench", "a fish on the ground")
    assert region.box_xyxy_px == (5.0, 4.0, 17.0, 24.0)
    assert (region.rle, region.area) == (encode_rle(mask()), 12 * 20)
    assert [(r.rid, r.name, r.caption, r.area) for r in bird.regions] == [
        (0, "crane", "a bird", 240),
        (1, "crane", "its head", 6),
    ]


def test_keys_are_those_of_the_pictures_in_imagenet(published):
    paths = [published.draw(TENCH, number) for number in (7, 10026)]
    odd = published.path / "images" / TENCH / "a-picture.JPEG"
    odd.write_bytes((published.path / "images" / TENCH / f"{TENCH}_7.JPEG").read_bytes())
    found, _ = published.read(*map(record, [*paths, f"x/{TENCH}/a-picture.JPEG"]))
    same = ImageNetSource(str(published.names)).read(str(published.path / "images" / TENCH))
    assert {p.key: p.data for p in found} == {
        p.key: p.data for p in same if isinstance(p, ClassPicture)
    }
    assert len(found) == 3


@pytest.mark.parametrize(
    "names",
    [
        ("image_pth", "mask", "bbox", "caption"),
        ("image", "segmentation", "box", "text"),
        ("path", "mask", "box", "caption"),
    ],
)
def test_objects_that_name_the_same_are_read(published, names):
    given = record(published.draw(TENCH, 1))
    listed, _ = published.read(given)
    named, lost = published.read(dict(zip(names, (given[i] for i in (2, 3, 4, 6)), strict=True)))
    assert named == listed
    assert len(named) == 1
    assert lost == []


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (None, (5, 4, 17, 24)),
        ((5.25, 4.5, 11, 19), (5.25, 4.5, 16.25, 23.5)),
        ((-0.5, 4, 17.5, 20), (5, 4, 17, 24)),  # outside by rounding
        ((5, 4, 12, 27), (5, 4, 17, 24)),
        ((5, 4, 0, 20), (5, 4, 17, 24)),  # SAM's box of a mask of one column
    ],
)
def test_the_mask_tells_the_box_where_the_record_does_not(published, box, expected):
    (picture,), lost = published.read(record(published.draw(TENCH, 1), box=box))
    assert picture.regions[0].box_xyxy_px == expected
    assert lost == []


def test_counts_that_are_not_compressed_are(published):
    pixels = mask()
    runs = [0] if pixels.T.flat[0] else []
    edges = np.flatnonzero(np.diff(pixels.T.reshape(-1).astype(int))) + 1
    runs += np.diff([0, *edges, W * H]).tolist()
    given = {"size": [H, W], "counts": runs}
    (picture,), _ = published.read(record(published.draw(TENCH, 1), rle=given))
    assert picture.regions[0].rle == encode_rle(pixels)


def test_turned_pictures_are_upright_when_sizes_are_compared(published):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = published.draw(TENCH, 1, size=(H, W), exif=exif)
    (picture,), lost = published.read(record(path))
    assert decode_rle(picture.regions[0].rle).shape == (H, W)
    assert lost == []


# --- bad records ---------------------------------------------------------------------------------

GOOD_RLE = encode_rle(mask())


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("bad_rle", {"rle": {"size": [H, W], "counts": GOOD_RLE["counts"] + "1"}}),
        ("bad_rle", {"rle": {"size": [H, W], "counts": "~"}}),
        ("bad_rle", {"rle": {"size": ["30", 40], "counts": GOOD_RLE["counts"]}}),
        ("bad_rle", {"rle": [[1, 1, 9, 1, 9, 9]]}),
        ("bad_rle", {"rle": encode_rle(np.zeros((H, W), bool))}),
        ("rle_size", {"rle": encode_rle(mask(size=(H, W + 1)))}),
        ("rle_size", {"rle": encode_rle(mask(size=(W, H)))}),
        ("bad_box", {"box": (5, 4, 12, 29)}),
        ("bad_box", {"box": (-3, 4, 12, 20)}),
        ("bad_box", {"box": (5, 4, -12, 20)}),
        ("bad_box", {"box": (5, 4, 12)}),
        ("bad_box", {"box": (5, 4, 12, "20")}),
        ("bad_box", {"box": (5, 4, 12, float("nan"))}),
        ("bad_box", {"box": (5, 4, 12, True)}),
        ("bad_box", {"box": (5, 4, 12, 10**400)}),  # too large for a float
        ("empty_caption", {"caption": " . "}),
        ("empty_caption", {"caption": None}),
        ("bad_caption", {"caption": ["a fish"]}),
        ("bad_caption", {"caption": "a fish \ud800"}),
    ],
)
def test_bad_records_cost_only_themselves(published, reason, changes):
    path = published.draw(TENCH, 1)
    (picture,), (lost,) = published.read(record(path, "one"), record(path, **changes), record(path))
    assert [r.rid for r in picture.regions] == [0, 2]
    assert (lost.key, lost.rid, lost.reason) == (picture.key, 1, reason)


def test_pictures_without_a_sound_record_are_lost_themselves(published):
    found, lost = published.read(record(published.draw(TENCH, 1), ""))
    assert found == []
    assert [(r.rid, r.reason) for r in lost] == [(0, "empty_caption"), (None, "no_regions")]


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        ("bad_json", 5),
        ("bad_json", []),
        ("bad_json", [1, 2]),
        ("bad_json", {"mask": GOOD_RLE}),
        ("bad_json", record(None)),
        ("bad_path", record("n01440764_1.JPEG")),
        ("bad_path", record(f"{TENCH}/..")),
        ("bad_path", record(f"{TENCH}/../secret.JPEG")),
        ("bad_path", record(f"{TENCH}/.hidden.JPEG")),
        ("bad_path", record(f"..\\{TENCH}\\{TENCH}_1.JPEG")),
        ("bad_path", record("/etc/passwd")),
        ("bad_path", record(f"{TENCH}/{TENCH}_1.JPEG/")),
        ("bad_path", record(f"{TENCH}/{TENCH}_\u0661.JPEG")),
    ],
)
def test_records_of_no_picture_are_lost_one_by_one(published, reason, bad):
    good = record(published.draw(TENCH, 1))
    found, lost = published.read(bad, good, bad, pictures_per_shard=1)
    assert len(found) == 1
    assert [(r.key, r.rid, r.reason, r.regions) for r in lost] == [("", None, reason, 1)] * 2


def test_no_path_leads_out_of_the_folder(published):
    inside = published.draw(TENCH, 1)
    outside = published.path / TENCH
    outside.mkdir()
    (outside / f"{TENCH}_2.JPEG").write_bytes(b"secret")
    paths = [f"../{TENCH}/{TENCH}_2.JPEG", str(outside / f"{TENCH}_2.JPEG"), f"/x/../{inside}"]
    found, lost = published.read(*map(record, paths))
    assert [p.id for p in found] == [f"{TENCH}/{TENCH}_1.JPEG"]
    assert [(r.reason, r.regions) for r in lost] == [("missing_image", 2)]


def test_lost_pictures_tell_how_many_records_go_with_them(published):
    nameless = published.draw(NAMELESS, 1)
    broken = published.draw(CRANE, 1)
    (published.path / "images" / CRANE / f"{CRANE}_1.JPEG").write_bytes(b"no picture")
    (published.path / "images" / CRANE / f"{CRANE}_2.JPEG").mkdir()
    huge = published.draw(CRANE, 3, size=(W + 1, H))
    published.draw(TENCH, 5)
    rows = [
        *[record(nameless)] * 2,
        *[record(broken)] * 3,
        record(f"{CRANE}/{CRANE}_2.JPEG"),
        record(huge),
        *[record(f"{TENCH}/{TENCH}_4.JPEG")] * 2,
        record(f"{TENCH}/{TENCH}_5.JPEG"),
        record(f"{TENCH}/{TENCH}_05.JPEG"),
    ]
    (published.path / "images" / TENCH / f"{TENCH}_05.JPEG").write_bytes(
        (published.path / "images" / TENCH / f"{TENCH}_5.JPEG").read_bytes()
    )
    found, lost = published.read(*rows, max_image_px=W * H)
    assert [(r.key, r.reason, r.regions) for r in lost] == [
        ("01440764000000004", "missing_image", 2),
        ("01440764000000005", "duplicate_key", 1),
        ("02012849000000001", "corrupt_image", 3),
        ("02012849000000002", "unreadable_file", 1),
        ("02012849000000003", "huge_image", 1),
        ("09999999000000001", "no_class_name", 2),
    ]
    assert sum(len(p.regions) for p in found) + sum(r.regions for r in lost) == len(rows)


def test_bytes_that_are_no_utf8_cost_one_record(published):
    path = published.draw(TENCH, 1)
    published.write(record(path, "caf@"), record(path, "d'où, “ça”?"), ensure_ascii=False)
    published.file.write_bytes(published.file.read_bytes().replace(b"@", b"\xe9"))
    (picture,), (lost,) = published.read()
    assert (lost.rid, lost.reason) == (0, "bad_caption")
    assert [r.caption for r in picture.regions] == ["d'où, “ça”?"]


# --- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_shard", [1, 3, 4, 100])
def test_shards_are_the_pictures_in_order_wherever_their_records_lie(published, per_shard):
    paths = [published.draw(wnid, n) for wnid in (CRANE, TENCH) for n in range(4)]
    rows = [record(path, f"caption {i} of {path}") for path in paths for i in range(3)]
    random.Random(0).shuffle(rows)
    published.write(*rows)
    source = published.source(pictures_per_shard=per_shard)
    names = source.shards()
    assert names == [f"{published.file}#{i:09d}" for i in range(0, 8, per_shard)]
    read = [list(source.read(name, i)) for i, name in enumerate(names)]
    assert all(len(shard) == per_shard for shard in read[:-1])
    found = [picture for shard in read for picture in shard]
    assert [p.id for p in found] == sorted(p.split("images/")[1] for p in paths)
    for picture in found:
        expected = [row[6] for row in rows if row[2].endswith(picture.id)]
        assert [r.caption for r in picture.regions] == expected


def test_annotations_that_change_are_read_again(published):
    first, second = published.draw(TENCH, 1), published.draw(TENCH, 2)
    assert len(published.read(record(first))[0]) == 1
    before = published.source().settings()
    assert len(published.read(record(first), record(second))[0]) == 2
    assert published.source().settings() != before


def test_annotations_that_change_and_keep_their_size_are_read_again(published):
    paths = [published.draw(TENCH, 1), published.draw(TENCH, 2)]
    sizes = []
    for age, captions in enumerate((["a fish", "another fish"], ["another fish", "a fish"])):
        published.write(*map(record, paths, captions))
        os.utime(published.file, ns=(age, age))
        sizes.append(published.file.stat().st_size)
        found, lost = published.read()
        assert [p.regions[0].caption for p in found] == captions
        assert lost == []
    assert sizes[0] == sizes[1]


def test_settings_tell_contents_and_not_places(published, tmp_path):
    published.write(record(published.draw(TENCH, 1)))
    source = published.source()
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (published.file, published.names):
        (moved / file.name).write_bytes(file.read_bytes())
    there = MaskImageNetSource(str(moved / published.file.name), "x", str(moved / "names.json"))
    assert there.settings() == source.settings()
    assert str(tmp_path) not in json.dumps(source.settings())
    for change in (
        {"pictures_per_shard": 5},
        {"max_image_px": 5},
        {"class_names": None},
    ):
        assert replace(source, **change).settings() != source.settings()


def test_sources_stay_small_when_they_are_sent_to_workers(published):
    published.write(*[record(published.draw(TENCH, 1))] * 500)
    source = published.source()
    source.shards()
    assert len(pickle.dumps(source)) < 1000
    assert pickle.loads(pickle.dumps(source)) == source


# --- the file ------------------------------------------------------------------------------------

BAD_FILES = {
    "empty": "",
    "an object": '{"images": []}',
    "cut off": '[["a", "b"], ["c"',
    "cut off behind a comma": '[["a"], ',
    "open": '[["a"]',
    "two lists": '[["a"]] [["b"]]',
    "no comma": '[["a"] ["b"]]',
    "two commas": '[["a"],, ["b"]]',
    "a comma too many": '[["a"],]',
    "text": "tench",
    "half a number": "[1.",
    "no number": "[1x, 2]",
    "a number without end": f"[{'1' * 5000}]",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_are_no_list_stop_the_run(published, content):
    published.file.write_text(content)
    with pytest.raises(ValueError, match=r"is no JSON list: byte \d+: "):
        published.source().shards()
    with pytest.raises(BadShardError, match="is no JSON list"):
        list(published.source().read(f"{published.file}#000000000", 0))


def test_the_place_of_a_fault_is_told(published):
    published.file.write_text('[[1], [2], "\t"]')
    with pytest.raises(ValueError, match="byte 12: Invalid control character"):
        published.source().shards()


@pytest.mark.parametrize("content", ["[]", " [ ] \n", "[1, 2, 3]", '[["a"]]'])
def test_lists_of_something_else_stop_the_run(published, content):
    published.file.write_text(content)
    with pytest.raises(ValueError, match="has no record of a picture; expected a JSON list"):
        published.source().shards()


def test_what_is_not_there_is_named(published):
    with pytest.raises(ValueError, match=r"can't be read .*expected MaskImageNet's"):
        published.source().shards()
    published.write(record("x"))
    with pytest.raises(ValueError, match="images must be the folder of ImageNet-21k"):
        replace(published.source(), images=str(published.path / "none")).shards()
    with pytest.raises(ValueError, match="pictures_per_shard must be at least 1, got 0"):
        published.source(pictures_per_shard=0)
    with pytest.raises(BadShardError, match="No such file"):
        list(published.source().read(f"{published.path}/gone.json#000000000", 0))
    with pytest.raises(BadShardError, match="no shard of MaskImageNet"):
        list(published.source().read(str(published.file), 0))
    with pytest.raises(StorageError, match=r"reading .* failed"):
        list(published.source().read(f"{published.path}#000000000", 0))  # a folder


# --- the list that is larger than memory ---------------------------------------------------------

VALUES = [
    *([1, [2, {"a": "]["}]], {"b": [None, True]}, "x,]é", "", [], {}, "\\"),
    *(12345, -12.75, 1.5e-7, 1e300, 0, None, False),
]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"separators": (",", ":")}])
def test_elements_are_whole_wherever_blocks_end(tmp_path, monkeypatch, block, options):
    monkeypatch.setattr(json_list, "_BLOCK", block)
    file = tmp_path / "list.json"
    file.write_text(f" {json.dumps(VALUES, ensure_ascii=False, **options)}\n", encoding="utf-8")
    data = file.read_bytes()
    assert [json.loads(data[start:end]) for start, end, _ in scan_list(file)] == VALUES
    assert [v for _, _, v in scan_list(file)] == [
        "x,]Ã©" if value == "x,]é" else value for value in VALUES
    ]


def test_a_fault_does_not_bring_in_the_rest_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "_BLOCK", 1000)
    monkeypatch.setattr(json_list, "_MAX_ELEMENT", 10_000)
    file = tmp_path / "list.json"
    file.write_text("[[1], [" + "[2], " * 100_000)  # 500 kB
    tracemalloc.start()
    with pytest.raises(ValueError, match="is no JSON list"):
        list(scan_list(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300_000


def test_memory_does_not_grow_with_the_file(published):
    """15 MB of annotations; parsed they would take more."""
    rows = [record(f"{TENCH}/{TENCH}_{i}.JPEG", "c" * 1500) for i in range(9000)]
    published.write(*rows)
    source = published.source()
    tracemalloc.start()
    (shard,) = source.shards()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert os.path.getsize(published.file) > 14e6
    assert peak < 4.5e6 + 9000 * 300  # four blocks, and a name a picture
    assert Counter(i.reason for i in source.read(shard, 0)) == {"missing_image": 9000}


# --- to shards -----------------------------------------------------------------------------------


def make(published, output, words):
    source = published.source()
    maker = CaptionMaker(source, TemplateCaptioner(), words)
    (shard,) = source.shards()
    maker.load()
    manifest = maker.make(ShardTask(shard, 0), output, StageClock())
    return manifest, list(read_shard(output / manifest.tar))


@pytest.mark.parametrize(
    ("merge", "fish", "bird"),
    [
        ("name_if_missing", "a fish on the ground, a tench", "a crane in a pond"),
        (
            "{caption}, probably {class_name}",
            "a fish on the ground, probably tench",
            "a crane in a pond, probably crane",
        ),
        ("{caption}", "a fish on the ground", "a crane in a pond"),
    ],
)
def test_shards_hold_the_published_captions_merged(published, tmp_path, merge, fish, bird):
    tench, crane = published.draw(TENCH, 1), published.draw(CRANE, 1)
    published.write(
        record(crane, "a crane in a pond."),
        record(tench),
        record(tench, box=(0, 0, 99, 99)),
        record(f"{TENCH}/{TENCH}_2.JPEG"),
    )
    manifest, samples = make(published, tmp_path / "out", Words(merge=merge))
    assert [(s.key, s.source) for s in samples] == [
        ("01440764000000001", "mask_imagenet"),
        ("02012849000000001", "mask_imagenet"),
    ]
    assert [[r.text for r in s.regions] for s in samples] == [[fish], [bird]]
    assert [s.caption for s in samples] == ["a photo of a tench", "a photo of a crane"]
    assert np.array_equal(decode_rle(samples[0].regions[0].rle), mask())
    assert samples[0].regions[0].box == (5, 4, 17, 24)
    assert manifest.rejects == {"bad_box": 1, "missing_image": 1}
    assert manifest.input["regions"] == 4


def test_shards_are_the_same_bytes_again(published, tmp_path):
    published.write(*(record(published.draw(TENCH, n)) for n in range(3)))
    first, _ = make(published, tmp_path / "a", Words())
    second, _ = make(published, tmp_path / "b", Words())
    assert first == second
    assert first.samples == 3
