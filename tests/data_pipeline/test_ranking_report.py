"""A ranking drawn: the right candidates on the sheet, the right scores in the plot."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from alpha_clip.regions import decode_rle, encode_rle
from data_pipeline import candidates as candidate_files
from data_pipeline import ranking_report
from data_pipeline.candidates import Candidate, CandidateFile, CandidateSample
from data_pipeline.ranking import Keep, load_ranking, rank
from data_pipeline.ranking_report import draw_ranking, plot_scores
from data_pipeline.shard_files import file_sha256
from data_pipeline.shards import ShardManifest

figure_module = pytest.importorskip("matplotlib.figure")
HEIGHT, WIDTH = 60, 80


def candidate(wnid, key, rid, score, name):
    """A candidate whose box says its picture and its number."""
    x, y = 4 * rid, key % 20
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + 20, x : x + 24] = True
    box = (float(x), float(y), float(x + 24), float(y + 20))
    counts = encode_rle(mask)["counts"]
    place = (str(key), f"id {key}", f"{wnid}/{key}.JPEG", wnid, name, WIDTH, HEIGHT)
    return Candidate(*place, rid, box, counts, 480, 0.9, None, score)


def vouch(folder, index):
    path = folder / f"{index:05d}.candidates.parquet"
    numbers = dict.fromkeys(("samples", "regions", "rejected_samples", "rejected_regions"), 0)
    manifest = ShardManifest(
        tar="in.tar",
        **numbers,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        rejects={},
        config_hash="c0ffee",
        input={"path": "in.tar", "samples": 0, "regions": 0},
        sidecar=path.name,
    )
    (folder / f"{index:05d}.done.json").write_text(json.dumps(asdict(manifest)))


def write(folder, shards):
    folder.mkdir(exist_ok=True)
    for index, rows in enumerate(shards):
        file = CandidateFile(folder / f"{index:05d}.candidates.parquet")
        for one in rows:
            file.write(CandidateSample(one.key, (one,)), b"")
        file.close()
        vouch(folder, index)


def draw_candidates(classes, shards=3, pictures=2, each=4):
    """`each` candidates of `pictures` of every class in every shard, of drawn scores."""
    rng = np.random.default_rng(0)
    means = rng.normal(0.25, 0.02, classes)
    return [
        [
            candidate(f"n{c}", 1000 * c + 10 * s + p, rid, rng.normal(means[c], 0.03), f"thing {c}")
            for c in range(classes)
            for p in range(pictures)
            for rid in range(each)
        ]
        for s in range(shards)
    ]


@pytest.fixture
def made(tmp_path):
    """Makes candidates and their ranking; answers with their folders."""

    def make(shards, keep):
        write(tmp_path / "candidates", shards)
        rank(tmp_path / "candidates", tmp_path / "ranking", keep, progress=False)
        return tmp_path / "candidates", tmp_path / "ranking"

    return make


@pytest.fixture
def sheets(monkeypatch):
    """Collects the tiles of contact sheets."""
    found = []

    def sheet(tiles, columns, tile_px, real=ranking_report.contact_sheet):
        found.append(list(tiles))
        return real(tiles, columns, tile_px)

    monkeypatch.setattr(ranking_report, "contact_sheet", sheet)
    return found


@pytest.fixture
def figures(monkeypatch):
    """Collects figures; writing them, a second, is left out."""
    found = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda f, *_, **__: found.append(f))
    return found


def grey(index, candidate):
    return Image.new("RGB", (candidate.w, candidate.h), (120, 120, 120))


# --- the sheet ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 4096])
def test_sheet_shows_both_sides_of_the_cut(made, tmp_path, monkeypatch, sheets, rows_at_a_time):
    monkeypatch.setattr(candidate_files, "_ROWS", rows_at_a_time)
    shards = draw_candidates(5)
    folders = made(shards, Keep(top_k=4, max_per_image=2))
    asked = []

    def open_picture(index, found):
        asked.append((index, found))
        return grey(index, found)

    files = draw_ranking(*folders, open_picture, tmp_path / "out")
    assert files == [tmp_path / "out" / n for n in ("ranking_scores.png", "ranking_sheet.png")]
    expected = {}
    for c in range(5):
        best: dict[str, list] = {}
        for index, rows in enumerate(shards):
            for one in rows:
                if one.wnid == f"n{c}":
                    best.setdefault(one.key, []).append((-one.score, index, one))
        competing = sorted(one for own in best.values() for one in sorted(own)[:2])
        expected[c] = [(index, one) for _, index, one in (competing[i] for i in (0, 3, 4))]
    medians = [found.scores["median"] for found in load_ranking(folders[1]).classes.values()]
    order = sorted(range(5), key=lambda c: -medians[c])
    assert asked == [pair for c in order for pair in expected[c]]
    texts = [tile.text for tile in sheets[0]]
    states = ("1 of 12, kept", "4 of 12, kept", "5 of 12, dropped")
    assert texts == [
        f"thing {c}: {one.score:.3f}, {state}"
        for c in order
        for (_, one), state in zip(expected[c], states, strict=True)
    ]


def test_kept_and_dropped_are_outlined_in_their_colours(made, tmp_path, sheets):
    folders = made(draw_candidates(1), Keep(top_k=2))
    opened = []

    def open_picture(index, found):
        opened.append(found)
        return grey(index, found)

    draw_ranking(*folders, open_picture, tmp_path)
    colours = [ranking_report._KEPT_RGB] * 2 + [ranking_report.HIGHLIGHT]
    for tile, one, colour in zip(sheets[0], opened, colours, strict=True):
        pixels, mask = np.asarray(tile.image), decode_rle(one.rle)
        line = (pixels == colour).all(-1)
        assert line.any()
        assert not (line & ~mask).any()
        assert (pixels[mask & ~line] == 120).all()  # inside, the picture as it is
        assert (pixels[~mask] < 120).all()


def test_places_that_stay_empty_say_why(made, tmp_path, sheets):
    rows = [
        *(candidate("n1", 1, rid, 0.1 * rid, "none kept") for rid in (0, 1)),
        candidate("n2", 2, 0, 0.5, "one kept"),
        candidate("n2", 2, 1, 0.1, "one kept"),
        candidate("n3", 3, 0, 0.6, "all kept"),
        candidate("n3", 3, 1, 0.5, "all kept"),
    ]
    draw_ranking(*made([rows], Keep(min_score=0.4)), grey, tmp_path)
    assert [tile.text for tile in sheets[0]] == [
        "all kept: 0.600, 1 of 2, kept",
        "all kept: 0.500, 2 of 2, kept",
        "all kept: none is dropped",
        "one kept: 0.500, 1 of 2, kept",
        "one kept: no other is kept",
        "one kept: 0.100, 2 of 2, dropped",
        "none kept: none is kept",
        "none kept: no other is kept",
        "none kept: 0.100, 1 of 2, dropped",
    ]


def test_classes_of_a_sheet_are_drawn_by_the_seed(made, tmp_path, sheets):
    folders = made(draw_candidates(12, shards=1), Keep(top_k=1))
    for seed in (0, 0, 1):
        draw_ranking(*folders, grey, tmp_path, classes=4, seed=seed)
    first, again, other = ([tile.text for tile in tiles] for tiles in sheets)
    assert len(first) == 12
    assert first == again != other


def test_without_pictures_there_is_no_sheet_and_no_candidate_is_read(made, tmp_path):
    folders = made(draw_candidates(2), Keep(top_k=1))
    for path in folders[0].iterdir():
        path.unlink()
    files = draw_ranking(*folders, None, tmp_path / "out")
    assert files == list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "ranking_scores.png"]


def test_pictures_of_the_photographs(photos, tmp_path):
    """The whole way, with real pictures: the files are pictures of the size that was asked for."""
    names = json.loads((photos / "imagenet" / "class_names.json").read_text())
    rows = []
    for key, file in enumerate(sorted(photos.glob("imagenet/train/*/*.JPEG"))[:6]):
        with Image.open(file) as image:
            width, height = image.size
        wnid, mask = file.parent.name, np.zeros((height, width), bool)
        mask[20:90, 30:120] = True
        place = (str(key), file.stem, f"{wnid}/{file.name}", wnid, names[wnid], width, height)
        counts = encode_rle(mask)["counts"]
        box = (30.0, 20.0, 120.0, 90.0)
        rows.append(Candidate(*place, 0, box, counts, 6300, None, None, 0.2 + 0.01 * key))
    write(tmp_path / "c", [rows])
    rank(tmp_path / "c", tmp_path, Keep(top_share=0.5), progress=False)

    def open_picture(index, found):
        return Image.open(photos / "imagenet" / "train" / found.image)

    files = draw_ranking(tmp_path / "c", tmp_path, open_picture, tmp_path)
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert pixels.shape[1] == 8 + 6 * 188


# --- the plot ----------------------------------------------------------------------------------


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


def test_few_classes_have_a_row_each(made, tmp_path, figures):
    _, folder = made(draw_candidates(7), Keep(top_share=0.2, min_score=0.24))
    found = load_ranking(folder)
    plot_scores(found, tmp_path / "x.png")
    axes, counts = figures[0].axes
    classes = sorted(found.classes.values(), key=lambda c: -c.scores["median"])
    assert [label.get_text() for label in axes.get_yticklabels()] == [c.name for c in classes]
    labels = [label.get_text() for label in counts.get_yticklabels()]
    assert labels == [f"{c.kept} of 24" for c in classes]
    drawn = lines(axes)
    assert drawn["median"].get_xdata().tolist() == [c.scores["median"] for c in classes]
    cut = [(i, c.lowest_kept) for i, c in enumerate(classes) if c.kept]
    assert list(zip(*drawn["lowest kept"].get_data()[::-1], strict=True)) == cut
    assert drawn["min_score"].get_xdata() == [0.24, 0.24]
    assert "top_share 0.2, min_score 0.24" in figures[0].get_suptitle()
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the highest median on top


def test_many_classes_are_curves(made, tmp_path, figures):
    _, folder = made(draw_candidates(60, shards=1), Keep(top_k=3, min_score=0.24))
    found = load_ranking(folder)
    assert any(not c.kept for c in found.classes.values())
    plot_scores(found, tmp_path / "x.png")
    axes, below = figures[0].axes
    classes = sorted(found.classes.values(), key=lambda c: -c.scores["median"])
    drawn = lines(axes)
    assert drawn["median"].get_ydata().tolist() == [c.scores["median"] for c in classes]
    expected = [np.nan if c.lowest_kept is None else c.lowest_kept for c in classes]
    np.testing.assert_array_equal(drawn["lowest kept"].get_ydata(), expected)
    assert drawn["min_score"].get_ydata() == [0.24, 0.24]
    assert len(axes.collections) == 3
    (steps,) = below.patches
    assert steps.get_data().values.tolist() == [c.kept for c in classes]
    assert below.get_ylim()[0] == 0


@pytest.mark.parametrize("classes", [1, 40, 41])
def test_plot_is_a_picture(made, tmp_path, classes):
    folders = made(draw_candidates(classes, shards=1), Keep(top_k=1))
    (file,) = draw_ranking(*folders, None, tmp_path)
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert 0.005 < (pixels < 255).any(-1).mean() < 0.6


@pytest.mark.parametrize("name", ["$\\frac{$", "雪の中の犬 🐕", "a\nb"])
def test_names_are_drawn_as_they_are(made, tmp_path, name):
    """Mathematics, letters that the font lacks, and lines: no warning, no error."""
    folders = made([[candidate("n1", 1, 0, 0.25, name)]], Keep(top_k=1))
    assert len(draw_ranking(*folders, grey, tmp_path)) == 2


# --- refusals ----------------------------------------------------------------------------------


def test_folder_without_a_ranking(tmp_path):
    with pytest.raises(ValueError, match="no finished ranking"):
        draw_ranking(tmp_path, tmp_path, grey, tmp_path)


def test_no_class_to_show(tmp_path):
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        draw_ranking(tmp_path, tmp_path, grey, tmp_path, classes=0)


@pytest.mark.parametrize("change", ["other", "gone"])
def test_ranking_of_other_candidates(made, tmp_path, change):
    shards = draw_candidates(2)
    candidates, ranking = made(shards, Keep(top_k=1))
    if change == "other":
        write(candidates, [shards[0], shards[0]])
    else:
        (candidates / "00001.done.json").unlink()
    with pytest.raises(ValueError, match=r"shard 00001 of .* is not the one that .* ranks"):
        draw_ranking(candidates, ranking, grey, tmp_path)


def test_picture_of_another_size(made, tmp_path):
    folders = made(draw_candidates(1), Keep(top_k=1))
    with pytest.raises(ValueError, match=r"is 60 x 80 px, but should be 80 x 60; open n0/"):
        draw_ranking(*folders, lambda *_: Image.new("RGB", (HEIGHT, WIDTH)), tmp_path)


def test_candidate_that_is_not_sound(made, tmp_path):
    folder = tmp_path / "candidates"
    write(folder, draw_candidates(1, shards=1))
    path = folder / "00000.candidates.parquet"
    table = parquet.read_table(path)
    place = table.schema.get_field_index("area")
    areas = pyarrow.array([7] * len(table))
    parquet.write_table(table.set_column(place, table.schema.field(place), areas), path)
    vouch(folder, 0)
    rank(folder, tmp_path, Keep(top_k=1), progress=False)
    with pytest.raises(OSError, match=r"damaged: row .* a mask of 480 pixels, not 7"):
        draw_ranking(folder, tmp_path, grey, tmp_path)
