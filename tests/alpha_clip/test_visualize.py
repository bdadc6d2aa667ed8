from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alpha_clip.regions import RegionSample, decode_rle
from alpha_clip.visualize import (
    HIGHLIGHT,
    Tile,
    attention_overlay,
    attention_sheet,
    contact_sheet,
    overlay_region,
    plot_bars,
    plot_curves,
    region_tiles,
)


def test_overlay_draws_the_outline_and_dims_the_rest() -> None:
    mask = np.zeros((60, 80), bool)
    mask[20:40, 30:60] = True
    pixels = np.full((60, 80, 3), (10, 200, 90), np.uint8)
    shown = np.asarray(overlay_region(Image.fromarray(pixels), mask))
    assert shown.shape == pixels.shape
    assert (shown[25:35, 35:55] == pixels[25:35, 35:55]).all()
    assert (shown[20, 30:60] == HIGHLIGHT).all()
    assert (shown[20:40, 59] == HIGHLIGHT).all()
    dimmed = np.round(0.35 * pixels[0, 0] + 0.2 * 255)
    assert (shown[~mask] == dimmed).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_overlay_takes_any_image_and_leaves_it(mode: str) -> None:
    image = Image.new(mode, (9, 7))
    before = image.tobytes()
    shown = overlay_region(image, np.eye(7, 9, dtype=bool), (1, 2, 3))
    assert (shown.mode, shown.size) == ("RGB", (9, 7))
    assert shown.getpixel((0, 0)) == (1, 2, 3)
    assert image.tobytes() == before


def test_attention_is_brightest_where_it_is_largest() -> None:
    heat = np.linspace(0, 1, 4 * 6).reshape(4, 6)
    shown = attention_overlay(Image.new("RGB", (120, 80), (90, 10, 200)), heat)
    assert (shown.mode, shown.size) == ("RGB", (120, 80))
    grey = np.asarray(shown.convert("L"), int)[10::20, 10::20]  # middles of the patches
    assert (np.diff(grey.ravel()) > 0).all()
    assert (np.diff(grey, axis=1) > 0).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_colour_means_attention_alone(mode: str) -> None:
    image = Image.new(mode, (30, 20))
    before = image.tobytes()
    flat = attention_overlay(image, np.full((2, 3), 0.25, np.float32))
    assert len(flat.getcolors()) == 1
    assert flat == attention_overlay(image, np.full((4, 6), 7.0))
    assert attention_overlay(image, np.zeros((2, 3))).getpixel((5, 5)) < flat.getpixel((5, 5))
    assert image.tobytes() == before


def test_attention_can_share_a_scale() -> None:
    image, heat = Image.new("RGB", (20, 20)), np.array([[0.1, 0.2], [0.3, 0.4]])
    assert attention_overlay(image, heat, 0.4) == attention_overlay(image, heat)
    assert attention_overlay(image, heat, 0.8) == attention_overlay(image, heat / 2, 0.4)
    beyond = attention_overlay(image, heat * 100, 0.4)
    assert beyond.getpixel((10, 10)) == attention_overlay(image, heat).getpixel((19, 19))


@pytest.mark.parametrize(
    "heat", [np.ones((2, 3, 3)), np.ones(9), np.ones((0, 4)), [[np.nan]], [[np.inf]], [[-0.1]]]
)
def test_what_is_no_map_of_attention_is_refused(heat: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"map \[rows, columns\] of finite values"):
        attention_overlay(Image.new("RGB", (9, 9)), np.asarray(heat))


def test_attention_sheet_has_a_row_for_each_region(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[Tile] = []

    def keep(given: list[Tile], **settings: int) -> Image.Image:
        tiles.extend(given)
        return contact_sheet(given, **settings)

    monkeypatch.setattr("alpha_clip.visualize.contact_sheet", keep)
    mask = np.zeros((40, 40), bool)
    mask[:20, :20] = True  # the first of 2 x 2 patches
    heads = np.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    image = Image.new("RGB", (40, 40), "teal")
    sheet = attention_sheet([(image, mask, heads), (image, ~mask, heads)], heads=2, tile_px=40)
    assert [t.text for t in tiles[:4]] == [
        "region: 25% of the image",
        "mean: 33% inside",
        "head 0: 100% inside",
        "head 1: 0% inside",
    ]
    assert [t.text for t in tiles[4:]][2:] == ["head 0: 0% inside", "head 1: 100% inside"]
    assert sheet.size == (8 + 4 * 48, 8 + 2 * 82)
    with pytest.raises(ValueError, match="at least one tile"):
        attention_sheet([])


def test_a_tile_for_each_region(make_sample: Callable[..., RegionSample]) -> None:
    sample = make_sample("0", ("red", "green", "blue"), 90, 60)
    tiles = region_tiles(sample)
    assert [t.text for t in tiles] == ["red thing", "green thing", "blue thing"]
    assert [t.text for t in region_tiles(sample, 2)] == ["red thing", "green thing"]
    for tile, region in zip(tiles, sample.regions, strict=True):
        assert tile.image.size == (90, 60)
        x1, y1, x2, y2 = (int(v) for v in region.box)
        for corner in ((x1, y1), (x2 - 1, y2 - 1)):
            assert tile.image.getpixel(corner) == (255, 220, 60)
        outside = ~decode_rle(region.rle)
        outside[y1:y2, x1:x2] = False
        assert np.asarray(tile.image)[outside].min() > 50  # lifted towards grey


def test_contact_sheet_has_a_place_for_every_tile() -> None:
    tiles = [Tile(Image.new("RGB", (40, 20), (i * 30, 0, 0)), f"number {i}") for i in range(7)]
    sheet = np.asarray(contact_sheet(tiles, columns=3, tile_px=40))
    for i in range(7):
        assert (sheet == (i * 30, 0, 0)).all(-1).sum() >= 40 * 20, i
    one = contact_sheet(tiles[:1], columns=3, tile_px=40)
    assert one.width < sheet.shape[1]
    assert one.height < sheet.shape[0]


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (3, 3)])
@pytest.mark.parametrize("text", ["", "word", "many words " * 30, "x" * 300, "日本語 ✓"])
def test_contact_sheet_takes_any_shape_and_text(size: tuple[int, int], text: str) -> None:
    sheet = contact_sheet([Tile(Image.new("RGB", size, "black"), text)], tile_px=50)
    assert sheet.size == (66, 100)
    assert np.asarray(sheet)[8:58, 8:58].min() == 0


def test_an_empty_contact_sheet_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tile"):
        contact_sheet([])


def test_plots_are_pictures(tmp_path: Path) -> None:
    plot_curves({"a": ([0.0, 1.0], [3.0, 2.0]), "b": ([0.0], [1.0])}, "loss", tmp_path / "c.png")
    series = {"seen": {"alpha": 0.9, "crop": 0.4}, "held out": {"alpha": 0.7}}
    plot_bars(series, "top-1", tmp_path / "b.png")
    for name in ("c.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert picture.width > 600
            assert len(set(picture.convert("RGB").resize((60, 40)).get_flattened_data())) > 5
