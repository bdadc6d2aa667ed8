"""Inspecting shards: totals, what samples show, the files, and IoU with true masks."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from alpha_clip.regions import RegionAnnotation, RegionSample, encode_rle
from data_pipeline import inspection
from data_pipeline.inspection import Inspection, inspect_shards
from data_pipeline.shards import ShardManifest, ShardWriter, read_manifests
from data_pipeline.sources.base import Reject

# Boxes on whole pixels of 80 x 60: 32 x 36 and 32 x 48.
BOXES = ((8.0, 12.0, 40.0, 48.0), (44.0, 6.0, 76.0, 54.0))
AREAS = (32 * 36, 32 * 48)


def region(rid=0, text="a red box", box=BOXES[0], size=(60, 80), filled=1.0, **changes):
    """A region whose mask fills its box from the left to a share."""
    x1, y1, x2, y2 = (round(v) for v in box)
    mask = np.zeros(size, bool)
    mask[y1:y2, x1 : x1 + round((x2 - x1) * filled)] = True
    values = {"kind": "ref_exp", "span": None, **changes}
    return RegionAnnotation(
        rid=rid, text=text, box=box, rle=encode_rle(mask), area=int(mask.sum()), **values
    )


@pytest.fixture
def sample(grit):
    """Make samples; by default of two regions, and with a picture of their own."""

    def make(key, regions=None, size=(60, 80), jpeg=None, **changes):
        regions = regions or (region(), region(1, "a blue thing", BOXES[1]))
        jpeg = jpeg or grit.encode(grit.image(*size, seed=int(key)))
        values = {"id": key, "source": "grit", "caption": "", **changes}
        return RegionSample(
            key=key, jpeg=jpeg, w=size[1], h=size[0], regions=tuple(regions), **values
        )

    return make


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shards"


@pytest.fixture
def write(folder):
    """Write one shard; answers with its manifest."""

    def shard(index, samples, rejects=()):
        writer = ShardWriter(folder, index)
        for one in samples:
            writer.write(one)
        for reject in rejects:
            writer.reject(reject)
        return writer.commit("", "in.tar")

    return shard


@pytest.fixture
def dataset(sample, write, folder):
    """Two shards of two samples of two regions; a phrase of each and a sample were rejected."""
    lost = Reject("19", None, "corrupt_image", "", regions=3)
    for index, rejects in enumerate(([], [lost])):
        phrase = Reject(f"{index}2", 2, "bad_box")
        write(index, [sample(f"{index}1"), sample(f"{index}2")], [phrase, *rejects])
    return folder


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Draws no plots, which takes a second, except where a test asks for `real_plots`."""
    if "real_plots" not in request.fixturenames:
        monkeypatch.setattr(inspection, "plot_contents", lambda *_: b"plots")


@pytest.fixture
def real_plots():
    pass


@pytest.fixture
def report(tmp_path):
    return tmp_path / "report"


# --- totals ------------------------------------------------------------------------------------


def test_totals_are_those_of_the_manifests(dataset, report):
    found = inspect_shards(dataset, report, samples=1)
    assert (found.shards, found.samples, found.regions) == (2, 4, 8)
    assert found.rejects == {"bad_box": 2, "corrupt_image": 1}
    assert (found.rejected_samples, found.rejected_regions) == (1, 5)
    assert found.bytes == sum(p.stat().st_size for p in dataset.glob("*.tar"))
    assert (found.samples_read, found.regions_read) == (1, 2)


def test_result_is_what_the_json_says(dataset, report):
    found = inspect_shards(dataset, report)
    read = json.loads((report / "inspection.json").read_text())
    assert read == asdict(found)
    assert Inspection(**read) == found


def test_unfinished_shards_do_not_count(dataset, report):
    (dataset / "00001.done.json").unlink()
    assert inspect_shards(dataset, report).samples == 2


