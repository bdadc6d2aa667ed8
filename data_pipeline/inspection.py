"""Looking at finished shards: numbers, a contact sheet, and IoU with true masks."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from alpha_clip.regions import RegionSample, decode_rle
from alpha_clip.visualize import Tile, contact_sheet, region_tiles
from data_pipeline.shards import read_manifests, read_shard
from data_pipeline.truth import TrueMasks, mask_iou


@dataclass
class Inspection:
    """What finished shards hold.

    Attributes:
        shards: Number of shards.
        samples: Images.
        regions: Regions.
        rejects: Reason -> how often.
        phrases: Number of different phrases.
        mean_area: Mean share of the image that a mask covers.
        true_masks: Regions that a true mask was found for.
        mean_iou: Mean IoU of made and true masks, or `None` without true masks.
        iou_above_half: Share of them with IoU of at least 0.5, or `None`.
    """

    shards: int = 0
    samples: int = 0
    regions: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    phrases: int = 0
    mean_area: float = 0.0
    true_masks: int = 0
    mean_iou: float | None = None
    iou_above_half: float | None = None


def inspect_shards(
    directory: Path, output: Path, masks: str | None = None, tiles: int = 48
) -> Inspection:
    """Read finished shards; write `inspection.json` and `contact_sheet.png`.

    Args:
        directory: The data set's folder.
        output: Folder for the two files.
        masks: Pattern of files with true masks; see `TrueMasks.read`.
        tiles: Regions on the contact sheet.

    Returns:
        The numbers.

    Raises:
        ValueError: If the folder holds no finished shard, or the masks are none.
        OSError: If a shard is damaged.
    """
    manifests = read_manifests(directory)
    if not manifests:
        raise ValueError(f"{directory} holds no finished shards (NNNNN.done.json)")
    truth = TrueMasks.read(masks) if masks else TrueMasks({})
    found = Inspection(shards=len(manifests))
    rejects: Counter[str] = Counter()
    phrases: set[str] = set()
    areas: list[float] = []
    ious: list[float] = []
    pictures: list[Tile] = []
    for manifest in manifests.values():
        rejects.update(manifest.rejects)
        if (size := (directory / manifest.tar).stat().st_size) != manifest.bytes:
            raise OSError(f"{manifest.tar} is damaged: {size} bytes long, not {manifest.bytes}")
        for sample in read_shard(directory / manifest.tar):
            found.samples += 1
            found.regions += len(sample.regions)
            phrases.update(region.text for region in sample.regions)
            areas += [region.area / (sample.w * sample.h) for region in sample.regions]
            ious += _ious(sample, truth)
            if len(pictures) < tiles:
                pictures += region_tiles(sample, tiles - len(pictures))
    found.rejects = dict(sorted(rejects.items()))
    found.phrases = len(phrases)
    found.mean_area = float(np.mean(areas)) if areas else 0.0
    found.true_masks = len(ious)
    if ious:
        found.mean_iou = float(np.mean(ious))
        found.iou_above_half = float(np.mean(np.array(ious) >= 0.5))
    output.mkdir(parents=True, exist_ok=True)
    (output / "inspection.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    if pictures:
        contact_sheet(pictures, columns=8).save(output / "contact_sheet.png")
    return found


def _ious(sample: RegionSample, truth: TrueMasks) -> list[float]:
    pairs = ((decode_rle(r.rle), truth.find(sample, r)) for r in sample.regions)
    return [mask_iou(made, true) for made, true in pairs if true is not None]
