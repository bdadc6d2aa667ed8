from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alpha_clip.regions import RegionSample, decode_rle
from alpha_clip.visualize import (
    HIGHLIGHT,
    Tile,
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
