"""A ranking, drawn: each class's scores with the cut, and candidates on both sides of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from alpha_clip.regions import SampleError, decode_rle
from alpha_clip.visualize import HIGHLIGHT, Tile, contact_sheet, overlay_region
from data_pipeline.candidates import Candidate, as_candidates, read_candidates
from data_pipeline.inspection_plots import check_plots, one_line
from data_pipeline.ranking import best_first, candidate_manifests, load_ranking, read_scores
from data_pipeline.ranking_record import ClassRanking, Ranking

_BY_NAME = 40  # more classes than this are drawn as curves, without their names
_TILE_PX = 360  # tiles wait at this size; the sheet shows them at half of it
_KEPT, _CUT = "#2a9d5c", "#d1322d"
_KEPT_RGB = (72, 220, 130)  # outlines have to show on photographs
_GREY, _BLUE = "#777777", "#4878b0"
_MISSING = ("none is kept", "no other is kept", "none is dropped")

OpenPicture = Callable[[int, Candidate], Image.Image]


def draw_ranking(
    candidates: Path,
    ranking: Path,
    open_picture: OpenPicture | None,
    output: Path,
    classes: int = 24,
    seed: int = 0,
) -> list[Path]:
    """Write `ranking_scores.png` and, if pictures can be opened, `ranking_sheet.png`.

    The scores are those of `ranking.json`. The sheet has the best candidate kept, the last one kept
    and the first one dropped of some classes; for it, a few columns of every candidate file are
    read, a shard at a time.

    Args:
        candidates: Folder of the first stage.
        ranking: Folder of its ranking.
        open_picture: Given a shard's number and a candidate, returns the candidate's picture,
            upright; `None` leaves the sheet out.
        output: Folder for the pictures.
        classes: Most classes on the sheet, drawn at random, those of the highest median first.
        seed: Of drawing them.

    Returns:
        The files.

    Raises:
        ValueError: If there is no ranking, it was not made of these candidates, or a picture is of
            another size than its candidate.
        OSError: If a candidate file is damaged.
        RuntimeError: If matplotlib is missing.
    """
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}; 24 fill a sheet")
    check_plots()
    found = load_ranking(ranking)
    files = [output / "ranking_scores.png"]
    output.mkdir(parents=True, exist_ok=True)
    plot_scores(found, files[0])
    if open_picture is not None:
        drawn = np.random.default_rng(seed).permutation(len(found.classes))[:classes]
        wnids = [list(found.classes)[i] for i in drawn]
        wnids.sort(key=lambda wnid: (-found.classes[wnid].scores["median"], wnid))
        tiles = _tiles(candidates, found, wnids, open_picture)
        files.append(output / "ranking_sheet.png")
        contact_sheet(tiles, columns=6, tile_px=_TILE_PX // 2).save(files[1])
    return files


def plot_scores(ranking: Ranking, file: Path) -> None:
    """Draw the scores that compete in each class, the highest median first, and the cut.

    Up to 40 classes have a row each; more are curves, with how many each class keeps below.

    Args:
        ranking: The ranking.
        file: The PNG to write.
    """
    from matplotlib.figure import Figure  # not pyplot: no backend, no global state

    classes = sorted(ranking.classes.values(), key=lambda c: (-c.scores["median"], c.name))
    many = len(classes) > _BY_NAME
    size = (11, 6.4) if many else (11, 1.5 + 0.3 * len(classes))
    figure: Any = Figure(figsize=size, layout="constrained")
    total = ranking.summary()
    limits = ", ".join(f"{n} {v:g}" for n, v in asdict(ranking.keep).items() if v is not None)
    figure.suptitle(
        f"{total.kept:,} of {total.candidates:,} candidates are kept, in {total.classes:,} classes "
        f"({limits})",
        fontsize=11,
    )
    (_plot_curves if many else _plot_rows)(figure, classes, ranking.keep.min_score)
    with warnings.catch_warnings():  # the font lacks some scripts; their names show as boxes
        warnings.filterwarnings("ignore", "Glyph|.*Unicode", UserWarning)
        figure.savefig(file, dpi=110)


def _plot_rows(figure: Any, classes: Sequence[ClassRanking], least: float | None) -> None:
    """Draw a row a class: its range, its quartiles, and what is kept."""
    axes = figure.subplots()
    _style(axes, "x")
    scores = {name: np.array([c.scores[name] for c in classes]) for name in classes[0].scores}
    rows = np.arange(len(classes))
    low, high = scores["worst"], scores["best"]
    axes.hlines(rows, low, high, _GREY, linewidth=1, label="all that compete")
    quartiles = scores["p75"] - scores["p25"]
    axes.barh(rows, quartiles, 0.5, scores["p25"], color=_BLUE, alpha=0.45, label="middle half")
    axes.plot(scores["median"], rows, "|", color=_BLUE, markersize=9, mew=2, label="median")
    cut = [(i, c.lowest_kept, c.scores["best"]) for i, c in enumerate(classes) if c.kept]
    where, lowest, best = np.array(cut, np.float64).T
    axes.hlines(where, lowest, best, _KEPT, linewidth=3, label="kept")
    axes.plot(lowest, where, "|", color=_CUT, markersize=12, mew=2, label="lowest kept")
    if least is not None:
        axes.axvline(least, color=_CUT, linestyle=":", linewidth=1, label="min_score")
    labels = [one_line(c.name) for c in classes]  # they may hold a `$`
    axes.set_yticks(rows, labels, fontsize=8, parse_math=False)
    axes.set_ylim(len(classes) - 0.4, -0.6)
    axes.use_sticky_edges = False  # else a bar's beginning is where the axis begins
    axes.margins(x=0.03)
    axes.set_xlabel("score against the class name", fontsize=9)
    counts = axes.twinx()  # how many, on the right
    counts.set_ylim(axes.get_ylim())
    counts.set_yticks(rows, [f"{c.kept:,} of {c.competing:,}" for c in classes], fontsize=8)
    counts.spines[:].set_visible(False)
    counts.tick_params(length=0)
    axes.legend(frameon=False, fontsize=8, ncols=6, loc="lower left", bbox_to_anchor=(0, 1))


def _plot_curves(figure: Any, classes: Sequence[ClassRanking], least: float | None) -> None:
    """Draw bands of quantiles over the classes, the cut, and how many are kept."""
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    scores = {name: np.array([c.scores[name] for c in classes]) for name in classes[0].scores}
    place = np.arange(1, len(classes) + 1)
    for low, high, depth in (("worst", "best", 0.15), ("p5", "p95", 0.3), ("p25", "p75", 0.5)):
        label = f"{low} to {high}"
        band = (scores[low], scores[high])
        axes.fill_between(place, *band, color=_BLUE, alpha=depth, linewidth=0, label=label)
    axes.plot(place, scores["median"], color="#1f3f66", linewidth=1.2, label="median")
    lowest = [np.nan if c.lowest_kept is None else c.lowest_kept for c in classes]
    axes.plot(place, lowest, ".", color=_CUT, markersize=2.5, label="lowest kept")
    if least is not None:
        axes.axhline(least, color=_CUT, linestyle=":", linewidth=1, label="min_score")
    axes.set_ylabel("score against the class name", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=6, loc="lower left", bbox_to_anchor=(0, 1))
    edges = np.arange(len(classes) + 1) + 0.5  # one shape: a bar each takes long to draw
    below.stairs([c.kept for c in classes], edges, fill=True, color=_KEPT)
    below.set(xlim=(0.5, len(classes) + 0.5), ylabel="kept")
    below.set_xlabel("classes, by the median of their scores", fontsize=9)
    below.yaxis.set_major_formatter("{x:,.0f}")
    for panel in (axes, below):
        _style(panel, "y")


def _style(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis=grid, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)


def _places(
    candidates: Path, ranking: Ranking, wnids: Sequence[str]
) -> dict[tuple[str, int], tuple[int, int]]:
    """Return where the candidates on the sheet are: class and rank -> shard and row."""
    manifests, names = candidate_manifests(candidates), dict[str, tuple[int, str]]()
    parts = []
    for index, shard in tqdm(ranking.shards.items(), "read", unit="shard"):
        if index not in manifests or manifests[index].sha256 != shard.candidates_sha256:
            raise ValueError(
                f"shard {index:05d} of {candidates} is not the one that {ranking.folder} ranks; "
                "give the folder that the ranking was made of"
            )
        scores = read_scores(manifests[index].file(candidates), names)
        numbers = [names[wnid][0] for wnid in wnids if wnid in names]
        rows = np.flatnonzero(np.isin(scores["wnid"], numbers))
        parts.append((np.full(len(rows), index), rows, scores[rows]))
    shards, rows, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    places = {}
    for wnid in wnids:
        own = np.flatnonzero(scores["wnid"] == names[wnid][0])
        order = own[best_first(scores[own], ranking.keep.max_per_image)]
        for rank in filter(None, _ranks(ranking.classes[wnid])):
            at = order[rank - 1]
            places[wnid, rank] = int(shards[at]), int(rows[at])
    return places


def _read_rows(
    candidates: Path, places: Collection[tuple[int, int]]
) -> dict[tuple[int, int], Candidate]:
    """Read candidates by shard and row; of a shard no more than a batch is in memory."""
    found = {}
    manifests = candidate_manifests(candidates)
    for index in sorted({shard for shard, _ in places}):
        file = manifests[index].file(candidates)
        wanted = sorted({row for shard, row in places if shard == index})
        start = 0
        for batch in read_candidates(file):
            for row in wanted:
                if start <= row < start + len(batch):
                    try:
                        found[index, row] = next(as_candidates(batch.slice(row - start, 1)))
                    except SampleError as error:
                        raise OSError(f"{file} is damaged: row {row}: {error}") from error
            start += len(batch)
            if start > wanted[-1]:
                break
    return found


def _tiles(
    candidates: Path, ranking: Ranking, wnids: Sequence[str], open_picture: OpenPicture
) -> list[Tile]:
    """Return three tiles a class: the best kept, the last kept, the first dropped."""
    places = _places(candidates, ranking, wnids)
    found = _read_rows(candidates, set(places.values()))
    tiles = []
    for wnid in wnids:
        of = ranking.classes[wnid]
        for rank, otherwise in zip(_ranks(of), _MISSING, strict=True):
            place = places.get((wnid, rank))
            if place is None:
                blank = Image.new("RGB", (4, 3), "#f0f0f0")
                tiles.append(Tile(blank, f"{one_line(of.name, 24)}: {otherwise}"))
            else:
                tiles.append(_tile(of, rank, place[0], found[place], open_picture))
    return tiles


def _ranks(of: ClassRanking) -> tuple[int, int, int]:
    """Return the ranks of a class's three tiles, 0 for one that is not."""
    dropped = of.kept + 1 if of.kept < of.competing else 0
    return min(of.kept, 1), of.kept if of.kept > 1 else 0, dropped


def _tile(
    of: ClassRanking, rank: int, shard: int, candidate: Candidate, open_picture: OpenPicture
) -> Tile:
    image = open_picture(shard, candidate)
    if image.size != (candidate.w, candidate.h):
        raise ValueError(
            f"the picture of candidate {candidate.rid} of {candidate.key} is {image.width} x "
            f"{image.height} px, but should be {candidate.w} x {candidate.h}; open "
            f"{candidate.image}, turned upright"
        )
    kept = rank <= of.kept
    shown = overlay_region(image, decode_rle(candidate.rle), _KEPT_RGB if kept else HIGHLIGHT)
    shown.thumbnail((_TILE_PX, _TILE_PX))
    state = "kept" if kept else "dropped"
    name = one_line(of.name, 24)
    return Tile(shown, f"{name}: {candidate.score:.3f}, {rank:,} of {of.competing:,}, {state}")
