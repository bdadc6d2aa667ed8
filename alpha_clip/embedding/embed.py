"""Embeddings of regions and pictures for retrieval databases: `alpha-clip embed`.

The next pictures are decoded and resized in threads while the tower works; part after part is
written, so that memory does not grow with the data, and a run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import multiprocessing as mp
from tqdm import tqdm

import alpha_clip
from alpha_clip.embedding.sources import Source, open_source
from alpha_clip.embedding.store import Dtype, EmbeddingStore, Format
from alpha_clip.embedding.views import ahead, encode_views, shown
from alpha_clip.evaluation.focus_baselines import FOCUS
from alpha_clip.evaluation.journal import ListedDrops, add_weights
from alpha_clip.evaluation.runner import check_drops
from alpha_clip.factory import create_model
from alpha_clip.geometry import Geometry
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import alpha_entry, fold_alpha

MakeModel: TypeAlias = Callable[[str], AlphaClip]
_THREADS = 8  # that open pictures for a device other than the CPU, at most


def embed(
    checkpoint: str | None,
    output: str,
    data: list[str] | None = None,
    images: str | None = None,
    annotations: str | None = None,
    texts: str | None = None,
    name: str | None = None,
    pretrained: str | None = None,
    focus: str = "alpha",
    geometry: Geometry | None = None,
    format: Format = "parquet",
    dtype: Dtype = "float32",
    device: str = "cpu",
    devices: int = 1,
    batch_size: int = 64,
    max_images: int | None = None,
    max_dropped: float = 0.01,
) -> None:
    """Write the embeddings of regions or pictures, of length 1, for a retrieval database.

    The data are folders of region-text shards, or images: alone each whole picture is a row, with
    annotations each object. Stopped and started again, it goes on where it was; the folder is
    finished when it holds embeddings.json.

    Args:
        checkpoint: A folder written by training or by save_checkpoint, or published weights; null
            with name and pretrained takes a plain CLIP.
        output: Folder to write: part-NNNNN-DIGEST.parquet (or .npy and .jsonl) and embeddings.json.
        data: Folders of finished shards; ids are KEY/RID, with several folders FOLDER/KEY/RID.
        images: Folder of pictures (jpg, jpeg, png, webp), at any depth; ids are their paths in it.
        annotations: A COCO or LVIS file about images; ids are those of the annotations.
        texts: What categories are called: a COCO or LVIS file, a list of names, or {id: name}; null
            takes the categories of annotations.
        name: Architecture, where the checkpoint does not say it.
        pretrained: The CLIP that published weights belong to: a tag or a file.
        focus: How to point at a region: alpha, box alpha, crop, no alpha, ...
        geometry: How images become squares; null takes the checkpoint's own.
        format: What a part is: parquet, or npy with the rows beside it as jsonl.
        dtype: Type of the embeddings' numbers.
        device: Where to run it, such as cpu or cuda.
        devices: How many of them; each has a process of its own.
        batch_size: Regions or pictures that go through the tower at a time.
        max_images: Most pictures to read; null reads all.
        max_dropped: Share of pictures that may be missing or damaged.
    """
    _check_numbers(devices, batch_size, max_images)
    source = open_source(data, images, annotations, texts, max_images)
    if focus not in FOCUS:
        raise ValueError(f"expected focus to be one of {list(FOCUS)}, got {focus!r}")
    if source.whole and focus not in ("alpha", "no alpha"):
        raise ValueError(
            f"focus {focus!r} points at regions, and whole pictures have none; leave it out, or "
            "give annotations"
        )
    several = devices > 1 and device != "cpu"
    places = [f"{device}:{i}" if several else device for i in range(devices)]
    make_model = partial(_model, name, pretrained, checkpoint, geometry)
    settings = {"focus": None if source.whole else focus, "format": format, "dtype": dtype}
    work = _Work(source, Path(output), settings, batch_size, max_dropped, len(places))
    record = _run(work, make_model, places)
    dropped = sum(record["dropped"].values())
    more = f"; {dropped} dropped, see embeddings.json" if dropped else ""
    sys.stdout.write(f"{output}: {record['rows']} embeddings of {record['dim']} numbers{more}\n")


def _check_numbers(devices: int, batch_size: int, max_images: int | None) -> None:
    if min(devices, batch_size, 1 if max_images is None else max_images) < 1:
        raise ValueError(
            "expected devices, batch_size and max_images of at least 1, got "
            f"{devices}, {batch_size} and {max_images}"
        )


def _model(
    name: str | None,
    pretrained: str | None,
    checkpoint: str | None,
    geometry: Geometry | None,
    device: str,
) -> AlphaClip:
    return create_model(name, pretrained, checkpoint, device=device, geometry=geometry)[0]


@dataclass(frozen=True)
class _Work:
    """What every process is told.

    Attributes:
        source: What to embed.
        folder: Where to write.
        settings: Focus, format and dtype.
        batch_size: Views that go through the tower at a time.
        max_dropped: Share of pictures that may be unusable.
        processes: How many share the machine.
    """

    source: Source
    folder: Path
    settings: dict[str, Any]
    batch_size: int
    max_dropped: float
    processes: int

    def store(self, model: AlphaClip) -> EmbeddingStore:
        """Open the folder for the embeddings of a model."""
        return EmbeddingStore(self.folder, _about(model, self.settings))

    def check_drops(self, dropped: list[tuple[str, str]]) -> None:
        """Raise a ValueError if more was dropped than is allowed."""
        check_drops(dropped, self.source.parts().values(), self.max_dropped)


def _about(model: AlphaClip, settings: dict[str, Any]) -> dict[str, Any]:
    """Return all that embeddings depend on but the data, with a digest of it."""
    weights = hashlib.sha256()
    add_weights(weights, model)
    with torch.inference_mode():
        one = torch.zeros(1, 3, model.image_size, model.image_size, device=model.logit_scale.device)
        dim = model.encode_image(one).shape[1]
    about = {
        "model": model.name,
        "dim": dim,
        "normalised": True,
        **settings,
        "geometry": model.transform.geometry,
        "transform": repr(model.transform),
        "weights": weights.hexdigest()[:16],
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    versions = {"alpha_clip": alpha_clip.__version__, "torch": torch.__version__}
    return {**about, "fingerprint": digest, "versions": versions}


def _run(work: _Work, make_model: MakeModel, places: list[str]) -> dict[str, Any]:
    """Do the parts that are not done yet; return the record of all.

    Raises:
        ValueError: If the folder holds something else, or too much can't be used.
        RuntimeError: If one of the processes fails.
    """
    model = make_model(places[0])
    store = work.store(model)
    parts = list(work.source.parts())
    store.check_parts(parts)
    todo = [part for part in parts if not store.has(part)]
    if todo:
        store.reopen()  # until all is done, no record says that it is
    context = mp.get_context("spawn")
    others = [
        context.Process(target=_process, args=(work, make_model, place, todo[i :: len(places)]))
        for i, place in enumerate(places)
        if i and todo[i :: len(places)]
    ]
    for process in others:
        process.start()
    try:
        _embed_parts(work, model, store, todo[:: len(places)], show=True)
        for process in others:
            process.join()
    finally:
        for process in others:
            process.terminate()
    if any(process.exitcode for process in others):
        raise RuntimeError(
            "a process on another device failed, see above; what is done stays: run again"
        )
    work.check_drops([drop for part in parts for drop in store.journal.read(part)[1]])
    return store.finish(parts)


def _process(work: _Work, make_model: MakeModel, place: str, parts: list[str]) -> None:
    model = make_model(place)
    _embed_parts(work, model, work.store(model), parts, show=False)


def _embed_parts(
    work: _Work, model: AlphaClip, store: EmbeddingStore, parts: list[str], show: bool
) -> None:
    if alpha_entry(model.visual).is_first_layer:
        fold_alpha(model.visual)  # faster; the store has seen the weights as they are kept
    sizes = work.source.parts()
    dropped: list[tuple[str, str]] = []
    total = sum(sizes[part] for part in parts)
    encode = FOCUS[work.settings["focus"] or "no alpha"].encode
    threads = 1
    if model.logit_scale.device.type != "cpu":
        threads = max(1, min(_THREADS, (os.cpu_count() or 1) // work.processes))
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, desc="embed", unit="picture", disable=not show) as bar,
        warnings.catch_warnings(),  # threads that catch some would lose what was set before
        torch.inference_mode(),
    ):
        for part in parts:
            drops = ListedDrops()
            entries = work.source.entries(part, drops)
            open_ = partial(shown, work.source, model.transform, work.settings["focus"])
            views = ahead(pool, open_, entries, work.batch_size)
            features, rows = encode_views(model, views, encode, work.batch_size, drops, bar.update)
            dropped += drops.list
            work.check_drops(dropped)
            store.write(part, features, rows, drops.list)
