"""Pictures of regions and of runs: overlays, contact sheets, curves, bars."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont

from alpha_clip.regions import Box, RegionSample, decode_rle

HIGHLIGHT = (255, 72, 66)
# Magma at equal steps: brighter is more, in grey and to the colour-blind as well.
HEAT = ("#000004", "#1c1044", "#4f127b", "#812581", "#b5367a", "#e55064", "#fb8761", "#fec287")


def overlay_region(
    image: Image.Image, mask: NDArray[np.bool_], colour: tuple[int, int, int] = HIGHLIGHT
) -> Image.Image:
    """Show a region of an image: its outline drawn, everything else dimmed.

    Args:
        image: Any PIL image.
        mask: The region `[H, W]`, of the image's size.
        colour: Of the outline.

    Returns:
        An RGB image of the same size.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    shown = np.where(mask[..., None], pixels, 0.35 * pixels + 0.2 * 255)
    line = 1 + 2 * max(1, round(0.005 * max(image.size)))  # MinFilter wants an odd window
    inner = np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MinFilter(line))) > 0
    shown[mask & ~inner] = colour
    return Image.fromarray(shown.round().astype(np.uint8))


def attention_overlay(
    image: Image.Image, attention: NDArray[np.floating[Any]], limit: float | None = None
) -> Image.Image:
    """Lay a heat map over a picture, which turns grey, so that colour means attention alone.

    Args:
        image: The picture as the tower saw it: `Normalisation.inverse` of its input, or the
            original where the transform squashes.
        attention: What the patches `[rows, columns]` receive, at least 0.
        limit: Attention of the brightest colour; by default the map's own largest.

    Returns:
        An RGB image of the picture's size.

    Raises:
        ValueError: If the attention is no map of finite values from 0 up.
    """
    heat = np.asarray(attention, np.float32)
    if heat.ndim != 2 or not heat.size or not (np.isfinite(heat) & (heat >= 0)).all():
        raise ValueError(
            "attention must be a map [rows, columns] of finite values from 0 up, got shape "
            f"{list(heat.shape)}; take one image and one head, or the mean, of grid_attention"
        )
    heat = heat / (limit or float(heat.max()) or 1.0)
    level = np.asarray(Image.fromarray(heat).resize(image.size, Image.Resampling.BILINEAR))
    colours = np.array([ImageColor.getrgb(c) for c in HEAT], np.float32)
    steps = np.linspace(0, 1, len(HEAT))
    shown = np.stack([np.interp(level, steps, channel) for channel in colours.T], -1)
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    return Image.fromarray((0.6 * shown + 0.4 * grey).round().astype(np.uint8))


