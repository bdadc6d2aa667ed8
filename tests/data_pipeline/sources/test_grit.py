"""Reading GRIT: every bad input costs itself alone and is counted under its own reason."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from alpha_clip.regions import decode_rle, read_image
from data_pipeline.runner import PipelineConfig, ShardTask, process_shard
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.shard_files import read_shard
from data_pipeline.sources.base import BadShardError, Reject, SourceSample
from data_pipeline.sources.grit import GritSource


@pytest.fixture
def read(grit, tmp_path):
    """Write samples as a tar and read it: the good samples by key, the rejects in a list."""

    def run(*samples, **settings):
        items = list(GritSource(**settings).read(str(grit.tar(tmp_path / "in.tar", *samples))))
        good = {item.key: item for item in items if isinstance(item, SourceSample)}
        return good, [item for item in items if isinstance(item, Reject)]

    return run


@pytest.fixture
def make(grit, tmp_path):
    """Make a shard of samples with boxes as masks; return its manifest and the keys in it."""

    def run(*samples, path=None, **settings):
        path = path or grit.tar(tmp_path / "in.tar", *samples)
        config = PipelineConfig(GritSource(**settings), BoxSegmenter())
        manifest = process_shard(ShardTask(str(path), 0), tmp_path / "out", config)
        keys = [s.key for s in read_shard(tmp_path / "out" / manifest.tar)]
        return manifest, keys

    return run


def test_good_sample(grit, read):
    good, rejects = read(grit.sample("12", id=345))
    assert rejects == []
    sample = good["12"]
    assert (sample.key, sample.id, sample.caption) == ("12", "345", grit.caption)
    assert sample.image == grit.encode(grit.image(seed=12))
    assert (sample.width, sample.height) == (80, 60)
    assert sample.rejects == ()
    first, second = sample.phrases
    assert (first.rid, first.text, first.kind, first.span) == (0, "a red box", "ref_exp", (0, 9))
    assert first.box_xyxy_px == pytest.approx((8, 12, 40, 48))
    assert first.score == pytest.approx(0.9)
    assert (second.rid, second.text, second.span) == (1, "a blue thing", (13, 25))
    assert second.box_xyxy_px == pytest.approx((44, 6, 76, 54))


@pytest.mark.parametrize("changes", [{}, {"id": None}])
def test_sample_without_an_id_is_named_by_its_key(grit, read, changes):
    assert read(grit.sample("12", **changes))[0]["12"].id == "12"


def test_which_phrases_are_taken(grit, read):
    def taken(phrases, **changes):
        sample = read(grit.sample("1", **changes), phrases=phrases)[0]["1"]
        return [(p.rid, p.text, p.kind) for p in sample.phrases]

    chunk = [2, 9, 0.1, 0.2, 0.5, 0.8, 0.9]
    expressions = [(0, "a red box", "ref_exp"), (1, "a blue thing", "ref_exp")]
    assert taken("ref_exps") == expressions
    assert taken("noun_chunks") == [(0, "red box", "noun_chunk")]
    assert taken("both") == [*expressions, (2, "red box", "noun_chunk")]
    # The same words at the same place in both lists count once.
    assert taken("both", ref_exps=[chunk], noun_chunks=[chunk]) == [(0, "red box", "ref_exp")]


# Scores of the phrases, how many are taken, and which.
BEST = {
    "all": ([0.5, 0.9, 0.7], None, [0, 1, 2]),
    "more than there are": ([0.5, 0.9, 0.7], 4, [0, 1, 2]),
    "as many as there are": ([0.5, 0.9, 0.7], 3, [0, 1, 2]),
    "in their order": ([0.5, 0.9, 0.7], 2, [1, 2]),
    "one": ([0.5, 0.9, 0.7], 1, [1]),
    "the first of equals": ([0.7, 0.7, 0.7, 0.9], 2, [0, 3]),
    "without a score last": ([None, 0.1, None], 2, [0, 1]),
}


@pytest.mark.parametrize("name", BEST)
def test_best_phrases_are_taken(grit, read, name):
    scores, max_phrases, taken = BEST[name]
    phrases = [
        [0, 9, 0, 0, 0.5, (i + 1) / 9, *([score] if score else [])]
        for i, score in enumerate(scores)
    ]
    good, rejects = read(grit.sample("1", ref_exps=phrases), max_phrases=max_phrases)
    assert [p.rid for p in good["1"].phrases] == taken
    left = [i for i in range(len(scores)) if i not in taken]
    assert [(r.rid, r.reason) for r in good["1"].rejects] == [(i, "not_best") for i in left]
    assert rejects == []


def test_bad_phrases_are_not_among_the_best(grit, make):
    phrases = [[0, 9, 0.5, 0.5, 1.2, 0.9, 0.99], *([0, 9, 0, 0, 0.5, i / 9, i / 9] for i in (3, 4))]
    manifest, keys = make(grit.sample("1", ref_exps=phrases), max_phrases=1)
    assert keys == ["1"]
    assert manifest.rejects == {"box_outside": 1, "not_best": 1}
    assert (manifest.regions, manifest.rejected_regions) == (1, 2)


def test_best_are_chosen_from_both_lists(grit, read):
    chunk = [13, 25, 0.55, 0.1, 0.95, 0.9, 0.8]
    sample = read(grit.sample("1", noun_chunks=[chunk]), phrases="both", max_phrases=2)[0]["1"]
    assert [(p.kind, p.score) for p in sample.phrases] == [("ref_exp", 0.9), ("noun_chunk", 0.8)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_phrases": 0}, "max_phrases must be at least 1 or null, got 0"),
        ({"max_phrases": -1}, "max_phrases must be at least 1 or null, got -1"),
        ({"phrases": "verbs"}, "phrases must be ref_exps, noun_chunks or both, got 'verbs'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GritSource(**settings)


def test_rounding_just_outside_is_cut_to_the_image(grit, read):
    phrase = [0, 9, -0.005, 0.0, 1.0, 1.009, 0.9]
    (found,) = read(grit.sample("1", ref_exps=[phrase]))[0]["1"].phrases
    assert found.box_xyxy_px == (0, 0, 80, 60)


def test_blanks_around_a_phrase_are_cut_with_its_span(grit, read):
    sample = grit.sample("1", caption="see  a dog  run", ref_exps=[[3, 12, 0, 0, 1, 1, 1.0]])
    (found,) = read(sample)[0]["1"].phrases
    assert (found.text, found.span) == ("a dog", (5, 10))


def test_spans_count_characters_not_bytes(grit, read):
    caption = "ein Käfer – 🐞 oben"
    sample = grit.sample("1", caption=caption, ref_exps=[[12, 13, 0, 0, 1, 1, 1.0]])
    assert read(sample)[0]["1"].phrases[0].text == "🐞"


def test_phrase_without_a_score_is_taken(grit, read):
    (found,) = read(grit.sample("1", ref_exps=[[0, 9, 0, 0, 1, 1]]), min_score=0.5)[0]["1"].phrases
    assert found.score is None


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "JPG", "png", "webp"])
def test_picture_formats(grit, make, tmp_path, extension):
    format = {"png": "PNG", "webp": "WEBP"}.get(extension, "JPEG")
    manifest, _ = make(grit.sample("1", grit.encode(grit.image(), format), extension))
    assert manifest.rejects == {}
    (sample,) = read_shard(tmp_path / "out" / manifest.tar)
    assert sample.reencoded == (format != "JPEG")


def test_folders_and_other_members_in_the_tar_do_not_matter(grit, read):
    sample = [(f"00000/{name}", data) for name, data in grit.sample("1")]
    sample.insert(2, ("00000/1.cls", b"7"))
    good, rejects = read(sample, grit.sample("2"))
    assert (list(good), rejects) == (["1", "2"], [])


# --- pictures that are no longer what the boxes were drawn on ----------------------------------

# The size that img2dataset found, and the one that it stored, in pixels.
CROPPED = {
    "centre crop": ((640, 480), (256, 256)),
    "centre crop of a tall one": ((480, 640), (256, 256)),
    "padded": ((1920, 1080), (512, 512)),
    "a little": ((640, 560), (256, 256)),
    "tiny": ((640, 480), (16, 16)),
    "squeezed": ((512, 512), (512, 128)),
    "floats": ((640.0, 480.0), (256, 256)),
}
RESIZED = {
    "as it was": ((640, 480), (640, 480)),
    "smaller side 256": ((1023, 683), (383, 256)),
    "larger side 256": ((1023, 683), (256, 171)),
    "cut to whole pixels": ((1023, 683), (256, 170)),
    "enlarged": ((80, 60), (640, 480)),
    "square": ((640, 640), (256, 256)),
    "nearly square": ((640, 630), (256, 256)),
    "tiny": ((640, 480), (8, 6)),
    "tiny, rounded": ((1000, 30), (256, 8)),
    "a line": ((10_000, 10), (256, 1)),
    "a dot": ((640, 400), (1, 1)),
    "turned as EXIF told": ((640, 480), (480, 640)),
    "as text": (("640", "480"), (256, 256)),
    "zero": ((0, 480), (256, 256)),
    "negative": ((-640, 480), (256, 256)),
    "NaN": ((float("nan"), 480), (256, 256)),
    "infinite": ((float("inf"), 480), (256, 256)),
    "null": ((None, None), (256, 256)),
    "one null": ((640, None), (256, 256)),
    "true": ((True, 480), (256, 256)),
    "lists": (([640], [480]), (256, 256)),
}


def sized(grit, sizes):
    (width, height), stored = sizes
    image = grit.encode(grit.image(*stored[::-1]))
    return grit.sample("1", image, original_width=width, original_height=height)


@pytest.mark.parametrize("name", CROPPED)
def test_picture_that_was_cropped_or_padded_is_refused(grit, read, name):
    good, (reject,) = read(sized(grit, CROPPED[name]))
    assert good == {}
    assert (reject.key, reject.reason, reject.regions) == ("1", "cropped_image", 2)
    assert "keep_ratio or no" in reject.detail


@pytest.mark.parametrize("name", RESIZED)
def test_picture_that_was_only_resized_is_taken(grit, read, name):
    good, rejects = read(sized(grit, RESIZED[name]))
    assert (list(good), rejects) == (["1"], [])


def test_picture_that_exif_turns_is_taken(grit, read):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = grit.encode(grit.image(), exif=exif)
    good, _ = read(grit.sample("1", image, original_width=800, original_height=600))
    assert (good["1"].width, good["1"].height) == (60, 80)


# --- one bad phrase costs itself alone ---------------------------------------------------------

BAD_PHRASES = {
    "outside": ([0, 9, 0.5, 0.5, 1.2, 0.9, 0.9], "box_outside"),
    "outside on the left": ([0, 9, -0.5, 0.1, 0.5, 0.9, 0.9], "box_outside"),
    "in pixels": ([0, 9, 8, 12, 40, 48, 0.9], "box_outside"),
    "inverted": ([0, 9, 0.5, 0.2, 0.1, 0.8, 0.9], "bad_box"),
    "upside down": ([0, 9, 0.1, 0.8, 0.5, 0.2, 0.9], "bad_box"),
    "no width": ([0, 9, 0.5, 0.2, 0.5, 0.8, 0.9], "bad_box"),
    "no pixels": ([0, 9, 0.5, 0.2, 0.50001, 0.8, 0.9], "bad_box"),
    "beyond the edge": ([0, 9, 1.0, 0.2, 1.005, 0.8, 0.9], "bad_box"),
    "NaN": ([0, 9, float("nan"), 0.2, 0.5, 0.8, 0.9], "bad_phrase"),
    "infinite": ([0, 9, 0.1, 0.2, float("inf"), 0.8, 0.9], "bad_phrase"),
    "NaN score": ([0, 9, 0.1, 0.2, 0.5, 0.8, float("nan")], "bad_phrase"),
    "400 digits": ([0, 9, 0.1, 0.2, 10**400, 0.8, 0.9], "bad_phrase"),
    "too short": ([0, 9, 0.1, 0.2, 0.5], "bad_phrase"),
    "text for a number": ([0, 9, "0.1", 0.2, 0.5, 0.8, 0.9], "bad_phrase"),
    "null": ([0, 9, None, 0.2, 0.5, 0.8, 0.9], "bad_phrase"),
    "true for a number": ([0, 9, 0.1, 0.2, True, 0.8, 0.9], "bad_phrase"),
    "no list": ({"start": 0}, "bad_phrase"),
    "span beyond the caption": ([20, 26, 0.1, 0.2, 0.5, 0.8, 0.9], "bad_span"),
    "span below zero": ([-5, 9, 0.1, 0.2, 0.5, 0.8, 0.9], "bad_span"),
    "span inverted": ([9, 0, 0.1, 0.2, 0.5, 0.8, 0.9], "bad_span"),
    "half a character": ([0.5, 9, 0.1, 0.2, 0.5, 0.8, 0.9], "bad_span"),
    "empty": ([4, 4, 0.1, 0.2, 0.5, 0.8, 0.9], "empty_phrase"),
    "blank": ([1, 2, 0.1, 0.2, 0.5, 0.8, 0.9], "empty_phrase"),
    "low score": ([0, 9, 0.1, 0.2, 0.5, 0.8, 0.1], "low_score"),
}


@pytest.mark.parametrize("name", BAD_PHRASES)
def test_bad_phrase_costs_itself_alone(grit, make, name):
    phrase, reason = BAD_PHRASES[name]
    bad = grit.sample("2", ref_exps=[phrase, [13, 25, 0.5, 0.1, 0.9, 0.9, 0.7]])
    manifest, keys = make(grit.sample("1"), bad, grit.sample("3"), min_score=0.3)
    assert keys == ["1", "2", "3"]
    assert manifest.rejects == {reason: 1}
    assert (manifest.samples, manifest.rejected_samples) == (3, 0)
    assert (manifest.regions, manifest.rejected_regions) == (5, 1)
    assert manifest.input["regions"] == 6


@pytest.mark.parametrize("name", BAD_PHRASES)
def test_sample_of_one_bad_phrase_is_lost_with_both_reasons(grit, make, name):
    phrase, reason = BAD_PHRASES[name]
    bad = grit.sample("2", ref_exps=[phrase])
    manifest, keys = make(grit.sample("1"), bad, grit.sample("3"), min_score=0.3)
    assert keys == ["1", "3"]
    assert manifest.rejects == {reason: 1, "no_regions": 1}
    assert (manifest.samples, manifest.rejected_samples) == (2, 1)
    assert (manifest.regions, manifest.rejected_regions) == (4, 1)


# --- one bad sample costs itself alone ---------------------------------------------------------


def without(members, extension):
    return [m for m in members if not m[0].endswith(extension)]


def with_json(grit, data):
    return [*without(grit.sample("2"), ".json"), ("2.json", data)]


def no_caption(grit):
    record = grit.record()
    del record["caption"]
    return with_json(grit, json.dumps(record).encode())


def huge_jpeg(grit):
    """A JPEG whose header states 60000 x 60000 pixels."""
    data = grit.encode(grit.image())
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + (60000).to_bytes(2, "big") * 2 + data[start + 4 :]


def half_jpeg(grit):
    data = grit.encode(grit.image())
    return data[: len(data) // 2]


# The bad sample's members, its reason, and how many regions are lost with it.
BAD_SAMPLES = {
    "no json": (lambda g: without(g.sample("2"), ".json"), "missing_json", 0),
    "no image": (lambda g: without(g.sample("2"), ".jpg"), "missing_image", 2),
    "no caption": (no_caption, "missing_caption", 2),
    "caption null": (lambda g: g.sample("2", caption=None), "missing_caption", 2),
    "json list": (lambda g: with_json(g, b"[1, 2]"), "bad_json", 0),
    "json text": (lambda g: with_json(g, b'"words"'), "bad_json", 0),
    "json null": (lambda g: with_json(g, b"null"), "bad_json", 0),
    "json cut": (lambda g: with_json(g, b'{"caption": "a red'), "bad_json", 0),
    "json empty": (lambda g: with_json(g, b""), "bad_json", 0),
    "json not UTF-8": (lambda g: with_json(g, b'{"caption": "\xff\xfe\xfd"}'), "bad_json", 0),
    "json nested": (lambda g: with_json(g, b"[" * 100_000), "bad_json", 0),
    "letters in the key": (lambda g: g.sample("2b"), "bad_key", 2),
    "dot in the key": (lambda g: g.sample("2.5"), "bad_key", 2),
    "65 digits in the key": (lambda g: g.sample("2" * 65), "bad_key", 2),
    "other digits in the key": (lambda g: g.sample("\u0662"), "bad_key", 2),
    "key like a mark of ours": (lambda g: g.sample("truncated"), "bad_key", 2),
    "no phrases": (lambda g: g.sample("2", ref_exps=[]), "no_phrases", 0),
    "phrases no list": (lambda g: g.sample("2", ref_exps={"a": 1}), "no_phrases", 0),
    "image without a picture": (lambda g: g.sample("2", b"\xff\xd8"), "corrupt_image", 2),
    "image cut": (lambda g: g.sample("2", half_jpeg(g)), "corrupt_image", 2),
    "image is a page": (lambda g: g.sample("2", b"<html></html>"), "corrupt_image", 2),
    "image is a gif": (lambda g: g.sample("2", g.encode(g.image(), "GIF")), "corrupt_image", 2),
    "image huge": (lambda g: g.sample("2", huge_jpeg(g)), "huge_image", 2),
    "lone surrogate": (lambda g: g.sample("2", caption=g.caption + "\ud800"), "bad_text", 2),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_sample_costs_itself_alone(grit, make, name):
    bad, reason, regions = BAD_SAMPLES[name]
    manifest, keys = make(grit.sample("1"), bad(grit), grit.sample("3"))
    assert keys == ["1", "3"]
    assert manifest.rejects == {reason: 1}
    assert (manifest.samples, manifest.rejected_samples) == (2, 1)
    assert (manifest.regions, manifest.rejected_regions) == (4, regions)
    assert manifest.input["samples"] == 3
    assert manifest.input["regions"] == 4 + regions


@pytest.mark.parametrize("order", [("1", "1", "2"), ("1", "2", "1")], ids=["near", "far"])
def test_second_sample_of_a_key_is_rejected(grit, make, order):
    manifest, keys = make(*(grit.sample(key) for key in order))
    assert keys == ["1", "2"]
    assert manifest.rejects == {"duplicate_key": 1}
    assert (manifest.input["samples"], manifest.rejected_samples) == (3, 1)
    assert (manifest.input["regions"], manifest.rejected_regions) == (6, 2)


def test_first_sample_of_a_key_is_the_one_that_stays(grit, read):
    good, _ = read(grit.sample("1", id="first"), grit.sample("1", id="second"))
    assert good["1"].id == "first"


def test_everything_bad_in_one_tar(grit, make):
    good = [grit.sample(str(100 + i)) for i in range(len(BAD_SAMPLES))]
    mixed = []
    for i, (bad, _, _) in enumerate(BAD_SAMPLES.values()):
        named = [(f"{i}{name.removeprefix('2')}", data) for name, data in bad(grit)]
        mixed += [named, good[i]]
    manifest, keys = make(*mixed)
    assert keys == [str(100 + i) for i in range(len(good))]
    assert manifest.rejects == Counter(reason for _, reason, _ in BAD_SAMPLES.values())
    assert manifest.rejected_samples == len(BAD_SAMPLES)


# --- bad tars ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"hello " * 500, b"<html></html>", b"\x1f\x8b\x08cut"])
def test_what_is_no_tar_is_a_bad_shard(tmp_path, make, data):
    path = tmp_path / "in.tar"
    path.write_bytes(data)
    with pytest.raises(BadShardError, match=r"in\.tar is no readable tar"):
        make(path=path)
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_parquet_file_is_a_bad_shard_that_says_who_reads_it(tmp_path):
    with pytest.raises(BadShardError, match=r"a\.parquet is no tar; .*GritParquetSource"):
        list(GritSource().read(f"{tmp_path}/a.parquet"))


def test_missing_file_is_a_bad_shard(tmp_path):
    with pytest.raises(BadShardError, match="No such file"):
        list(GritSource().read(str(tmp_path / "nowhere.tar")))


# Where the tar ends -> the whole samples before that, and whether an unfinished one follows.
CUTS = {
    "inside the third image": ("3.jpg", 512 + 100, "12"),
    "after the third image's header": ("3.jpg", 512, "12"),
    "inside the third header": ("3.jpg", 100, "12"),
    "before the third header": ("3.jpg", 0, "12"),
    "inside the third text": ("3.txt", 512 + 5, "12"),
    "inside the third json": ("3.json", 512 + 5, "12"),
    "inside the third json's header": ("3.json", 9, "12"),
    "before the third json": ("3.json", 0, "12"),
    "before the end marks": ("3.json", 1024, "123"),
    "inside the first image": ("1.jpg", 512 + 100, ""),
}


@pytest.mark.parametrize("name", CUTS)
def test_truncated_tar_keeps_what_is_whole_and_says_so(grit, make, tmp_path, name):
    member, offset, whole = CUTS[name]
    path = grit.tar(tmp_path / "in.tar", *(grit.sample(key) for key in "123"))
    path.write_bytes(path.read_bytes()[: grit.offsets(path)[member][0] + offset])
    manifest, keys = make(path=path)
    assert keys == list(whole)
    assert manifest.rejects == {"truncated_tar": 1}
    assert manifest.input["samples"] == len(whole) + 1


def test_damaged_header_is_not_taken_for_the_end(grit, make, tmp_path):
    path = grit.tar(tmp_path / "in.tar", *(grit.sample(key) for key in "123"))
    data = bytearray(path.read_bytes())
    start = grit.offsets(path)["2.jpg"][0]
    data[start : start + 512] = b"\x55" * 512
    path.write_bytes(bytes(data))
    manifest, keys = make(path=path)
    assert keys == ["1", "3"]
    assert manifest.rejects == {"damaged_tar": 1}
    assert (manifest.input["samples"], manifest.input["regions"]) == (3, 6)


# --- the photographs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo_samples(photos):
    tars = sorted((photos / "grit").glob("*.tar"))
    return [item for tar in tars for item in GritSource().read(str(tar))]


def test_photographs_are_all_kept_to_the_byte(photo_samples):
    assert len(photo_samples) == 96
    assert all(isinstance(item, SourceSample) for item in photo_samples)
    assert not any(read_image(item.image).reencoded for item in photo_samples)
    assert sum(len(item.phrases) + len(item.rejects) for item in photo_samples) == 216


def test_every_phrase_of_the_photographs_gets_a_mask_or_a_reason(photos, tmp_path):
    config = PipelineConfig(GritSource(), BoxSegmenter())
    masks, rejects = 0, Counter()
    for index, tar in enumerate(sorted((photos / "grit").glob("*.tar"))):
        manifest = process_shard(ShardTask(str(tar), index), tmp_path, config)
        rejects.update(manifest.rejects)
        assert manifest.input["regions"] == manifest.regions + manifest.rejected_regions
        for sample in read_shard(tmp_path / manifest.tar):
            for region in sample.regions:
                ys, xs = np.nonzero(decode_rle(region.rle))
                around = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
                assert region.box == pytest.approx(around, abs=1)
                assert sample.caption[slice(*region.span)] == region.text
                masks += 1
    assert masks + sum(rejects.values()) == 216
