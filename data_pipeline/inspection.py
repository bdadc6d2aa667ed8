"""Looking at finished shards: numbers, plots, a contact sheet, and IoU with true masks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from alpha_clip.regions import Box, RegionSample, decode_rle
from alpha_clip.visualize import Tile, contact_sheet, region_tiles
from data_pipeline.inspection_plots import check_plots, one_line, plot_contents
from data_pipeline.shards import ShardManifest, read_manifests
from data_pipeline.truth import TrueMasks, mask_iou

_STEP = 5  # skipping a sample means reading it: at most so many are read for one that counts
_TILE_PX = 360  # tiles wait at this size; the sheet shows them at half of it
_PERCENTILES = {"min": 0, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}
_SCORES = ("score", "sam_iou", "stability", "clip")
_COLUMNS = {  # what is measured -> its name in the table
    "width": "width, px",
    "height": "height, px",
    "regions_per_image": "regions an image",
    "area_share": "mask / image area",
    "box_fill": "mask / box area",
    **{name: name for name in _SCORES},
    "phrase_words": "words a phrase",
}


@dataclass
class Inspection:
    """What finished shards hold.

    The first seven numbers are exact, from the manifests. All others describe the samples that
    were read, which lie spread over the data set.

    Attributes:
        shards: Number of shards.
        samples: Images.
        regions: Regions.
        bytes: Size of the shards.
        rejects: Reason -> how often.
        rejected_samples: Samples that came in and were lost.
        rejected_regions: Regions that came in and were lost.
        samples_read: Samples that were read for what follows.
        regions_read: Regions of these.
        phrases: Number of different phrases.
        frequent_phrases: The 20 most frequent phrases -> how often, the first most.
        kinds: Kind of phrase -> its share.
        mean_area: Mean share of the image that a mask covers.
        reencoded: Share of pictures that are not the input's own bytes.
        repeated_pictures: Pictures whose very bytes came before, under another key.
        percentiles: What was measured -> its `min`, `p5`, `p25`, `p50`, `p75`, `p95` and `max`,
            or `None` where nothing has it. `width`, `height` and `regions_per_image` are of
            images; `area_share`, `box_fill` (mask area / box area), `score`, `sam_iou`,
            `stability`, `clip` and `phrase_words` are of regions.
        true_masks: Regions that a true mask was found for.
        mean_iou: Mean IoU of made and true masks, or `None` without true masks.
        iou_above_half: Share of them with IoU of at least 0.5, or `None`.
    """

    shards: int = 0
    samples: int = 0
    regions: int = 0
    bytes: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    rejected_samples: int = 0
    rejected_regions: int = 0
    samples_read: int = 0
    regions_read: int = 0
    phrases: int = 0
    frequent_phrases: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, float] = field(default_factory=dict)
    mean_area: float = 0.0
    reencoded: float = 0.0
    repeated_pictures: int = 0
    percentiles: dict[str, dict[str, float] | None] = field(default_factory=dict)
    true_masks: int = 0
    mean_iou: float | None = None
    iou_above_half: float | None = None

    def __str__(self) -> str:
        lines = [f"{'':<20}{'in':>14}{'kept':>14}{'lost':>14}"]
        lines.append(f"{'shards':<20}{'':>14}{self.shards:>14,}")
        lines.append(f"{'size':<20}{'':>14}{tqdm.format_sizeof(self.bytes, 'B'):>14}")
        for name in ("samples", "regions"):
            kept, lost = getattr(self, name), getattr(self, f"rejected_{name}")
            lines.append(f"{name:<20}{kept + lost:>14,}{kept:>14,}{lost:>14,}")
        rejects = Counter(self.rejects).most_common()
        lines += [f"  {one_line(reason):<46}{n:>14,}" for reason, n in rejects]
        lines += ["", f"read: {self.samples_read:,} samples with {self.regions_read:,} regions"]
        lines.append(f"{'':<20}" + "".join(f"{name:>10}" for name in _PERCENTILES))
        for name, found in self.percentiles.items():
            values = [f"{v:>10.4g}" for v in found.values()] if found else [f"{'none':>10}"]
            lines.append(f"{_COLUMNS[name]:<20}{''.join(values)}")
        shares = [f"{kind} {share:.1%}" for kind, share in self.kinds.items()]
        lines += ["", f"{self.phrases:,} different phrases: {', '.join(shares) or 'none'}"]
        lines += [f"  {n:>12,}  {one_line(t, 60)}" for t, n in self.frequent_phrases.items()]
        lines += ["", f"{self.reencoded:.1%} of the pictures were encoded again"]
        lines.append(f"{self.repeated_pictures:,} pictures repeat another one, byte for byte")
        if self.mean_iou is not None:
            lines.append(
                f"mean IoU {self.mean_iou:.3f} with {self.true_masks:,} true masks; "
                f"{self.iou_above_half:.1%} of them have at least 0.5"
            )
        return "\n".join(lines)


def inspect_shards(
    directory: Path,
    output: Path,
    masks: str | None = None,
    tiles: int = 48,
    samples: int = 20_000,
) -> Inspection:
    """Write `inspection.json`, `plots.png` and `contact_sheet.png` about finished shards.

    Totals come from the manifests. Contents come from a bounded number of samples: as many from
    each shard as its size asks for, at equal steps in it, or, of a shard much larger than that,
    from its first part. Shards of the wrong length are found; `verify_shards` finds more.

    Args:
        directory: The data set's folder.
        output: Folder for the files, each of which appears whole.
        masks: Pattern of files with true masks; see `TrueMasks.read`.
        tiles: Regions on the contact sheet, spread over the samples; without any there is none.
        samples: Most samples to take the contents from; bounds time and memory.

    Returns:
        The numbers.

    Raises:
        ValueError: If the folder holds no finished shard, the masks are none, or no sample may be
            read.
        OSError: If a shard is damaged.
        RuntimeError: If matplotlib is missing.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}; 20,000 show most of a set")
    check_plots()
    manifests = list(read_manifests(directory).values())
    if not manifests:
        raise ValueError(f"{directory} holds no finished shards (NNNNN.done.json)")
    found = _totals(directory, manifests)
    shares = _shares([manifest.samples for manifest in manifests], samples)
    contents = _Contents(TrueMasks.read(masks) if masks else TrueMasks({}), tiles, sum(shares))
    chosen = [pair for pair in zip(manifests, shares, strict=True) if pair[1]]
    for manifest, share in tqdm(chosen, desc="inspect", unit="shard"):
        step = min(_STEP, manifest.samples // share)
        for sample in islice(manifest.read(directory), 0, share * step, step):
            contents.add(sample)
    contents.describe(found)
    title = (
        f"{directory.resolve().name}: {found.samples:,} samples with {found.regions:,} regions; "
        f"what {found.samples_read:,} of the samples show"
    )
    output.mkdir(parents=True, exist_ok=True)
    plots = plot_contents(contents.arrays(), found.frequent_phrases, found.rejects, title)
    _publish(output / "plots.png", plots)
    if contents.tiles:
        sheet = io.BytesIO()
        contact_sheet(contents.tiles, columns=8, tile_px=_TILE_PX // 2).save(sheet, "PNG")
        _publish(output / "contact_sheet.png", sheet.getvalue())
    _publish(output / "inspection.json", (json.dumps(asdict(found), indent=1) + "\n").encode())
    return found


class _Contents:
    """What the samples show, collected one by one; pictures are kept as small tiles alone.

    Args:
        truth: True masks to compare with.
        limit: Most tiles.
        expected: Samples to come.
    """

    def __init__(self, truth: TrueMasks, limit: int, expected: int) -> None:
        self.truth, self.limit, self.expected = truth, limit, expected
        self.columns = {name: array("d") for name in _COLUMNS}
        self.phrases: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.ious: list[float] = []
        self.tiles: list[Tile] = []
        self.pictures: set[bytes] = set()
        self.samples = self.reencoded = 0

    def add(self, sample: RegionSample) -> None:
        """Take a sample's numbers, and its share of the tiles."""
        self.samples += 1
        self.reencoded += sample.reencoded
        self.pictures.add(hashlib.blake2b(sample.jpeg, digest_size=16).digest())
        self.columns["width"].append(sample.w)
        self.columns["height"].append(sample.h)
        self.columns["regions_per_image"].append(len(sample.regions))
        for region in sample.regions:
            x1, y1, x2, y2 = Box(*region.box).pixels(sample.h, sample.w)
            self.columns["area_share"].append(region.area / (sample.w * sample.h))
            self.columns["box_fill"].append(region.area / ((x2 - x1) * (y2 - y1)))
            self.columns["phrase_words"].append(len(region.text.split()))
            for name in _SCORES:
                if (value := getattr(region, name)) is not None:
                    self.columns[name].append(value)
            self.phrases[region.text] += 1
            self.kinds[region.kind] += 1
            if (true := self.truth.find(sample, region)) is not None:
                self.ious.append(mask_iou(decode_rle(region.rle), true))
        self._add_tiles(sample)

    def _add_tiles(self, sample: RegionSample) -> None:
        """Keep tiles so that they are spread over the samples, and over their regions."""
        due = self.samples * self.limit // self.expected - len(self.tiles)
        if due <= 0:
            return
        first = len(self.tiles) % len(sample.regions)
        turned = sample.regions[first:] + sample.regions[:first]
        try:
            tiles = region_tiles(replace(sample, regions=turned[:due]))
        except (OSError, SyntaxError) as error:
            raise OSError(f"the picture of sample {sample.key} is damaged: {error}") from error
        for tile in tiles:
            tile.image.thumbnail((_TILE_PX, _TILE_PX))
        self.tiles += tiles

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """Return the columns as arrays."""
        return {name: np.array(column, np.float64) for name, column in self.columns.items()}

    def describe(self, found: Inspection) -> None:
        """Write down what the samples showed."""
        regions = self.kinds.total()
        found.samples_read, found.regions_read = self.samples, regions
        found.phrases = len(self.phrases)
        found.frequent_phrases = dict(self.phrases.most_common(20))
        found.kinds = {kind: count / regions for kind, count in self.kinds.most_common()}
        found.reencoded = self.reencoded / max(self.samples, 1)
        found.repeated_pictures = self.samples - len(self.pictures)
        columns = self.arrays()
        found.percentiles = {name: _percentiles(column) for name, column in columns.items()}
        found.mean_area = float(columns["area_share"].mean()) if regions else 0.0
        found.true_masks = len(self.ious)
        if self.ious:
            found.mean_iou = float(np.mean(self.ious))
            found.iou_above_half = float(np.mean(np.array(self.ious) >= 0.5))


def _totals(directory: Path, manifests: list[ShardManifest]) -> Inspection:
    """Add up the manifests, and see that each shard is there in full."""
    found, rejects = Inspection(shards=len(manifests)), Counter[str]()
    for manifest in manifests:
        file = manifest.file(directory)
        if (size := file.stat().st_size) != manifest.bytes:
            raise OSError(f"{file} is damaged: {size} bytes long, not {manifest.bytes}")
        rejects.update(manifest.rejects)
        for name in ("samples", "regions", "bytes", "rejected_samples", "rejected_regions"):
            setattr(found, name, getattr(found, name) + getattr(manifest, name))
    found.rejects = dict(sorted(rejects.items()))
    return found


def _shares(counts: list[int], limit: int) -> list[int]:
    """Return how many samples to take of each shard: `limit` in all, at equal steps over all."""
    ends = np.cumsum([0, *counts])
    due = -(-ends * min(limit, int(ends[-1])) // max(int(ends[-1]), 1))
    return [int(share) for share in np.diff(due)]


def _percentiles(values: NDArray[np.float64]) -> dict[str, float] | None:
    if not len(values):
        return None
    found = np.percentile(values, list(_PERCENTILES.values()))
    return {name: float(value) for name, value in zip(_PERCENTILES, found, strict=True)}


def _publish(file: Path, data: bytes) -> None:
    """Write a file so that it is never seen in part."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