_PANELS_A_ROW = 3


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet and the words under it."""

    image: Image.Image
    text: str


def region_tiles(sample: RegionSample, limit: int | None = None) -> list[Tile]:
    """Return a tile for each of the first `limit` regions of a sample, with box and phrase."""
    image = Image.open(io.BytesIO(sample.jpeg)).convert("RGB")
    tiles = []
    for region in sample.regions[:limit]:
        shown = overlay_region(image, decode_rle(region.rle))
        x1, y1, x2, y2 = Box(*region.box).pixels(sample.h, sample.w)
        line = max(1, round(0.004 * max(shown.size)))
        ImageDraw.Draw(shown).rectangle(
            (x1, y1, x2 - 1, y2 - 1), outline=(255, 220, 60), width=line
        )
        tiles.append(Tile(shown, region.text))
    return tiles


def contact_sheet(tiles: Sequence[Tile], columns: int = 6, tile_px: int = 180) -> Image.Image:
    """Lay pictures out in a grid, each with its text below.

    Raises:
        ValueError: If there are no tiles.
    """
    if not tiles:
        raise ValueError("a contact sheet needs at least one tile")
    font: Any = ImageFont.load_default(13)
    gap, line = 8, 34
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    size = (gap + columns * (tile_px + gap), gap + rows * (tile_px + line + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x = gap + (i % columns) * (tile_px + gap)
        y = gap + (i // columns) * (tile_px + line + gap)
        scale = tile_px / max(tile.image.size)
        shape = (max(1, round(tile.image.width * scale)), max(1, round(tile.image.height * scale)))
        picture = tile.image.resize(shape, Image.Resampling.LANCZOS)
        sheet.paste(picture, (x + (tile_px - shape[0]) // 2, y + (tile_px - shape[1]) // 2))
        draw.text((x, y + tile_px + 2), _wrap(tile.text, font, tile_px), fill="black", font=font)
    return sheet


def attention_sheet(
    rows: Sequence[tuple[Image.Image, NDArray[np.bool_], NDArray[np.floating[Any]]]],
    heads: int = 4,
    tile_px: int = 180,
) -> Image.Image:
    """Show where a tower looks: a row a region, its outline, the mean over heads, some heads.

    The words say which share of a map falls inside the region, and which share of the image the
    region is. Each map has its own scale.

    Args:
        rows: For each region, the picture as the tower saw it, the region `[H, W]` of that size,
            and what the patches receive `[heads, rows, columns]`.
        heads: How many heads to show, from the first.
        tile_px: Side of a picture.

    Raises:
        ValueError: If there are no rows, or as `attention_overlay` does.
    """
    tiles: list[Tile] = []
    heads = min([heads, *(len(attention) for _, _, attention in rows)])
    for image, mask, attention in rows:
        tiles.append(Tile(overlay_region(image, mask), f"region: {mask.mean():.0%} of the image"))
        names = ["mean", *(f"head {i}" for i in range(heads))]
        for name, heat in zip(names, [attention.mean(0), *attention[:heads]], strict=True):
            size, box = (heat.shape[1], heat.shape[0]), Image.Resampling.BOX
            cover = np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size, box))
            inside = (heat * cover).sum() / max(heat.sum(), 1e-12)
            tiles.append(Tile(attention_overlay(image, heat), f"{name}: {inside:.0%} inside"))
    return contact_sheet(tiles, columns=2 + heads, tile_px=tile_px)


def _wrap(text: str, font: Any, width: int) -> str:
    """Break a text into at most two lines of `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) == 2:
            lines[-1] = lines[-1][: max(0, len(lines[-1]) - 1)] + "…"
            break
        else:
            lines.append(word)
    return "\n".join(lines)


def plot_curves(
    curves: dict[str, tuple[list[float], list[float]]], y_label: str, file: Path
) -> None:
    """Draw lines over training steps into a PNG.

    Args:
        curves: Label -> (steps, values).
        y_label: What the values are.
        file: Where to write.
    """
    figure, (axes,) = _figure(6.4, 3.2)
    for label, (steps, values) in curves.items():
        axes.plot(steps, values, label=label, linewidth=1.4)
    axes.set(xlabel="step", ylabel=y_label)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


def plot_bars(
    series: dict[str, dict[str, float]], y_label: str, file: Path, limit: float = 1.0
) -> None:
    """Draw groups of bars into a PNG, with their values on top.

    Args:
        series: Series -> (name -> value); names that a series lacks stay empty.
        y_label: What the values are.
        file: Where to write.
        limit: Top of the axis.
    """
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    figure, (axes,) = _figure(max(6.4, 1.15 * len(names)), 3.6)
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        places = [names.index(name) + (i - (len(series) - 1) / 2) * width for name in values]
        bars = axes.bar(places, list(values.values()), width * 0.92, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks(range(len(names)), [fill(n.replace("/", "/ "), 16) for n in names], fontsize=8)
    axes.set(ylabel=y_label, ylim=(0, limit * 1.08))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)


def plot_intervals(panels: dict[str, dict[str, tuple[float, float, float]]], file: Path) -> None:
    """Draw values with their intervals into a PNG, a panel for each kind.

    Args:
        panels: Title -> (name -> value, lower and upper bound).
        file: Where to write.
    """
    longest = max(map(len, panels.values()))
    columns = min(len(panels), _PANELS_A_ROW)
    rows = -(-len(panels) // columns)
    figure, several = _figure(4.2 * columns, rows * (0.3 * longest + 0.7), (rows, columns), "x")
    for axes in several[len(panels) :]:
        axes.remove()
    for axes, (title, values) in zip(several[: len(panels)], panels.items(), strict=True):
        means, low, high = (np.array(column) for column in zip(*values.values(), strict=True))
        around = np.stack([means - low, high - means]).clip(min=0)
        axes.barh(list(values), means, xerr=around, height=0.7, error_kw={"lw": 0.8})
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
        axes.set_xlim(min(0.0, low.min()), 1.08 * max(high.max(), 1e-6))
    figure.savefig(file, dpi=120)


def plot_counts(counts: dict[str, float], title: str, file: Path) -> None:
    """Draw a list of counts into a PNG, one bar below the other."""
    figure, (axes,) = _figure(6.4, 0.26 * len(counts) + 0.9, grid="x")
    axes.barh(list(counts), list(counts.values()), height=0.7)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    figure.savefig(file, dpi=120)


def _figure(
    width: float, height: float, panels: tuple[int, int] = (1, 1), grid: str = "y"
) -> tuple[Any, Any]:
    """Return a figure and its axes, row by row; `panels` are rows and columns."""
    from matplotlib.figure import Figure  # not pyplot: no backend, no global state

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    several = figure.subplots(*panels, squeeze=False).ravel()
    for axes in several:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, alpha=0.3, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    return figure, several