def test_shards_without_a_region_have_numbers_and_no_sheet(write, folder, report):
    write(0, [], [Reject("1", None, "missing_json")])
    found = inspect_shards(folder, report)
    assert (found.samples, found.mean_area, found.rejects) == (0, 0.0, {"missing_json": 1})
    assert set(found.percentiles.values()) == {None}
    assert sorted(p.name for p in report.iterdir()) == ["inspection.json", "plots.png"]
    assert "none" in str(found)


# --- what the samples show ---------------------------------------------------------------------


def test_areas_and_phrases(dataset, report):
    found = inspect_shards(dataset, report)
    assert (found.samples_read, found.regions_read) == (4, 8)
    assert found.mean_area == pytest.approx(sum(AREAS) / 2 / (80 * 60))
    assert found.phrases == 2
    assert found.frequent_phrases == {"a red box": 4, "a blue thing": 4}
    assert found.kinds == {"ref_exp": 1.0}


def test_sizes_counts_and_masks(sample, write, folder, report):
    large = region(0, size=(120, 80), filled=0.25)
    write(0, [sample("1"), sample("2", [large], (120, 80)), sample("3"), sample("4"), sample("5")])
    found = inspect_shards(folder, report).percentiles
    assert found["width"] == dict.fromkeys(("min", "p5", "p25", "p50", "p75", "p95", "max"), 80)
    assert (found["height"]["min"], found["height"]["p50"], found["height"]["max"]) == (60, 60, 120)
    assert found["height"]["p95"] == pytest.approx(60 + 0.8 * 60)  # between the last two of five
    assert [found["regions_per_image"][p] for p in ("min", "p25", "max")] == [1, 2, 2]
    assert found["area_share"]["min"] == pytest.approx(AREAS[0] / 4 / (120 * 80))
    assert found["area_share"]["max"] == pytest.approx(AREAS[1] / (60 * 80))
    assert (found["box_fill"]["min"], found["box_fill"]["p25"]) == (0.25, 1.0)


def test_masks_beyond_their_box_fill_more_than_all_of_it(sample, write, folder, report):
    spread = region(box=(8.0, 12.0, 24.0, 48.0), filled=1.5)
    write(0, [sample("1", [spread])])
    assert inspect_shards(folder, report).percentiles["box_fill"]["p50"] == 1.5


def test_masks_of_boxes_fill_them_where_boxes_fall_between_pixels(sample, write, folder, report):
    write(0, [sample("1", [region(box=(7.6, 12.4, 40.4, 47.6))])])
    assert inspect_shards(folder, report).percentiles["box_fill"]["max"] == 1.0


def test_scores_are_of_the_regions_that_have_them(sample, write, folder, report):
    regions = [region(i, score=i / 10, sam_iou=0.5 if i == 3 else None) for i in range(5)]
    write(0, [sample("1", regions)])
    found = inspect_shards(folder, report).percentiles
    assert (found["score"]["min"], found["score"]["p50"], found["score"]["max"]) == (0, 0.2, 0.4)
    assert set(found["sam_iou"].values()) == {0.5}
    assert found["stability"] is found["clip"] is None


def test_phrases_by_frequency_kind_and_length(sample, write, folder, report):
    texts = ["dog", "a  big dog", *["a cat"] * 3, *(f"thing {i}" for i in range(30))]
    kinds = ["class", *["ref_exp"] * 34]
    pairs = enumerate(zip(texts, kinds, strict=True))
    write(0, [sample("1", [region(i, text, kind=kind) for i, (text, kind) in pairs])])
    found = inspect_shards(folder, report)
    assert found.phrases == 33
    assert len(found.frequent_phrases) == 20
    assert list(found.frequent_phrases.items())[:3] == [("a cat", 3), ("dog", 1), ("a  big dog", 1)]
    assert found.kinds == {"ref_exp": pytest.approx(34 / 35), "class": pytest.approx(1 / 35)}
    words = found.percentiles["phrase_words"]
    assert (words["min"], words["p50"], words["max"]) == (1, 2, 3)


