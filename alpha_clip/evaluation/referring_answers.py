"""From how well texts fit candidates to the one that is chosen, and whether it is right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageDraw
from torchvision.ops import box_iou

from alpha_clip.evaluation.annotations import open_picture
from alpha_clip.evaluation.columns import Columns
from alpha_clip.evaluation.expressions import Expression
from alpha_clip.evaluation.spatial_relations import Entity, Probabilities, locate
from alpha_clip.visualize import Tile, contact_sheet

RIGHT = "right/"
_PLAIN = "without relations"
_ENOUGH = 0.5  # IoU
_EXAMPLES = 24
_CHOSEN, _MEANT = (255, 60, 60), (60, 220, 90)


def answer(
    expression: Expression,
    entity: Entity | None,
    logits: Mapping[str, Mapping[str, NDArray[np.float64]]],
    boxes_xyxy_px: NDArray[np.float64],
) -> dict[str, Any]:
    """Choose among candidates in each way, and compare with what is meant.

    The published arithmetic: a softmax over the candidates of the whole expression's logits, times
    where its parts say that the object is (`locate`). Candidates that can't be told apart share the
    answer, so that not pointing at all is guessing.

    Args:
        expression: What is said, and the boxes that are right.
        entity: What it says about places, if anything.
        logits: Way of pointing -> text -> logits `[N]`; the first way is the one to keep.
        boxes_xyxy_px: The candidates `[N, 4]`.

    Returns:
        A row: `right/WAY` in 0..1 and what was chosen and meant.
    """
    meant = np.array([[b.x1, b.y1, b.x2, b.y2] for b in expression.boxes], np.float64)
    iou = box_iou(torch.from_numpy(boxes_xyxy_px), torch.from_numpy(meant)).numpy()
    enough = (iou >= _ENOUGH).any(1)
    row: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for way, of_text in logits.items():
        found = _softmax(of_text[expression.text])
        chances = found
        if entity is not None and len(boxes_xyxy_px) > 1:
            likeness = {text: _softmax(of_text[text]) for text in entity.texts()}
            chances = found * locate(entity, likeness, boxes_xyxy_px)
        if not row:
            best = int(chances.argmax())
            row = {
                "expression": expression.text,
                "candidates": len(boxes_xyxy_px),
                "chosen_xyxy_px": boxes_xyxy_px[best],
                "meant_xyxy_px": meant[iou[best].argmax()],
                "probability": chances[best] / max(chances.sum(), 1e-300),
            }
        row[f"{RIGHT}{way}"] = enough[chances == chances.max()].mean()
        plain[f"{RIGHT}{_PLAIN}/{way}"] = enough[found == found.max()].mean()
    area = np.prod(boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2], axis=1)
    row |= {
        f"{RIGHT}candidates/guess": enough.mean(),
        f"{RIGHT}candidates/largest": enough[area == area.max()].mean(),
        f"{RIGHT}candidates/best": float(enough.any()),
    }
    return {**row, **plain}


def _softmax(logits: NDArray[np.float64]) -> Probabilities:
    raised: Probabilities = np.exp(logits - logits.max())
    chances: Probabilities = raised / raised.sum()
    return chances


def draw_answers(columns: Columns, images: Path, file: Path) -> None:
    """Draw some answers, spread over the data: what was chosen (red) and what is meant (green)."""
    rows = np.linspace(0, len(columns["file"]) - 1, _EXAMPLES).round().astype(int)
    tiles = []
    for row in dict.fromkeys(rows.tolist()):
        image = open_picture(images / str(columns["file"][row]), None)
        draw = ImageDraw.Draw(image)
        line = max(2, round(0.008 * max(image.size)))
        for name, colour in (("meant_xyxy_px", _MEANT), ("chosen_xyxy_px", _CHOSEN)):
            x1, y1, x2, y2 = columns[name][row].tolist()
            inset = line if colour == _CHOSEN else 0  # both are seen where they are one
            x1, y1, x2, y2 = x1 + inset, y1 + inset, x2 - inset, y2 - inset
            draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=line)
        tiles.append(Tile(image, str(columns["expression"][row])))
    contact_sheet(tiles).save(file)
