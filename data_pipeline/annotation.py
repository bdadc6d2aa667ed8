"""From boxes with phrases and masks to the sample that is stored."""

from __future__ import annotations

import numpy as np

from alpha_clip.regions import (
    RegionAnnotation,
    RegionSample,
    SampleError,
    StoredImage,
    encode_rle,
)
from data_pipeline.filters import Filters
from data_pipeline.segmenters.base import MaskPrediction
from data_pipeline.sources.base import Reject, SourceSample

BoxXyxyPx = tuple[float, float, float, float]


def annotate(
    item: SourceSample,
    image: StoredImage,
    masks: dict[BoxXyxyPx, MaskPrediction],
    filters: Filters,
    source: str,
) -> tuple[RegionSample, list[Reject]]:
    """Give each phrase the mask of its box, unless filters refuse it.

    Args:
        item: The picture's phrases.
        image: The picture as it is stored.
        masks: A mask for each box; phrases with one box share it.
        filters: What is left out.
        source: Name of the source, as samples say it.

    Returns:
        The sample, perhaps without any region, and what was refused.
    """
    areas = {box: int(np.count_nonzero(made.mask)) for box, made in masks.items()}
    rles = {box: encode_rle(made.mask) for box, made in masks.items() if areas[box]}
    regions: dict[int, RegionAnnotation] = {}
    rejects = []
    for phrase in item.phrases:
        box = phrase.box_xyxy_px
        made = masks[box]
        try:
            filters.check_mask(made.mask, areas[box], box, made.iou, made.stability)
        except SampleError as error:
            detail = f"{phrase.text}: {error.detail}"
            rejects.append(Reject(item.key, phrase.rid, error.reason, detail))
            continue
        regions[phrase.rid] = RegionAnnotation(
            rid=phrase.rid,
            text=phrase.text,
            kind=phrase.kind,
            span=phrase.span,
            box=box,
            rle=rles[box],
            area=areas[box],
            score=phrase.score,
            sam_iou=_short(made.iou),
            stability=_short(made.stability),
        )
    for rid, stays in filters.duplicates(list(regions.values())).items():
        rejects.append(Reject(item.key, rid, "duplicate_region", f"as region {stays}"))
        del regions[rid]
    sample = RegionSample(
        key=item.key,
        jpeg=image.jpeg,
        id=item.id,
        source=source,
        w=item.width,
        h=item.height,
        caption=item.caption,
        regions=tuple(regions.values()),
        reencoded=image.reencoded,
    )
    return sample, rejects


def _short(score: float | None) -> float | None:
    """Leave out the digits that say nothing: they are written millions of times."""
    return None if score is None else round(score, 4)
