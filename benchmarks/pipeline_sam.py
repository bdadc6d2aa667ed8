"""What SAM takes: its image encoder, decoding boxes, enlarging masks; beside the package's own.

Weights are random, in SAM's sizes: as much work as trained ones, and nothing to download.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.machine import forward_flops, matmul_rate
from benchmarks.pictures import HEIGHT, WIDTH
from benchmarks.timing import Measured, Row, measure
from data_pipeline.filters import Filters
from data_pipeline.segmenters.base import MaskPrediction
from data_pipeline.segmenters.promptable import STABILITY_OFFSET, Embedding
from data_pipeline.segmenters.sam import SamSegmenter
from data_pipeline.segmenters.sam_attention import use_fused_attention

_CHUNKS = {"one by one": 1, "4 at a time": 4, "16 at a time": 16, "64 at a time": 64}  # boxes
_MASK_CHUNKS = {"ours, one by one": 1, "ours, 32 at a time": 32}  # on a CPU, and on a GPU
# Features may differ by this share of their norm, masks in this share of their pixels: bf16 has
# three digits, and convolutions on a GPU round to TF32.
_FEATURES_DIFFER = {torch.float32: 0.005, torch.bfloat16: 0.03}
_MASKS_DIFFER = 0.01
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# All that can be asked of a mask, with limits that any one meets.
_FILTERS = Filters(
    min_mask_share=0, max_mask_share=1, min_box_iou=0, min_predicted_iou=0, min_stability=0
)
_PICTURE = np.zeros((HEIGHT, WIDTH, 3), np.uint8)


@dataclass(frozen=True)
class Rounds:
    """How SAM is measured.

    Attributes:
        count: How often.
        device: Where.
        budget_s: When to stop a case before all its rounds are done.
    """

    count: int
    device: str
    budget_s: float

    def measure(self, case: str, ways: Mapping[str, Callable[[], object]], items: int) -> Measured:
        """Time ways that have all run once, which is warm-up enough for a CPU."""
        warmup = 2 if self.device.startswith("cuda") else 0
        return measure(case, dict(ways), self.count, self.device, warmup, self.budget_s, items)


def build(name: str, image_size_px: int, device: str) -> Any:
    """Build segment-anything's `Sam` with random weights.

    Args:
        name: `vit_b`, `vit_l` or `vit_h`.
        image_size_px: Side of the square that the encoder sees, perhaps smaller than its own.
        device: Where to build it.

    Raises:
        ValueError: If the encoder can't see such a square, or the package is missing.
    """
    try:
        from segment_anything import sam_model_registry
    except ImportError as error:
        raise ValueError("segment-anything is missing; install it, or give --sam none") from error

    torch.manual_seed(0)
    with torch.device(device):
        sam = sam_model_registry[name]().to(device).eval()
    encoder = sam.image_encoder
    patch, largest = encoder.patch_embed.proj.stride[0], encoder.img_size
    if not patch <= image_size_px <= largest or image_size_px % patch:
        raise ValueError(
            f"image_size_px must be a multiple of {patch} up to {largest}, got {image_size_px}"
        )
    side = image_size_px // patch
    encoder.img_size = image_size_px
    encoder.pos_embed = nn.Parameter(encoder.pos_embed[:, :side, :side].clone())
    sam.prompt_encoder.input_image_size = (image_size_px, image_size_px)
    sam.prompt_encoder.image_embedding_size = (side, side)
    with torch.no_grad():
        for block in encoder.blocks:  # zeros at first, which would hide a wrong bias
            block.attn.rel_pos_h.normal_(std=0.1)
            block.attn.rel_pos_w.normal_(std=0.1)
        for head in sam.mask_decoder.output_hypernetworks_mlps:
            head.layers[-1].weight.mul_(30)  # logits beyond ±1, where stability cuts
    return sam


@torch.inference_mode()
def encoder_rows(name: str, sam: Any, rounds: Rounds, compile: bool = True) -> list[Row]:
    """Time the image encoder with segment-anything's attention, with ours, and ours compiled.

    In fp32 and, on a GPU that has it, in bf16, there also for several images at a time. What does
    not fit into the GPU's memory is left out.

    Args:
        name: What it is, for the table.
        sam: As `build` gives it; it stays as it is.
        rounds: How to measure.
        compile: Whether to compile ours, too.

    Raises:
        ValueError: If features differ.
    """
    encoder, device = sam.image_encoder, rounds.device
    on_gpu = device.startswith("cuda")
    ours = deepcopy(encoder, {id(p): p for p in encoder.parameters()})  # with the same weights
    use_fused_attention(ours)
    towers = {"segment-anything": encoder, "ours": ours}
    if compile:
        towers["ours, compiled"] = torch.compile(ours, dynamic=False)
    halves = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)  # or emulated
    variants = {
        f"{tower}, {_NAMES[dtype]}": (forward, dtype)
        for dtype in (torch.float32, torch.bfloat16)[: 1 + halves]
        for tower, forward in towers.items()
    }
    side, rows = encoder.img_size, list[Row]()
    counted = deepcopy(encoder).to("meta")  # where counting takes no time
    for batch in (1, 8) if on_gpu else (1,):  # what `SamSegmenter` takes
        images = torch.randn(batch, 3, side, side, device=device)
        case = f"{name}'s encoder, {side} px, {batch} at a time"
        ways = {variant: partial(_encode, images, *how) for variant, how in variants.items()}
        limits = {variant: _FEATURES_DIFFER[dtype] for variant, (_, dtype) in variants.items()}
        fitting = dict(_checked(case, ways, limits))
        flops = forward_flops(counted, images.to("meta"))
        for row in rounds.measure(case, fitting, batch).rows() if fitting else []:
            floor_s = flops / matmul_rate(device, variants[row.variant][1])
            rows.append(replace(row, of_floor=1000 * floor_s / row.milliseconds))
    return rows


def _encode(images: Tensor, tower: nn.Module, dtype: torch.dtype) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        features: Tensor = tower(images)
        return features


def _checked(
    case: str, ways: Mapping[str, Callable[[], Tensor]], limits: dict[str, float]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the ways that fit into memory, if their features agree with the first one's."""
    expected = None
    for variant, way in ways.items():
        start = time.perf_counter()
        try:
            features = way().float().cpu()
        except torch.OutOfMemoryError:
            sys.stdout.write(f"{case}, {variant}: left out, the GPU's memory is too small\n")
            continue
        sys.stdout.write(f"{case}, {variant}: first call {time.perf_counter() - start:.1f} s\n")
        expected = features if expected is None else expected
        difference = float((features - expected).norm() / expected.norm())
        if not difference <= limits[variant]:
            raise ValueError(
                f"{variant}: expected the first way's features within {limits[variant]:g} of "
                f"their norm, got a difference of {difference:.2g}; mend it before timing it"
            )
        yield variant, way


