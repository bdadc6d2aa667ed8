"""Ranking: the same as a plain sort, the same bytes again, and finished or not there."""

import json
import math
import os
import random
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from decimal import Decimal
from functools import partial

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from alpha_clip.regions import encode_rle
from data_pipeline import ranking
from data_pipeline.candidates import Candidate, CandidateFile, CandidateSample
from data_pipeline.ranking import Keep, load_ranking, rank
from data_pipeline.shard_files import file_sha256
from data_pipeline.shards import ShardManifest

COUNTS = encode_rle(np.ones((2, 2), bool))["counts"]
QUIET = partial(rank, progress=False)


def candidate(wnid, key, rid, score, name=None):
    box = (0.0, 0.0, 2.0, 2.0)
    return Candidate(
        *(str(key), f"id {key}", f"{wnid}/{key}.JPEG", wnid, name or f"name of {wnid}"),
        *(2, 2, rid, box, COUNTS, 4, None, None, score),
    )


def vouch(folder, index, **changes):
    """Write the manifest of a candidate file as it is."""
    path = folder / f"{index:05d}.candidates.parquet"
    made = {
        "tar": f"/in/{index:05d}.tar",
        **dict.fromkeys(("samples", "regions", "rejected_samples", "rejected_regions"), 0),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "rejects": {},
        "config_hash": "c0ffee",
        "input": {"path": f"/in/{index:05d}.tar", "samples": 0, "regions": 0},
        "sidecar": path.name,
    }
    manifest = ShardManifest(**{**made, **changes})
    (folder / f"{index:05d}.done.json").write_text(json.dumps(asdict(manifest)))


def write(folder, index, candidates, **changes):
    """Write a candidate file and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    file = CandidateFile(folder / f"{index:05d}.candidates.parquet")
    for one in candidates:
        file.write(CandidateSample(one.key, (one,)), b"")
    file.close()
    vouch(folder, index, **changes)


def many(seed, shards=4, size=60):
    """Draw candidates with many equal scores, pictures that several shards share, and digits."""
    rng = random.Random(seed)
    drawn = []
    rids = Counter()
    for _ in range(shards):
        rows = []
        for _ in range(rng.randrange(size)):
            key = rng.choice([2, 9, 10, 11, 100, 1001, 99])
            rids[key] += 1
            wnid = rng.choice(["n1", "n2", "n3"])
            rows.append(candidate(wnid, key, rids[key], rng.choice([0.1, 0.2, 0.25, -0.5])))
        rng.shuffle(rows)
        drawn.append(rows)
    return drawn


def plain(shards, keep):
    """Rank by Python's sort: (shard, row) -> (rank, size of the class)."""
    classes = defaultdict(list)
    for shard, rows in enumerate(shards):
        for row, one in enumerate(rows):
            classes[one.wnid].append((-one.score, int(one.key), one.rid, shard, row))
    found = {}
    for members in classes.values():
        seen, competing = Counter(), []
        for score, key, _, shard, row in sorted(members):
            seen[key] += 1
            if keep.max_per_image is None or seen[key] <= keep.max_per_image:
                competing.append((-score, shard, row))
        size = len(competing)
        for place, (score, shard, row) in enumerate(competing, 1):
            if (
                (keep.top_k is None or place <= keep.top_k)
                and (
                    keep.top_share is None
                    or place <= math.ceil(Decimal(str(keep.top_share)) * size)
                )
                and (keep.min_score is None or score >= keep.min_score)
            ):
                found[shard, row] = place, size
    return found


