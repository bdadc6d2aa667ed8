"""Pictures on their way through the tower: shown in threads ahead of it, encoded in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpha_clip.drops import Drops
from alpha_clip.embedding.sources import Source
from alpha_clip.embedding.store import Row
from alpha_clip.evaluation.focus_baselines import Encode
from alpha_clip.evaluation.region_views import RegionViews
from alpha_clip.model import AlphaClip
from alpha_clip.transforms import RegionTransform

_CPU_CHUNK = 8  # views in a pass on the CPU: more fall out of its cache


class Shown(NamedTuple):
    """A picture as the tower takes it.

    Attributes:
        rgba: Views `[views, 4, H, W]`.
        view: The number of each row's view.
        rows: What to embed.
        dropped: Reason and detail of what can't be used.
    """

    rgba: Tensor
    view: Tensor
    rows: list[Row]
    dropped: list[tuple[str, str]]


def shown(source: Source, transform: RegionTransform, focus: str | None, entry: Any) -> Shown:
    """Open a picture and show its regions, resized once; without a focus, the picture alone."""
    opened = source.open(entry)
    if opened.picture is None or not opened.rows:
        none = torch.empty(0, 4, transform.size, transform.size)
        return Shown(none, torch.arange(0), [], opened.dropped)
    if focus is None:
        rgba, view = transform(opened.picture.image)[None], torch.arange(1)
    else:
        (_, rgba, view), *_ = RegionViews([opened.picture], transform).all([focus], controls=False)
    return Shown(rgba, view, opened.rows, opened.dropped)


def ahead(
    pool: ThreadPoolExecutor,
    show: Callable[[Any], Shown],
    entries: Iterator[tuple[Any, int]],
    most: int,
) -> Iterator[Shown]:
    """Show entries in order, in threads, while those before go through the tower.

    Args:
        pool: The threads.
        show: What they do.
        entries: Entries, each with its number of rows.
        most: How many rows may wait: memory is bounded by rows, pictures have many or few.
    """
    waiting: deque[tuple[Future[Shown], int]] = deque()
    rows = 0
    try:
        for entry, size in entries:
            waiting.append((pool.submit(show, entry), size))
            rows += size
            while rows > most:
                future, size = waiting.popleft()
                rows -= size
                yield future.result()
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        for future, _ in waiting:
            future.cancel()


def encode_views(
    model: AlphaClip,
    pictures: Iterator[Shown],
    encode: Encode,
    batch_size: int,
    drops: Drops,
    seen: Callable[[int], object],
) -> tuple[NDArray[np.float32], list[Row]]:
    """Return the features of pictures or their regions, of length 1, and what they are of.

    Args:
        model: The model, on its device.
        pictures: As they come.
        encode: How the way of pointing encodes views.
        batch_size: Views that go through the tower at a time.
        drops: Where to count what can't be used.
        seen: Told of progress.

    Raises:
        ValueError: If features are not finite.
    """
    device = model.logit_scale.device
    chunk = min(batch_size, _CPU_CHUNK) if device.type == "cpu" else batch_size
    held, features, view, rows = list[Tensor](), list[Tensor](), list[Tensor](), list[Row]()
    views = waiting = 0
    for picture in pictures:
        view.append(picture.view + views)
        rows += picture.rows
        held.append(picture.rgba)
        views, waiting = views + len(picture.rgba), waiting + len(picture.rgba)
        for drop in picture.dropped:
            drops.add(*drop)
        if waiting >= chunk:
            *full, rest = torch.cat(held).split(chunk)
            if len(rest) == chunk:
                full, rest = [*full, rest], rest[:0]
            # Not fetched yet: while the device computes, the next pictures are shown.
            features += [encode(model, part.to(device)) for part in full]
            held, waiting = [rest], len(rest)
        seen(1)
    if waiting:
        features.append(encode(model, torch.cat(held).to(device)))
    if not rows:
        return np.empty((0, 0), np.float32), rows
    found = torch.cat(features).float().cpu()[torch.cat(view)]
    found = torch.nn.functional.normalize(found, dim=-1)
    if not torch.isfinite(found).all():
        raise ValueError(f"{model.name} gives features that are not finite; are its weights sound?")
    return np.asarray(found), rows