def test_pictures_encoded_again_and_repeated(grit, sample, write, folder, report):
    jpeg = grit.encode(grit.image())
    write(0, [sample("1", jpeg=jpeg, reencoded=True), sample("2"), sample("3", jpeg=jpeg)])
    write(1, [sample("4", jpeg=jpeg)])
    found = inspect_shards(folder, report)
    assert (found.reencoded, found.repeated_pictures) == (0.25, 2)


@pytest.mark.usefixtures("real_plots")
def test_one_sample_with_one_region(sample, write, folder, report):
    write(0, [sample("1", [region()])])
    found = inspect_shards(folder, report)
    assert (found.samples, found.samples_read, found.regions_read) == (1, 1, 1)
    for name in ("plots.png", "contact_sheet.png"):
        pixels = np.asarray(Image.open(report / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 150
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


# --- which samples are read --------------------------------------------------------------------


@pytest.fixture
def keys_read(monkeypatch):
    """Collects the keys that were read from the shards, and those that counted."""
    read, counted = [], []
    samples, add = ShardManifest.read, inspection._Contents.add

    def noted(manifest, directory):
        for one in samples(manifest, directory):
            read.append(one.key)
            yield one

    def add_noted(contents, one):
        counted.append(one.key)
        add(contents, one)

    monkeypatch.setattr(ShardManifest, "read", noted)
    monkeypatch.setattr(inspection._Contents, "add", add_noted)
    return read, counted


@pytest.mark.parametrize(
    ("counts", "limit", "shares"),
    [
        ([4, 4, 4], 20, [4, 4, 4]),
        ([4, 4, 4], 12, [4, 4, 4]),
        ([4, 4, 4], 6, [2, 2, 2]),
        ([2, 6, 4], 6, [1, 3, 2]),
        ([1] * 6, 2, [1, 0, 0, 1, 0, 0]),
        ([0, 3, 0], 2, [0, 2, 0]),
        ([0], 5, [0]),
        ([10_000] * 2000, 20_000, [10] * 2000),
    ],
)
def test_shares_of_shards_follow_their_size(counts, limit, shares):
    assert inspection._shares(counts, limit) == shares


@pytest.mark.parametrize("limit", range(1, 31, 4))
def test_shares_are_as_many_as_asked(limit):
    counts = [3, 0, 7, 1, 1, 12, 4]
    shares = inspection._shares(counts, limit)
    assert sum(shares) == min(limit, 28)
    assert all(share <= count for share, count in zip(shares, counts, strict=True))


def test_samples_are_spread_over_shards_and_in_them(sample, write, folder, report, keys_read):
    for index in range(3):
        write(index, [sample(f"{index}{i}") for i in range(6)])
    found = inspect_shards(folder, report, samples=6)
    assert found.samples_read == 6
    assert keys_read[1] == ["00", "03", "10", "13", "20", "23"]
    assert (found.samples, found.regions) == (18, 36)


def test_few_samples_of_a_large_shard_do_not_read_all_of_it(
    sample, write, folder, report, keys_read
):
    write(0, [sample(str(i)) for i in range(40)])
    inspect_shards(folder, report, samples=2)
    assert keys_read[1] == ["0", "5"]
    assert len(keys_read[0]) <= 10


def test_shards_without_a_share_are_not_opened(sample, write, folder, report, keys_read):
    for index in range(4):
        write(index, [sample(f"{index}1")])
    inspect_shards(folder, report, samples=2)
    assert keys_read[0] == ["01", "21"]


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_is_an_error(dataset, report, samples):
    with pytest.raises(ValueError, match="samples must be at least 1"):
        inspect_shards(dataset, report, samples=samples)


# --- true masks --------------------------------------------------------------------------------


def truth_file(path, images, share=1.0):
    """True masks: the first phrase's box of each image, filled from the left to a share."""
    rle = region(filled=share).rle
    masks = [{"text": "x", "box": [0.1, 0.2, 0.5, 0.8], "rle": rle}]
    path.write_text("".join(json.dumps({"key": key, "masks": masks}) + "\n" for key in images))


def test_iou_with_true_masks(dataset, tmp_path, report):
    truth_file(tmp_path / "a.jsonl", ["01", "02"], share=0.75)
    truth_file(tmp_path / "b.jsonl", ["11"], share=0.25)
    found = inspect_shards(dataset, report, masks=str(tmp_path / "*.jsonl"))
    # Samples are found by their id, and scenes are named by their number: 1, not 01.
    assert found.true_masks == 1
    assert found.mean_iou == pytest.approx(0.25)
    assert found.iou_above_half == 0.0


def test_iou_of_several(sample, write, folder, tmp_path, report):
    write(0, [sample(key) for key in ("1", "2", "3")])
    truth_file(tmp_path / "a.jsonl", ["1"])
    truth_file(tmp_path / "b.jsonl", ["2"], share=0.25)
    found = inspect_shards(folder, report, masks=str(tmp_path / "*.jsonl"))
    assert found.true_masks == 2
    assert found.mean_iou == pytest.approx((1 + 0.25) / 2)
    assert found.iou_above_half == 0.5
    assert "mean IoU 0.625 with 2 true masks; 50.0% of them" in str(found)


def test_no_true_masks_no_iou(dataset, report):
    found = inspect_shards(dataset, report)
    assert (found.true_masks, found.mean_iou, found.iou_above_half) == (0, None, None)
    assert "IoU" not in str(found)


# --- contact sheet -----------------------------------------------------------------------------


@pytest.mark.parametrize(("tiles", "columns", "rows"), [(48, 8, 1), (3, 3, 1), (1, 1, 1)])
def test_contact_sheet_has_as_many_tiles_as_asked(dataset, report, tiles, columns, rows):
    inspect_shards(dataset, report, tiles=tiles)
    sheet = Image.open(report / "contact_sheet.png")
    assert sheet.size == (8 + columns * 188, 8 + rows * 222)
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 10


@pytest.fixture
def tiled(monkeypatch):
    """Collects `key/rid` of the regions that became tiles, and the tiles."""
    names, tiles = [], []
    original = inspection.region_tiles

    def noted(one):
        names.extend(f"{one.key}/{r.rid}" for r in one.regions)
        made = original(one)
        tiles.extend(made)
        return made

    monkeypatch.setattr(inspection, "region_tiles", noted)
    return names, tiles


def test_tiles_are_spread_over_samples_and_regions(sample, write, folder, report, tiled):
    for index in range(2):
        write(index, [sample(f"{index}{i}") for i in range(6)])
    inspect_shards(folder, report, tiles=4)
    assert tiled[0] == ["02/0", "05/1", "12/0", "15/1"]


def test_tiles_that_a_sample_lacks_go_to_the_next(sample, write, folder, report, tiled):
    many = [region(i) for i in range(9)]
    write(0, [sample("1", [region()]), sample("2", [region()]), sample("3", many)])
    inspect_shards(folder, report, tiles=9)
    assert len(tiled[0]) == 9
    assert sorted(tiled[0])[:2] == ["1/0", "2/0"]


def test_tiles_of_large_pictures_wait_small(sample, write, folder, report, tiled):
    write(0, [sample("1", [region(size=(900, 1200))], (900, 1200))])
    inspect_shards(folder, report)
    assert tiled[1][0].image.size == (360, 270)


def test_no_tiles_no_sheet(dataset, report):
    inspect_shards(dataset, report, tiles=0)
    assert not (report / "contact_sheet.png").exists()


@pytest.mark.usefixtures("real_plots")
def test_same_shards_same_files(dataset, tmp_path):
    for name in ("a", "b"):
        inspect_shards(dataset, tmp_path / name, tiles=3, samples=3)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["contact_sheet.png", "inspection.json", "plots.png"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# --- the files and the table -------------------------------------------------------------------


def test_files_that_can_not_be_put_in_place_leave_what_was_there(dataset, report, monkeypatch):
    report.mkdir()
    (report / "plots.png").write_text("earlier")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(inspection.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        inspect_shards(dataset, report)
    assert [(p.name, p.read_text()) for p in report.iterdir()] == [("plots.png", "earlier")]


def test_shards_are_left_as_they_are(dataset, report):
    before = {p.name: p.read_bytes() for p in dataset.iterdir() if p.is_file()}
    inspect_shards(dataset, report)
    assert {p.name: p.read_bytes() for p in dataset.iterdir() if p.is_file()} == before


def test_table_is_aligned_and_in_plain_characters(sample, write, folder, report):
    regions = [region(0, "a\x1b[31m dog\nrun", score=0.5), region(1, "雪" * 99, kind="caption")]
    write(0, [sample("1", regions)], [Reject("2", None, "bad_key")] * 1234)
    text = str(inspect_shards(folder, report))
    assert all(c.isprintable() or c == "\n" for c in text)
    lines = [line for line in text.splitlines() if line]
    assert {line.split()[0]: line.split()[1:] for line in lines}["samples"] == [
        "1,235",
        "1",
        "1,234",
    ]
    ends = [len(line) for line in lines if line.startswith(("samples", "regions  ", "  bad_key"))]
    assert ends == [62] * 3
    assert len({len(line) for line in lines if line.startswith(("width", "height", "score"))}) == 1
    assert "sam_iou                   none" in lines
    assert "             1  a [31m dog run" in lines
    assert max(map(len, lines)) <= 100


# --- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shards", "nowhere"])
def test_folder_without_finished_shards_is_an_error(tmp_path, report, name):
    (tmp_path / "shards").mkdir()
    with pytest.raises(ValueError, match="holds no finished shards"):
        inspect_shards(tmp_path / name, report)


def test_true_masks_that_are_none_are_an_error(dataset, tmp_path, report):
    with pytest.raises(ValueError, match="no file matches"):
        inspect_shards(dataset, report, masks=str(tmp_path / "*.jsonl"))


@pytest.mark.parametrize("where", ["inside a member", "between two samples", "at the end"])
@pytest.mark.parametrize("samples", [1, 20_000])
def test_truncated_shard_is_an_error(grit, dataset, report, where, samples):
    path = dataset / read_manifests(dataset)["00001"].tar
    second = grit.offsets(path)["12.jpg"][0]
    size = {"inside a member": 700, "between two samples": second, "at the end": -512}[where]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(OSError, match="is damaged"):
        inspect_shards(dataset, report, samples=samples)
    assert not report.exists()


def test_damaged_member_is_an_error(grit, dataset, report):
    path = dataset / read_manifests(dataset)["00001"].tar
    data = bytearray(path.read_bytes())
    data[grit.offsets(path)["12.json"][1]] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match="is damaged"):
        inspect_shards(dataset, report)


def test_damaged_picture_is_an_error_that_names_it(grit, sample, write, folder, report):
    jpeg = grit.encode(grit.image(600, 800))
    write(0, [sample("7", [region(size=(600, 800))], (600, 800), jpeg[: len(jpeg) // 2])])
    with pytest.raises(OSError, match="the picture of sample 7 is damaged"):
        inspect_shards(folder, report)


def test_missing_tar_is_an_error(dataset, report):
    (dataset / read_manifests(dataset)["00001"].tar).unlink()
    with pytest.raises(OSError, match="No such file"):
        inspect_shards(dataset, report)


def test_missing_matplotlib_is_said_before_anything_is_read(
    dataset, report, monkeypatch, keys_read
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"pip install 'alpha-clip\[data\]'"):
        inspect_shards(dataset, report)
    assert keys_read[0] == []
    assert not report.exists()