def everything(folder):
    """Return the bytes of a folder's files, but for the lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def made(tmp_path):
    """A folder with three shards of candidates."""
    for index, rows in enumerate(many(3, shards=3)):
        write(tmp_path / "candidates", index, rows)
    return tmp_path / "candidates"


# --- what is kept ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "keep",
    [
        Keep(top_k=5),
        Keep(top_share=0.15),
        Keep(min_score=0.2),
        Keep(top_k=7, max_per_image=2),
        Keep(top_share=0.5, max_per_image=1),
        Keep(top_k=9, top_share=0.3, min_score=0.25, max_per_image=3),
    ],
    ids=str,
)
def test_same_as_a_plain_sort(tmp_path, keep, seed):
    shards = many(seed)
    for index, rows in enumerate(shards):
        write(tmp_path, index, rows)
    QUIET(tmp_path, tmp_path / "out", keep)
    expected = plain(shards, keep)
    loaded = load_ranking(tmp_path / "out")
    found = {}
    for index, rows in enumerate(shards):
        table = parquet.read_table(tmp_path / "out" / f"{index:05d}.kept.parquet")
        assert table.schema.types == [pyarrow.int64()] * 3
        kept = table.to_pydict()
        assert kept["row"] == sorted(kept["row"])
        for row, place, size in zip(*kept.values(), strict=True):
            found[index, row] = place, size
        numbers, ranks = loaded.rows(index)
        assert (numbers.dtype, ranks.dtype) == (np.int64, np.int64)
        assert (numbers.tolist(), ranks.tolist()) == (kept["row"], kept["rank"])
        assert loaded.shards[index].candidates == len(rows)
        assert loaded.shards[index].kept == len(kept["row"])
    assert list(table.column_names) == ["row", "rank", "class_size"]
    assert found == expected


def test_equal_scores_go_by_key_and_number_as_numbers(tmp_path):
    rows = [candidate("n1", key, rid, 0.2) for key, rid in ((10, 0), (9, 10), (9, 9), (100, 0))]
    write(tmp_path, 0, rows)
    QUIET(tmp_path, tmp_path, Keep(top_k=3))
    rows, ranks = load_ranking(tmp_path).rows(0)
    assert dict(zip(ranks.tolist(), rows.tolist(), strict=True)) == {1: 2, 2: 1, 3: 0}


@pytest.mark.parametrize(
    ("share", "size", "kept"),
    [(0.07, 100, 7), (0.1, 10, 1), (0.1, 11, 2), (0.01, 1, 1), (1.0, 3, 3), (1e-6, 5, 1)],
)
def test_share_is_rounded_up_from_the_decimal_as_written(share, size, kept):
    assert Keep(top_share=share).count(np.zeros(size)) == kept


def test_share_is_of_those_that_compete(tmp_path):
    rows = [candidate("n1", key, rid, 0.1 * rid) for key in range(4) for rid in range(5)]
    write(tmp_path, 0, rows)
    summary = QUIET(tmp_path, tmp_path, Keep(top_share=0.5, max_per_image=1))
    assert (summary.candidates, summary.competing, summary.kept) == (20, 4, 2)
    assert load_ranking(tmp_path).rows(0)[0].tolist() == [4, 9]  # rid 4 of the first two pictures


def test_classes_tell_what_is_on_both_sides_of_the_cut(tmp_path):
    clips = [0.1, 0.5, 0.3, 0.2, 0.4]
    write(tmp_path, 0, [candidate("n2", 1, rid, score) for rid, score in enumerate(clips)])
    write(tmp_path, 1, [candidate("n2", 2, 0, 0.0), candidate("n1", 3, 0, 0.15, "one")])
    write(tmp_path, 2, [])
    summary = QUIET(tmp_path, tmp_path, Keep(top_k=2, min_score=0.2, max_per_image=4))
    loaded = load_ranking(tmp_path)
    assert list(loaded.classes) == ["n1", "n2"]
    none, some = loaded.classes.values()
    assert (some.name, some.pictures, some.candidates) == ("name of n2", 2, 6)
    assert (some.competing, some.kept) == (5, 2)  # 0.1 is the fifth of its picture
    assert (some.lowest_kept, some.highest_dropped) == (0.4, 0.3)
    expected = np.quantile([0.0, 0.2, 0.3, 0.4, 0.5], [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    assert list(some.scores) == ["worst", "p5", "p25", "median", "p75", "p95", "best"]
    assert list(some.scores.values()) == pytest.approx(expected)
    assert (none.name, none.kept, none.lowest_kept, none.highest_dropped) == ("one", 0, None, 0.15)
    assert (summary.shards, summary.classes, summary.pictures, summary.empty) == (3, 2, 3, 1)
    assert loaded.rows(2)[0].tolist() == []
    assert "classes that keep none, as min_score is above all: 1" in str(summary)


def test_class_that_keeps_all_drops_none(tmp_path):
    write(tmp_path, 0, [candidate("n1", 1, 0, 0.3)])
    QUIET(tmp_path, tmp_path, Keep(top_k=5))
    only = load_ranking(tmp_path).classes["n1"]
    assert (only.lowest_kept, only.highest_dropped) == (0.3, None)


def test_only_what_decides_is_read(made, tmp_path, monkeypatch):
    asked = []

    def read(path, columns=None, real=ranking.read_candidates):
        asked.append(set(columns))
        return real(path, columns)

    monkeypatch.setattr(ranking, "read_candidates", read)
    QUIET(made, tmp_path / "out", Keep(top_k=1))
    assert asked == [{"wnid", "name", "score", "key", "rid"}] * 3


def test_candidates_without_a_manifest_do_not_count(made, tmp_path):
    before = QUIET(made, tmp_path / "a", Keep(top_k=3))
    write(made, 7, [candidate("n9", 5, 0, 0.9)])
    (made / "00007.done.json").unlink()
    assert QUIET(made, tmp_path / "b", Keep(top_k=3)) == before
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


# --- the same bytes ----------------------------------------------------------------------------


def test_same_bytes_in_whatever_order_shards_are_made_and_found(tmp_path, monkeypatch):
    shards = list(enumerate(many(5, shards=12)))
    results = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        random.Random(seed).shuffle(shards)
        for index, rows in shards:
            write(folder, index, rows)

        def found(directory, seed=seed, real=ranking.read_manifests):
            items = list(real(directory).items())
            random.Random(seed).shuffle(items)
            return dict(items)

        with monkeypatch.context() as shuffled:
            shuffled.setattr(ranking, "read_manifests", found)
            QUIET(folder, folder / "out", Keep(top_share=0.2, max_per_image=3))
        results.append(everything(folder / "out"))
    assert len(results[0]) == 13
    assert results[0] == results[1] == results[2]


def test_finished_ranking_is_left_alone(made, tmp_path, monkeypatch):
    first = QUIET(made, tmp_path / "out", Keep(top_k=3))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir() if p.is_file()}
    for name in ("read_scores", "file_sha256", "_publish"):
        monkeypatch.setattr(ranking, name, None)  # calling any of them would fail
    assert QUIET(made, tmp_path / "out", Keep(top_k=3)) == first
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_hash_is_of_the_settings_and_of_the_candidates(made, tmp_path):
    hashes = []
    for name, keep in (("a", Keep(top_k=3)), ("b", Keep(top_k=3)), ("c", Keep(top_k=4))):
        QUIET(made, tmp_path / name, keep)
        hashes.append(load_ranking(tmp_path / name).hash)
    write(made, 3, [candidate("n1", 77, 0, 0.9)])
    QUIET(made, tmp_path / "d", Keep(top_k=3))
    hashes.append(load_ranking(tmp_path / "d").hash)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    assert load_ranking(tmp_path / "c").keep == Keep(top_k=4)


# --- whole or not there ------------------------------------------------------------------------


@pytest.mark.parametrize("last", range(4))
def test_interrupted_ranking_is_none_and_the_next_gives_the_same_bytes(
    made, tmp_path, monkeypatch, last
):
    QUIET(made, tmp_path / "whole", Keep(top_k=3))
    done = []

    def replace_until(source, target, real=os.replace):
        if len(done) == last:
            raise KeyboardInterrupt
        done.append(os.path.basename(target))
        real(source, target)

    with monkeypatch.context() as cut:
        cut.setattr(os, "replace", replace_until)
        with pytest.raises(KeyboardInterrupt):
            QUIET(made, tmp_path / "out", Keep(top_k=3))
    assert sorted(everything(tmp_path / "out")) == [f"{i:05d}.kept.parquet" for i in range(last)]
    assert [p.name for p in (tmp_path / "out" / ".tmp").iterdir()] == ["ranking.lock"]
    with pytest.raises(ValueError, match="no finished ranking"):
        load_ranking(tmp_path / "out")
    QUIET(made, tmp_path / "out", Keep(top_k=3))
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_what_an_interrupted_ranking_of_other_settings_left_does_not_show(
    made, tmp_path, monkeypatch
):
    QUIET(made, tmp_path / "whole", Keep(top_k=3))
    with monkeypatch.context() as cut:
        cut.setattr(ranking, "_sync", None)
        with pytest.raises(TypeError):
            QUIET(made, tmp_path / "out", Keep(top_k=20))
    QUIET(made, tmp_path / "out", Keep(top_k=3))
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_data_is_on_the_disk_before_what_vouches_for_it(made, tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):

        def note(real, name, *arguments):
            events.append(name if name == "fsync" else os.path.basename(arguments[1]))
            return real(*arguments)

        monkeypatch.setattr(os, name, partial(note, getattr(os, name), name))
    QUIET(made, tmp_path / "out", Keep(top_k=3))
    kept = [event for i in range(3) for event in ("fsync", f"{i:05d}.kept.parquet")]
    assert events == [*kept, "fsync", "fsync", "ranking.json"]


def test_of_two_at_once_one_is_refused(made, tmp_path):
    def attempt(top_k):
        try:
            return QUIET(made, tmp_path / "out", Keep(top_k=top_k)).kept
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(attempt, [1, 2, 3, 4]))
    kept = [result for result in results if isinstance(result, int)]
    assert len(kept) == 1
    assert all("holds a ranking" in r for r in results if isinstance(r, str))
    loaded = load_ranking(tmp_path / "out")
    assert sum(len(loaded.rows(index)[0]) for index in range(3)) == kept[0]


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "at least one of top_k, top_share and min_score"),
        ({"max_per_image": 3}, "at least one of top_k, top_share and min_score"),
        ({"top_k": 0}, "top_k must be a whole number from 1 up, got 0"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"top_k": 1, "max_per_image": 0}, "max_per_image must be a whole number"),
        ({"top_share": 0.0}, "top_share must be above 0 and at most 1"),
        ({"top_share": 10}, "a tenth of each class is 0.1"),
        ({"top_share": math.nan}, "top_share must be"),
        ({"min_score": 25.0}, "min_score is a cosine"),
        ({"min_score": math.nan}, "min_score is a cosine"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Keep(**settings)


def test_folder_without_shards(tmp_path):
    with pytest.raises(ValueError, match="holds no finished shards"):
        QUIET(tmp_path, tmp_path / "out", Keep(top_k=1))
    assert not (tmp_path / "out").exists()


def test_shards_of_something_else(made, tmp_path):
    vouch(made, 1, sidecar=None)
    with pytest.raises(ValueError, match=r"should be 00001\.candidates\.parquet, but is 00001.tar"):
        QUIET(made, tmp_path / "out", Keep(top_k=1))


def test_shards_of_two_settings(made, tmp_path):
    vouch(made, 2, config_hash="other")
    with pytest.raises(ValueError, match="settings c0ffee and, such as 00002, of other"):
        QUIET(made, tmp_path / "out", Keep(top_k=1))


def lose(path):
    path.unlink()


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("spoil", "word"), [(lose, "missing"), (damage, "damaged")])
def test_candidate_file_that_is_not_what_its_manifest_says(
    made, tmp_path, monkeypatch, spoil, word
):
    spoil(made / "00002.candidates.parquet")
    monkeypatch.setattr(ranking, "read_scores", None)  # it stops before the work
    with pytest.raises(OSError, match=rf"{word}.*delete 00002\.done\.json"):
        QUIET(made, tmp_path / "out", Keep(top_k=1))
    assert everything(tmp_path / "out") == {}


def test_candidate_file_that_is_no_candidate_file(made, tmp_path):
    (made / "00001.candidates.parquet").write_bytes(b"words")
    vouch(made, 1)
    with pytest.raises(OSError, match="damaged"):
        QUIET(made, tmp_path / "out", Keep(top_k=1))
    assert everything(tmp_path / "out") == {}


@pytest.mark.parametrize("index", [0, 1])
def test_class_of_two_names(tmp_path, index):
    rows = {0: [candidate("n1", 1, 0, 0.1, "crane")], 1: []}
    rows[index].append(candidate("n1", 2, 0, 0.1, "heron"))
    for number, some in rows.items():
        write(tmp_path, number, some)
    with pytest.raises(ValueError, match=r"class n1 'heron', which is 'crane' before it"):
        QUIET(tmp_path, tmp_path / "out", Keep(top_k=1))


@pytest.mark.parametrize("key", ["²", "9" * 20])
def test_key_that_is_no_number_to_compare(tmp_path, key):
    write(tmp_path, 0, [candidate("n1", 1, 0, 0.1)])
    path = tmp_path / "00000.candidates.parquet"
    table = parquet.read_table(path)
    place = table.schema.get_field_index("key")
    parquet.write_table(
        table.set_column(place, table.schema.field(place), pyarrow.array([key])), path
    )
    vouch(tmp_path, 0)
    with pytest.raises(ValueError, match="keys must be whole numbers below"):
        QUIET(tmp_path, tmp_path / "out", Keep(top_k=1))


def test_score_that_is_no_number(tmp_path):
    write(tmp_path, 0, [candidate("n1", 1, 0, 0.1)])
    path = tmp_path / "00000.candidates.parquet"
    table = parquet.read_table(path)
    place = table.schema.get_field_index("score")
    wrong = pyarrow.array([math.nan])
    parquet.write_table(table.set_column(place, table.schema.field(place), wrong), path)
    vouch(tmp_path, 0)
    with pytest.raises(ValueError, match="no finite number"):
        QUIET(tmp_path, tmp_path / "out", Keep(top_k=1))


def test_nothing_kept(made, tmp_path):
    with pytest.raises(ValueError, match=r"min_score is 0\.9, but the best score is 0\.25; lower"):
        QUIET(made, tmp_path / "out", Keep(top_k=2, min_score=0.9))
    assert everything(tmp_path / "out") == {}


def test_no_candidate_in_any_shard(tmp_path):
    write(tmp_path, 0, [])
    with pytest.raises(ValueError, match="hold no candidate"):
        QUIET(tmp_path, tmp_path / "out", Keep(top_k=1))


def test_folder_with_a_ranking_of_other_settings(made, tmp_path):
    QUIET(made, tmp_path / "out", Keep(top_k=1))
    before = everything(tmp_path / "out")
    with pytest.raises(ValueError, match=r"top_k=1.*top_k=2.*another folder, or delete"):
        QUIET(made, tmp_path / "out", Keep(top_k=2))
    assert everything(tmp_path / "out") == before


def add_a_shard(folder):
    write(folder, 3, [candidate("n1", 5, 0, 0.2)])


def take_a_shard(folder):
    (folder / "00002.done.json").unlink()


def change_a_shard(folder):
    write(folder, 0, [candidate("n1", 5, 0, 0.2)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_a_shard, "of 3 shards, now there are 4; 00003 differs"),
        (take_a_shard, "of 3 shards, now there are 2; 00002 differs"),
        (change_a_shard, "of 3 shards, now there are 3; 00000 differs"),
    ],
)
def test_folder_with_a_ranking_of_other_candidates(made, tmp_path, change, message):
    QUIET(made, tmp_path / "out", Keep(top_k=1))
    before = everything(tmp_path / "out")
    change(made)
    with pytest.raises(ValueError, match=f"{message}; rank to another folder"):
        QUIET(made, tmp_path / "out", Keep(top_k=1))
    assert everything(tmp_path / "out") == before


@pytest.mark.parametrize("spoil", [lose, damage])
def test_kept_file_that_is_damaged(made, tmp_path, spoil):
    QUIET(made, tmp_path / "out", Keep(top_k=3))
    whole = everything(tmp_path / "out")
    spoil(tmp_path / "out" / "00001.kept.parquet")
    loaded = load_ranking(tmp_path / "out")
    assert len(loaded.rows(0)[0]) == loaded.shards[0].kept
    with pytest.raises(OSError, match=r"00001\.kept\.parquet"):
        loaded.rows(1)
    with pytest.raises(OSError, match=r"00001\.kept\.parquet"):  # finding it done looks again
        QUIET(made, tmp_path / "out", Keep(top_k=3))
    (tmp_path / "out" / "ranking.json").unlink()
    QUIET(made, tmp_path / "out", Keep(top_k=3))
    assert everything(tmp_path / "out") == whole


def test_shard_that_is_not_ranked(made, tmp_path):
    QUIET(made, tmp_path / "out", Keep(top_k=3))
    with pytest.raises(ValueError, match="ranks no shard 00009"):
        load_ranking(tmp_path / "out").rows(9)


@pytest.mark.parametrize("wrong", ["{", "[]", "{}", '{"keep": {"top_k": 0}}', '{"shards": []}'])
def test_damaged_ranking(tmp_path, wrong):
    (tmp_path / "ranking.json").write_text(wrong)
    with pytest.raises(ValueError, match=r"ranking\.json is damaged .*rank again"):
        load_ranking(tmp_path)


def test_ranking_json_says_what_it_was_made_of(made, tmp_path):
    QUIET(made, tmp_path / "out", Keep(top_k=3, min_score=0.1))
    record = json.loads((tmp_path / "out" / "ranking.json").read_text())
    assert record["keep"] == asdict(Keep(top_k=3, min_score=0.1))
    for index in range(3):
        shard = record["shards"][f"{index:05d}"]
        assert shard["candidates_sha256"] == file_sha256(made / f"{index:05d}.candidates.parquet")
        kept = tmp_path / "out" / f"{index:05d}.kept.parquet"
        assert shard["kept_sha256"] == file_sha256(kept)
    loaded = load_ranking(tmp_path / "out")
    assert asdict(loaded.classes["n1"]) == record["classes"]["n1"]
