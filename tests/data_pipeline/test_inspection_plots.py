"""The figure of an inspection: what its panels hold, for few, many and no values."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.inspection_plots import one_line, plot_contents

figure_module = pytest.importorskip("matplotlib.figure")
NONE = np.empty(0)
IMAGES = ("width", "height", "regions_per_image")
REGIONS = ("area_share", "box_fill", "phrase_words", "score", "sam_iou", "stability")


def columns(count, **changes):
    """`count` images, each with one region; `changes` replace columns."""
    values = np.linspace(0.05, 1, count) if count else NONE
    made = {name: np.round(1 + 900 * values) for name in IMAGES}
    return {**made, **dict.fromkeys(REGIONS, values), **changes}


@pytest.fixture
def draw(monkeypatch):
    """Answers with the panels by their title; writing the picture, a second, is left out."""
    figures = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda f, *_, **__: figures.append(f))

    def plot(values, phrases=(), rejects=()):
        plot_contents(values, dict(phrases), dict(rejects), "title")
        return {axes.get_title(loc="left"): axes for axes in figures[-1].axes}

    return plot


def words(axes):
    return [text.get_text() for text in axes.texts]


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


@pytest.mark.parametrize("count", [0, 1, 10, 5000])
def test_figure_is_a_picture_of_one_size(count):
    odd = {"$5 and \\frac{": 4, "雪の中の犬 🐕": 3, "a\nb\x00\x1b[31m": 2, "": 1}
    png = plot_contents(columns(count), odd if count else {}, {"bad_box": 3}, "a $title")
    image = Image.open(io.BytesIO(png))
    assert image.size == (1430, 1045)
    pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    ink = (pixels < 255).any(-1)
    assert 0.005 < ink.mean() < 0.6


def test_every_panel_says_what_it_lacks(draw):
    panels = draw(columns(0))
    said = {title: words(axes) for title, axes in panels.items()}
    assert said == {
        "image size": ["no images"],
        "regions an image": ["no regions"],
        "mask's share of the image": ["no regions"],
        "mask area / box area": ["no regions"],
        "source's score": ["no scores"],
        "words a phrase": ["no regions"],
        "most frequent phrases": ["no phrases"],
        "rejects by reason": ["nothing was rejected"],
    }


def test_every_value_is_drawn(draw):
    panels = draw(columns(300, regions_per_image=np.arange(1.0, 301)), {"a": 3}, {"b": 2})
    for title in ("regions an image", "mask's share of the image", "mask area / box area"):
        assert sum(heights(panels[title])) == 300
    assert len(panels["image size"].collections[0].get_offsets()) == 300


def test_many_pictures_are_counted_in_cells(draw):
    panels = draw(columns(5000))
    cells = panels["image size"].collections[0].get_array()
    assert np.nansum(cells) == 5000


def test_pictures_of_one_size(draw):
    same = np.full(1000, 64.0)
    panels = draw(columns(1000, width=same, height=same))
    low, high = panels["image size"].get_xlim()
    assert low < 64 < high


def test_segmenters_scores_go_before_the_sources(draw):
    panels = draw(columns(20))
    axes = panels["segmenter's scores"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split(",")[0] for label in labels] == ["sam_iou", "stability"]
    assert sum(heights(axes)) == 40


def test_sources_score_where_there_is_no_other(draw):
    panels = draw(columns(20, sam_iou=NONE, stability=NONE))
    assert sum(heights(panels["source's score"])) == 20


@pytest.mark.parametrize("score", [0.0, 1.0, -3.5, 1e9])
def test_one_score_alone(draw, score):
    one = np.full(7, score)
    panels = draw(columns(7, score=one, sam_iou=NONE, stability=NONE))
    assert sum(heights(panels["source's score"])) == 7


def test_values_far_out_share_the_last_bar(draw):
    counts = np.array([2.0] * 999 + [4000.0])
    panels = draw(columns(1000, regions_per_image=counts, box_fill=counts / 2))
    axes = panels["regions an image"]
    assert axes.get_xlabel() == "last bar: up to 4000"
    assert heights(axes)[-1] == 1
    assert axes.get_xlim()[1] < 20
    assert panels["mask area / box area"].get_xlabel() == "last bar: up to 2e+03"
    assert sum(heights(panels["mask area / box area"])) == 1000


def test_phrases_are_drawn_as_they_are(draw):
    phrases = {"$5 and \\frac{": 4, "雪の中の犬 🐕": 3, "a\nb\x00\x1b[31m": 2, "x" * 99: 1}
    panels = draw(columns(4), phrases)
    axes = panels["most frequent phrases"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["$5 and \\frac{", "雪の中の犬 🐕", "a b [31m", "x" * 31 + "…"]
    assert words(axes) == ["4", "3", "2", "1"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top


def test_many_reasons_are_ranked_and_the_small_ones_added_up(draw):
    panels = draw(columns(3), {}, {f"reason_{i}": i + 1 for i in range(20)})
    axes = panels["rejects by reason"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "reason_19"
    assert names[-1] == "6 others"
    assert words(axes)[-1] == str(sum(range(1, 7)))
    assert len(names) == 15


def test_rejects_of_very_different_number_have_a_logarithmic_axis(draw):
    panels = draw(columns(3), {}, {"rare": 1, "frequent": 1_000_000})
    axes = panels["rejects by reason, logarithmic"]
    assert axes.get_xscale() == "log"
    assert words(axes) == ["1,000,000", "1"]
    assert all(bar.get_x() + bar.get_width() > axes.get_xlim()[0] for bar in axes.patches)


@pytest.mark.parametrize(
    ("text", "line"),
    [("a dog", "a dog"), (" a\t\ndog ", "a dog"), ("\x1b\x07", ""), ("abcdefghijk", "abcdefghi…")],
)
def test_one_line(text, line):
    assert one_line(text, 10) == line
