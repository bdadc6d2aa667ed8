"""Making shards of region-text pairs: its stages, its masks' text, and what SAM takes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alpha_clip.rle import decode_rle, encode_rle, rle_runs
from benchmarks import pipeline_sam
from benchmarks.pictures import blob
from benchmarks.table import report
from benchmarks.timing import Measured, Row, measure
from data_pipeline.runner import PipelineConfig
from data_pipeline.segmenters.base import Segmenter
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.segmenters.grabcut import GrabCutSegmenter
from data_pipeline.segmenters.promptable import pick_device
from data_pipeline.sources.grit import GritSource
from data_pipeline.sources.scene_drawing import SceneConfig
from data_pipeline.sources.scenes import write_scenes
from data_pipeline.sources.storage import find_inputs
from data_pipeline.stage_benchmark import STAGES, benchmark_stages

_SIZES_PX = ((640, 480), (1024, 768))  # of masks to encode: width, height
_MASKS = 4  # of each size
_CPU_ROUNDS = 3  # of SAM there, where an image takes ten seconds and more
_Encoder = Callable[[NDArray[np.bool_]], dict[str, Any]]
_Decoder = Callable[[dict[str, Any]], NDArray[np.bool_]]


def pipeline(
    rounds: int = 15,
    device: str = "cpu",
    sam: Literal["auto", "vit_b", "vit_l", "vit_h", "none"] = "auto",
    image_size_px: int = 1024,
    pictures: int = 20,
    boxes: int = 64,
    grabcut: bool = True,
    compile: bool = True,
    budget_s: float = 30.0,
    output: Path = Path("runs/benchmarks/pipeline.csv"),
) -> list[Row]:
    """Time the stages of a shard, encoding and decoding masks, and the parts of SAM.

    The first of each case is 1: all stages together; the box segmenter; Python's own loops;
    segment-anything's own functions; boxes one by one. SAM's weights are random.

    Args:
        rounds: How often to measure, at least 2; SAM on a CPU no more than three times.
        device: Where SAM runs; everything else runs on the CPU.
        sam: Its size; `auto` is vit_h on a GPU, else vit_b; `none` leaves out what needs SAM.
        image_size_px: Side of the square that SAM's encoder sees; a multiple of 16, at most its
            own 1024.
        pictures: Drawn pictures of about 640 x 480 px with four boxes each, for the stages.
        boxes: Boxes to decode on one embedding; half as many masks are enlarged and filtered.
        grabcut: Whether to time the stages with GrabCut, too.
        compile: Whether to time SAM's compiled encoder, too; on two cores compiling takes a minute.
        budget_s: Seconds after which a case ends before all its rounds; five are done anyway.
        output: CSV file for the table.

    Raises:
        ValueError: If a number is out of range, there is no such device, or two ways of doing one
            thing do not give the same.
    """
    for name, count, least in (
        ("rounds", rounds, 2),
        ("pictures", pictures, 1),
        ("boxes", boxes, 1),
    ):
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}; give more")
    device = str(pick_device(device))
    on_gpu = device.startswith("cuda")
    segmenters: dict[str, Segmenter] = {"box segmenter": BoxSegmenter()}
    if grabcut:
        segmenters["GrabCut"] = GrabCutSegmenter()
    rows = stage_rows(segmenters, pictures, rounds, budget_s) + rle_rows(rounds, budget_s)
    if sam != "none":
        size = ("vit_h" if on_gpu else "vit_b") if sam == "auto" else sam
        model = pipeline_sam.build(size, image_size_px, device)
        few = pipeline_sam.Rounds(rounds if on_gpu else min(rounds, _CPU_ROUNDS), device, budget_s)
        rows += pipeline_sam.encoder_rows(size, model, few, compile)
        rows += pipeline_sam.mask_rows(model, -(-boxes // 2), replace(few, count=rounds))
        rows += pipeline_sam.box_rows(model, boxes, few)
    report(rows, output, "the encoder's operations at the rate of large matrix products")
    return rows


def stage_rows(
    segmenters: dict[str, Segmenter], pictures: int, rounds: int, budget_s: float = math.inf
) -> list[Row]:
    """Time the stages of making a shard; each stage's ratio is its share of the whole.

    Committing waits for the disk once a shard: the fewer pictures, the larger its share.

    Args:
        segmenters: Name -> what makes the masks.
        pictures: Pictures a round, drawn once.
        rounds: How often to measure.
        budget_s: When to stop before all the rounds are done.

    Returns:
        How long a picture takes with each segmenter, then for each its stages.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in segmenters}
    drawing = SceneConfig(pictures, size_px=640, objects_min=4, objects_max=4, shard_size=pictures)
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(folder, drawing, workers=1)
        inputs = find_inputs(f"{folder}/*.tar")
        ways: dict[str, Callable[[], object]] = {
            name: partial(_shard, inputs, segmenter, pictures, found[name])
            for name, segmenter in segmenters.items()
        }
        case = "a shard, each picture"
        # Each run has pictures of its own to warm up with.
        whole = measure(case, ways, rounds, "cpu", warmup=0, budget_s=budget_s, items=1)
    rows = whole.rows() if len(segmenters) > 1 else []
    for name, stages in found.items():
        seconds = {"all stages": [sum(each.values()) for each in stages]}
        seconds |= {stage: [each[stage] for each in stages] for stage in STAGES}
        rows += Measured(f"{name}, each picture", seconds, items=1).rows()
    return rows


