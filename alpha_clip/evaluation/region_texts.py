"""How well texts fit regions, in the views of each, summed over models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from alpha_clip.evaluation.focus_baselines import FOCUS
from alpha_clip.evaluation.labelled import LabelledPicture
from alpha_clip.evaluation.region_views import RegionViews
from alpha_clip.geometry import SharedGeometry
from alpha_clip.model import AlphaClip

ALL_VIEWS = "all views"
Logits: TypeAlias = dict[str, NDArray[np.float64]]
"""Way of pointing -> [regions, texts]: cosine similarities times the model's logit scale."""


def region_text_logits(
    models: Sequence[AlphaClip],
    pictures: list[LabelledPicture],
    texts: Sequence[Float[Tensor, "texts dim"]],
    focus: Sequence[str],
    geometry: SharedGeometry,
    batch_size: int,
) -> Logits:
    """Compare the regions of some pictures with texts.

    Args:
        models: Their logits are added.
        pictures: With at least one region in all.
        texts: Features of the texts of each model, of length 1.
        focus: Ways of pointing, of `focus_baselines.FOCUS`.
        geometry: How images become squares.
        batch_size: Images that go through the tower at a time.
    """
    found: Logits = {}
    for model, target in zip(models, texts, strict=True):
        device = model.logit_scale.device
        scale = model.logit_scale.double().exp()
        views = RegionViews(pictures, model.transform.replace(geometry=geometry))
        for name, rgba, view in views.all(list(focus), controls=False):
            parts = [FOCUS[name].encode(model, p.to(device)) for p in rgba.split(batch_size)]
            logits = scale * torch.cat(parts).double()[view.to(device)] @ target.double().T
            found[name] = found.get(name, 0) + logits.cpu().numpy()
    return found


def with_all_views(logits: Logits, aggregate: Literal["sum", "max"]) -> Logits:
    """Put ways together as `all views`, before each by itself; one way stays as it is."""
    if len(logits) == 1:
        return logits
    stacked = np.stack(list(logits.values()))
    return {ALL_VIEWS: stacked.sum(0) if aggregate == "sum" else stacked.max(0), **logits}