def mask_rows(sam: Any, count: int, rounds: Rounds) -> list[Row]:
    """Time so many masks from small logits to full size, with their stability and the filters.

    Args:
        sam: As `build` gives it; only its sizes matter. Its encoder becomes ours.
        count: Masks.
        rounds: How to measure.
    """
    random, boxes = torch.Generator().manual_seed(0), _draw_boxes(count)
    side = sam.image_encoder.img_size // 4
    coarse = 5 * torch.randn(count, 1, 16, 16, generator=random).to(rounds.device)
    logits = functional.interpolate(coarse, (side, side), mode="bilinear")
    ious = torch.rand(count, generator=random).to(rounds.device)
    makers = {"segment-anything, one by one": partial(package_masks, sam, logits, ious)}
    for name, chunk in _MASK_CHUNKS.items():
        segmenter = _Decoded("", device=rounds.device, boxes_per_batch=chunk)
        segmenter.use(sam)
        segmenter.have(boxes, logits, ious)
        makers[name] = partial(segmenter.segment, _PICTURE, boxes)
    ways = {name: partial(_kept, make, boxes) for name, make in makers.items()}
    check_masks(ways)
    return rounds.measure(f"{count} masks of {side} px enlarged, filtered", ways, count).rows()


def box_rows(sam: Any, count: int, rounds: Rounds) -> list[Row]:
    """Time boxes to masks on an embedding that is there already, in chunks of several sizes.

    Args:
        sam: As `build` gives it. Its encoder becomes ours.
        count: Boxes.
        rounds: How to measure.
    """
    boxes, side = _draw_boxes(count), sam.prompt_encoder.image_embedding_size[0]
    random = torch.Generator().manual_seed(0)  # noise is decoded as fast as a photograph
    embedding = torch.randn(1, sam.prompt_encoder.embed_dim, side, side, generator=random)
    ways = {}
    for name, chunk in _CHUNKS.items():
        segmenter = _Embedded("", device=rounds.device, boxes_per_batch=chunk)
        segmenter.use(sam)
        segmenter.embedding = embedding.to(rounds.device)
        ways[name] = partial(segmenter.segment, _PICTURE, boxes)
    check_masks(ways)
    return rounds.measure(f"{count} boxes on an embedding", ways, count).rows()


