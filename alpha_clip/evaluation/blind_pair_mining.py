"""CLIP-blind pairs, mined from any folder: pictures alike to CLIP that another model tells apart.

How MMVP's pairs were found in ImageNet and LAION-Aesthetics ("Eyes Wide Shut?", arXiv 2401.06209):
features of CLIP with a cosine similarity above 0.95, of DINOv2, which learns from pictures alone,
below 0.6. CLIP's are the image tower's output (https://github.com/tsb0601/MMVP/issues/10); which of
DINOv2's the authors do not say, here those that timm gives: the class token. A human then writes
what is true of one picture alone, and `BlindPairs` asks CLIP.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFont, ImageOps

from alpha_clip.drops import Drops
from alpha_clip.evaluation.annotations import file_stamp, named, open_picture, pictures_in
from alpha_clip.evaluation.base import Benchmark, Scores, Seen
from alpha_clip.evaluation.columns import PICTURE, Columns
from alpha_clip.evaluation.outcomes import Outcome
from alpha_clip.evaluation.pair_search import MinedPairs, disjoint, mine_pairs
from alpha_clip.geometry import SharedGeometry
from alpha_clip.model import AlphaClip
from alpha_clip.regions import SampleError
from alpha_clip.visualize import Tile, contact_sheet

_PART = 256  # pictures in a part
_TILE, _FRAME, _COLUMNS = 200, 6, 6  # of the contact sheet; the former in px
_FRAMES = ("#d3e0f2", "#f6e3cc")  # in turn: what has one colour is a pair


class BlindPairMining(Benchmark):
    """Which pictures of a folder does CLIP take for the same, although another model does not?

    The share of pictures in a pair grows with their number: compare models on one folder.

    Args:
        images: Folder with pictures (jpg, jpeg, png, webp), at any depth; none that is hidden.
        clip_above: Cosine similarity in CLIP that a pair exceeds.
        other_below: Cosine similarity in the other model that a pair stays below.
        other: The other model, one of timm's; it sees pictures the way timm says.
        other_pretrained: File with its weights in timm's layout, or another that timm converts:
            `.safetensors`, or `.pth` with tensors alone. `None` fetches those that timm lists.
        geometry: How pictures become squares for CLIP.
        batch_size: Pictures that go through the models at a time.
        max_images: Most pictures to take, sorted by name; `None` takes all.
        shown: Most pairs in the contact sheet.

    Raises:
        ValueError: If there is no picture, no such model or file, or a number is out of range.
    """

    unscored = frozenset({"clip_above", "other_below", "shown"})

    def __init__(
        self,
        images: str,
        clip_above: float = 0.95,
        other_below: float = 0.6,
        other: str = "vit_large_patch14_dinov2.lvd142m",
        other_pretrained: str | None = None,
        geometry: SharedGeometry = "center_crop",
        batch_size: int = 64,
        max_images: int | None = None,
        shown: int = 24,
    ) -> None:
        if not (-1 <= clip_above <= 1 and -1 <= other_below <= 1):
            raise ValueError(f"similarities lie in -1..1, got {clip_above=} and {other_below=}")
        if batch_size < 1 or shown < 0 or (max_images is not None and max_images < 1):
            got = f"{batch_size=}, {max_images=} and {shown=}"
            raise ValueError(f"expected counts of at least 1 (shown: 0), got {got}")
        if not timm.is_model(other):
            raise ValueError(f"timm has no model {other!r}; timm.list_models() names those it has")
        if other_pretrained and not Path(other_pretrained).is_file():
            raise ValueError(f"there is no file {other_pretrained} (other_pretrained)")
        self._root = Path(images)
        names = pictures_in(self._root)[:max_images]
        weights = file_stamp(Path(other_pretrained)) if other_pretrained else []
        self._parts: dict[str, list[str]] = {}
        for first in range(0, len(names), _PART):
            some = names[first : first + _PART]
            stamps = [[name, *file_stamp(self._root / name)] for name in some]
            self._parts[named(first, [weights, *stamps])] = some
        self._thresholds, self._shown = (clip_above, other_below), shown
        self._other, self._other_pretrained = other, other_pretrained
        self._geometry, self._batch_size = geometry, batch_size
        self._tower: Any = None
        self._device = torch.device("cpu")
        self._found: tuple[Columns, MinedPairs] | None = None

    def parts(self) -> dict[str, int]:
        """Return stretches of the sorted list of pictures."""
        return {part: len(names) for part, names in self._parts.items()}

    def prepare(self, model: AlphaClip) -> None:
        """Build the other model, on the same device; ValueError if its weights are not there."""
        self._device = model.logit_scale.device
        self._tower = _create_other(self._other, self._other_pretrained).to(self._device)

    @torch.inference_mode()
    def score(self, model: AlphaClip, part: str, drops: Drops, seen: Seen) -> Columns:
        """Return file names and the features of both models, of length 1; see `Benchmark`."""
        own = model.transform.replace(geometry=self._geometry)
        theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(self._tower))
        left, names = iter(self._parts[part]), list[str]()
        clip, other = list[torch.Tensor](), list[torch.Tensor]()
        with ThreadPoolExecutor() as pool:
            while batch := list(islice(left, self._batch_size)):
                opened = dict(self._open(batch, drops))
                seen(len(batch))
                if opened:
                    seeing = [pool.map(view, opened.values()) for view in (own, theirs)]
                    rgba, rgb = (torch.stack(list(s)).to(self._device) for s in seeing)
                    # Not fetched yet: while the device computes, the next pictures are opened.
                    clip.append(model.encode_image(rgba))
                    other.append(self._tower(rgb))
                    names += opened
        if not names:
            return {}
        return {
            PICTURE: np.arange(len(names)),
            "file": np.array(names),
            "clip": _of_length_1(clip, model.name),
            "other": _of_length_1(other, self._other),
        }

    def _open(self, names: list[str], drops: Drops) -> Iterator[tuple[str, Image.Image]]:
        for name in names:
            try:
                yield name, open_picture(self._root / name, None)
            except SampleError as error:
                drops.add(error.reason, error.detail)

    def outcomes(self, columns: Columns) -> dict[str, Outcome]:
        """Return the share of pictures that are in a pair.

        Raises:
            ValueError: If fewer than two pictures could be read.
        """
        if (count := len(columns.get(PICTURE, ()))) < 2:
            raise ValueError(f"a pair takes two pictures, {count} of {self._root} could be read")
        paired = self._pairs(columns).paired.astype(float)
        return {"pictures/in a pair": Outcome(paired, columns[PICTURE])}

    def counts(self, columns: Columns) -> Scores:
        """Return the number of pictures and of pairs."""
        found = self._pairs(columns)
        return {"pictures": float(len(found.paired)), "pairs": float(found.number)}

    def write(self, columns: Columns, file: Path) -> None:
        """Write the pairs as `NAME.pairs.csv` and draw some of them as `NAME.pairs.png`.

        The widest gap between the two similarities comes first; of more than a million pairs those
        are listed. A picture is drawn in one pair only. Without a pair there is no sheet.
        """
        rows, names = self._pairs(columns).pairs.tolist(), columns["file"]
        table = file.with_suffix(".pairs.csv")
        # Names as the file system has them, whatever their encoding.
        with table.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            writer = csv.writer(stream)
            writer.writerow(["first", "second", "clip", "other"])
            writer.writerows([names[i], names[j], f"{c:.6f}", f"{o:.6f}"] for i, j, c, o in rows)
        sheet = file.with_suffix(".pairs.png")
        sheet.unlink(missing_ok=True)  # of an earlier run
        tiles: list[Tile] = []
        for i, j, clip, other in disjoint(rows, self._shown):
            opened = list(self._open([names[i], names[j]], Drops()))
            if len(opened) == 2:  # they are still there
                frame = _FRAMES[len(tiles) // 2 % 2]
                told = f"CLIP {clip:.3f}", f"other {other:.3f}"
                tiles += [_tile(*o, t, frame) for o, t in zip(opened, told, strict=True)]
        if tiles:
            contact_sheet(tiles, _COLUMNS, _TILE).save(sheet)

    def _pairs(self, columns: Columns) -> MinedPairs:
        if self._found is None or self._found[0] is not columns:
            self._found = columns, mine_pairs(columns, *self._thresholds, self._device)
        return self._found[1]


def _of_length_1(features: list[torch.Tensor], whose: str) -> NDArray[np.float32]:
    found = torch.nn.functional.normalize(torch.cat(features).float(), dim=-1).cpu()
    if not torch.isfinite(found).all():
        raise ValueError(f"{whose} gives features that are not finite; are its weights sound?")
    return np.asarray(found)


def _tile(name: str, image: Image.Image, similarity: str, frame: str) -> Tile:
    """Frame a picture; its name is one line at most, of which the end tells most."""
    font, side = ImageFont.load_default(13), _TILE - 2 * _FRAME
    text = "_".join(name.encode(errors="replace").decode().split())
    while font.getlength(text) > _TILE:
        text = "…" + text[2:]
    square = ImageOps.pad(image, (side, side), Image.Resampling.LANCZOS, frame)
    return Tile(ImageOps.expand(square, _FRAME, frame), f"{text} {similarity}")


def _create_other(name: str, file: str | None) -> Any:
    """Build a model of timm's that gives features; nothing of a file is unpickled."""
    overlay: dict[str, Any] = {}
    try:
        if file is not None:
            state = timm.models.load_state_dict(file, device="cpu", weights_only=True)
            head = timm.models.get_pretrained_cfg(name).classifier or ()
            heads = (head,) if isinstance(head, str) else head
            state = {k: v for k, v in state.items() if k.rpartition(".")[0] not in heads}
            # Without a classifier timm minds that every key has its place; nor may it download.
            overlay = {"state_dict": state, "classifier": None, "url": "", "hf_hub_id": None}
        model = timm.create_model(name, True, pretrained_cfg_overlay=overlay, num_classes=0)
    except Exception as error:  # whatever readers trip over, and networks
        raise ValueError(
            f"{file or 'the network'} gives no weights of timm's {name} ({str(error)[:300]}); "
            "other_pretrained takes a file of its weights, .safetensors or .pth with tensors alone"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # they are in the model
    return model.eval().requires_grad_(False)