def _shard(
    inputs: list[str], segmenter: Segmenter, pictures: int, found: list[dict[str, float]]
) -> float:
    """Make a shard; return the seconds of a picture, `found` gets those of its stages."""
    config = PipelineConfig(GritSource(), segmenter)
    made = benchmark_stages(inputs, config, pictures, project_images=1)
    if made.kept != pictures:
        raise ValueError(
            f"expected {pictures} pictures in the shard, got {made.kept}: rejected ones cost less; "
            "find out why with alpha-clip-data grit"
        )
    found.append({stage: made.seconds[stage] / pictures for stage in STAGES})
    return sum(found[-1].values())


def rle_rows(rounds: int, budget_s: float = math.inf) -> list[Row]:
    """Time encoding masks and decoding them; Python's own loops are 1.

    Raises:
        ValueError: If two ways do not give the same.
    """
    rng = np.random.default_rng(0)
    encoders: dict[str, _Encoder] = {"Python groupby": by_groupby, "encode_rle": encode_rle}
    decoders: dict[str, _Decoder] = {"Python loops": by_loops, "decode_rle": decode_rle}
    rows: list[Row] = []
    for size in _SIZES_PX:
        masks = [np.asarray(Image.fromarray(blob(rng)).resize(size)) for _ in range(_MASKS)]
        texts = [encode_rle(mask) for mask in masks]
        _check_encoders(encoders, masks)
        _check_decoders(decoders, texts, masks)
        ways: dict[str, dict[str, Callable[[], object]]] = {
            "encoding": {name: partial(_each, way, masks) for name, way in encoders.items()},
            "decoding": {name: partial(_each, way, texts) for name, way in decoders.items()},
        }
        for work, variants in ways.items():
            case = f"{work} {_MASKS} masks of {size[0]} x {size[1]}"
            rows += measure(case, variants, rounds, "cpu", budget_s=budget_s, items=_MASKS).rows()
    return rows


def by_groupby(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Encode a mask by Python's groupby, as the published data script does."""
    counts: list[int] = []
    for i, (value, run) in enumerate(groupby(mask.ravel(order="F"))):
        if i == 0 and value:
            counts.append(0)
        counts.append(len(list(run)))
    return {"counts": counts, "size": list(mask.shape)}


def by_loops(rle: dict[str, Any]) -> NDArray[np.bool_]:
    """Decode COCO's text in Python, character by character and run by run, unchecked."""
    runs: list[int] = []
    value = shift = 0
    for character in rle["counts"]:
        code = ord(character) - 48
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    height, width = rle["size"]
    flat = np.zeros(height * width, bool)
    start = 0
    for i, run in enumerate(runs):
        flat[start : start + run] = i % 2
        start += run
    mask: NDArray[np.bool_] = flat.reshape(width, height).T
    return mask


def _each(way: Callable[[Any], object], items: list[Any]) -> None:
    for item in items:
        way(item)


def _check_encoders(encoders: dict[str, _Encoder], masks: list[NDArray[np.bool_]]) -> None:
    for mask in masks:
        expected = rle_runs(by_groupby(mask))
        for name, way in encoders.items():
            if not np.array_equal(rle_runs(way(mask)), expected):
                raise ValueError(f"{name} gives other runs than groupby; mend it before timing it")


def _check_decoders(
    decoders: dict[str, _Decoder], texts: list[dict[str, Any]], masks: list[NDArray[np.bool_]]
) -> None:
    for text, mask in zip(texts, masks, strict=True):
        for name, way in decoders.items():
            if not np.array_equal(way(text), mask):
                raise ValueError(f"{name} gives another mask than was encoded; mend it first")