class _Embedded(SamSegmenter):
    """Has the embedding of its picture already."""

    embedding: Tensor

    def encode(self, images: list[NDArray[np.uint8]]) -> Embedding:
        return (self.embedding,)


class _Decoded(_Embedded):
    """Has the small logits of its boxes already."""

    def have(self, boxes_xyxy_px: NDArray[np.float64], logits: Tensor, ious: Tensor) -> None:
        self._places = {tuple(box): i for i, box in enumerate(boxes_xyxy_px.tolist())}
        self._logits, self._ious, self.embedding = logits, ious, ious[:1]

    def decode(
        self, embedding: Embedding, boxes_xyxy_px: NDArray[np.float64], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        first = self._places[tuple(boxes_xyxy_px[0].tolist())]
        some = slice(first, first + len(boxes_xyxy_px))
        return self._logits[some], self._ious[some]


@torch.inference_mode()
def package_masks(sam: Any, logits: Tensor, ious: Tensor) -> list[MaskPrediction]:
    """Enlarge masks one by one with segment-anything's own functions, as its predictor does."""
    from segment_anything.utils.amg import calculate_stability_score
    from segment_anything.utils.transforms import ResizeLongestSide

    size, cut = (HEIGHT, WIDTH), sam.mask_threshold
    resized = ResizeLongestSide.get_preprocess_shape(*size, sam.image_encoder.img_size)
    masks = []
    for low, iou in zip(logits.split(1), ious, strict=True):
        full = sam.postprocess_masks(low, resized, size)[0]
        stability = calculate_stability_score(full, cut, STABILITY_OFFSET)
        mask = (full > cut)[0].cpu().numpy()
        masks.append(MaskPrediction(mask, float(iou), float(stability)))
    return masks


def check_masks(ways: Mapping[str, Callable[[], list[MaskPrediction]]]) -> None:
    """Raise `ValueError` if the masks or scores of a way are not the first one's."""
    expected = None
    for name, way in ways.items():
        masks = way()
        expected = masks if expected is None else expected
        for i, (made, first) in enumerate(zip(masks, expected, strict=True)):
            scores = (made.iou, first.iou), (made.stability, first.stability)
            pixels = float((made.mask != first.mask).mean())
            difference = max(pixels, *(abs((a or 0) - (b or 0)) for a, b in scores))
            if not difference <= _MASKS_DIFFER:
                raise ValueError(
                    f"{name}: expected the first way's mask {i} and its scores within "
                    f"{_MASKS_DIFFER:g}, got a difference of {difference:.2g}; mend it first"
                )


def _kept(
    make: Callable[[], list[MaskPrediction]], boxes_xyxy_px: NDArray[np.float64]
) -> list[MaskPrediction]:
    """Make masks, and ask of each what is asked before it goes into a shard."""
    masks = make()
    for made, box in zip(masks, boxes_xyxy_px.tolist(), strict=True):
        area = int(np.count_nonzero(made.mask))
        _FILTERS.check_mask(made.mask, area, box, made.iou, made.stability)
    return masks


def _draw_boxes(count: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, (WIDTH - 200, HEIGHT - 200), (count, 2))
    return np.concatenate([corners, corners + rng.uniform(40, 200, (count, 2))], 1)
