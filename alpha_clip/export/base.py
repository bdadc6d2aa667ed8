"""What every export does: write beside the target, compare the numbers, then move."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alpha_clip.model import AlphaClip
from alpha_clip.surgery import alpha_entry, alpha_parameters

log = logging.getLogger(__name__)
_SAME_CLIP = 0.5


@dataclass(frozen=True)
class ExportReport:
    """What an export found when it loaded its own result.

    Attributes:
        directory: The export.
        max_difference: Largest difference of any feature between the export and our model.
    """

    directory: str
    max_difference: float


def check_difference(difference: float, tolerance: float) -> None:
    """Refuse an export that computes something else.

    Raises:
        ValueError: If the difference is above the tolerance, or no number.
    """
    if not difference <= tolerance:
        raise ValueError(
            f"the export's features differ by {difference:.1e}, more than {tolerance:.0e}; it was "
            "not kept"
        )


def refuse_late_alpha(model: AlphaClip, consumer: str) -> None:
    """Refuse a model whose alpha enters later than a consumer's own code can have it.

    Args:
        model: What to export.
        consumer: Whose code would run it.

    Raises:
        ValueError: If alpha enters anywhere but at the first layer.
    """
    entry = alpha_entry(model.visual)
    if not entry.is_first_layer:
        raise ValueError(
            f"alpha enters {model.name} in front of block {entry.block}, but the stock code of "
            f"{consumer} takes pictures at the first layer alone, with nothing added further in; "
            "export it as torch_export or onnx, or train one with alpha_block 0"
        )


def warn_if_untrained(model: AlphaClip) -> None:
    """Say in the log if alpha does nothing yet."""
    if not any(bool(kernel.any()) for kernel in alpha_parameters(model.visual)):
        log.warning("alpha's kernel is zero: the export sees the whole image whatever the region")


def warn_if_another_clip(old: nn.Module, new: nn.Module) -> None:
    """Say in the log if a tower looks like one that was not trained from the tower it replaces.

    Alpha training hardly moves the patch kernels for RGB, and nor does tuning with a language
    model; those of another CLIP of the same shape have nothing to do with them.

    Args:
        old: The consumer's tower.
        new: The tower that takes its place.
    """
    was, now = (
        next(m.weight for m in tower.modules() if isinstance(m, nn.Conv2d))[:, :3].detach()
        for tower in (old, new)
    )
    if was.is_meta or now.is_meta:
        return
    cosine = float(torch.cosine_similarity(was.float().cpu().ravel(), now.float().cpu().ravel(), 0))
    if not cosine > _SAME_CLIP:
        log.warning(
            "the new tower's patch kernels are unlike the old one's (cosine %.2f): it does not "
            "seem to come from the same CLIP, and the model will not understand what it sees",
            cosine,
        )


def probe(model: AlphaClip) -> Float[Tensor, "4 4 size size"]:
    """Return random images with random regions, to compare an export with its model."""
    generator = torch.Generator().manual_seed(0)
    rgba = torch.randn(4, 4, model.image_size, model.image_size, generator=generator)
    rgba[:, 3:] = torch.where(rgba[:, 3:] > 0, 1, -1) * model.normalisation.whole_image
    return rgba


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of any feature, relative to the largest feature."""
    return float((ours.float() - theirs.float()).abs().max() / ours.float().abs().max())


@contextmanager
def fresh_directory(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder beside `target` that becomes `target` if nothing goes wrong.

    Args:
        target: The folder that will hold the export.
        overwrite: Whether a folder that is there may be replaced.

    Raises:
        ValueError: If `target` holds something and `overwrite` is off.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} is not empty; pass --overwrite true to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
