"""Text features computed once: a folder that readers look phrases up in.

A frozen text tower gives the same features for the same phrase in every epoch. `ids.npy` holds the
phrases' numbers (`phrase_ids`) in order, `features.npy` their features, of length 1, row by row;
both are mapped into memory, so that readers share them. `phrases.json` says by which text tower.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from alpha_clip.batches import phrase_ids
from alpha_clip.drops import Drops
from alpha_clip.model import AlphaClip
from alpha_clip.reader import find_shards, read_samples


class PhraseFeatures:
    """Features by the phrases' numbers.

    Args:
        directory: A folder written by `write_phrase_features`.

    Raises:
        ValueError: If it is none.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        try:
            record = json.loads((Path(directory) / "phrases.json").read_text())
            self._tower = str(record["text_tower"])
            self._ids = np.load(Path(directory) / "ids.npy", mmap_mode="r")
            self._features = np.load(Path(directory) / "features.npy", mmap_mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{directory} holds no text features; make them with `alpha-clip phrases`: {error}"
            ) from error
        if self._ids.ndim != 1 or self._features.ndim != 2:
            raise ValueError(f"{directory} is damaged: ids {self._ids.shape}")
        if len(self._ids) != len(self._features) or not len(self._ids):
            raise ValueError(
                f"{directory} is damaged: {len(self._ids)} ids and {len(self._features)} features"
            )

    def check(self, model: AlphaClip) -> None:
        """Refuse features of another text tower.

        Raises:
            ValueError: If the model's text tower is not the one that made them.
        """
        if self._tower != text_tower(model):
            raise ValueError(
                f"the text features in {self.directory} were made by another text tower than "
                f"{model.name}'s; make them again with `alpha-clip phrases`"
            )

    def __call__(self, ids: Int[Tensor, " phrases"]) -> Float[Tensor, "phrases dim"]:
        """Return features of phrases.

        Raises:
            ValueError: If a phrase is not there.
        """
        wanted = ids.numpy()
        place = np.searchsorted(self._ids, wanted).clip(max=len(self._ids) - 1)
        missing = int((self._ids[place] != wanted).sum())
        if missing:
            raise ValueError(
                f"{missing} of {len(wanted)} phrases of a batch are not in {self.directory}; make "
                "the text features from all data sets of the run"
            )
        return torch.from_numpy(np.asarray(self._features[place], np.float32))


@torch.inference_mode()
def write_phrase_features(
    model: AlphaClip, data: list[str], output: str, batch_size: int = 256
) -> int:
    """Write the features of every phrase and caption of some data sets; the folder appears whole.

    Args:
        model: Whose text tower, on its device.
        data: Folders of finished shards.
        output: Folder to write; it must not be there.
        batch_size: Phrases that go through the tower at a time.

    Returns:
        How many there are.

    Raises:
        ValueError: If `output` is there already, or the data hold no phrase.
    """
    folder = Path(output)
    if folder.exists():
        raise ValueError(f"{folder} is there already; give another output, or delete it")
    texts = list(_texts(data))
    if not texts:
        raise ValueError(f"no phrase in {', '.join(data)}")
    part = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    ids, features = [], []
    for at in tqdm(range(0, len(texts), batch_size), desc="phrases", unit="batch"):
        tokens = model.tokenizer(texts[at : at + batch_size])
        ids.append(phrase_ids(tokens).numpy())
        encoded = model.encode_text(tokens.to(model.logit_scale.device), normalize=True)
        features.append(encoded.half().cpu().numpy())
    unique, first = np.unique(np.concatenate(ids), return_index=True)
    np.save(part / "ids.npy", unique)
    np.save(part / "features.npy", np.concatenate(features)[first])
    record = {"text_tower": text_tower(model), "model": model.name, "phrases": len(unique)}
    (part / "phrases.json").write_text(json.dumps(record, indent=1) + "\n")
    part.rename(folder)
    return len(unique)


def text_tower(model: AlphaClip) -> str:
    """Return a digest of all weights outside the image tower, the temperature apart."""
    digest = blake2b(digest_size=16)
    state: dict[str, Any] = model.clip.state_dict()
    for name in sorted(state):
        if not name.startswith(("visual.", "logit_")):
            digest.update(name.encode())
            digest.update(state[name].detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def _texts(data: list[str]) -> Iterator[str]:
    """Yield each different text of some data sets once."""
    drops, seen = Drops(), set()
    shards = tqdm(find_shards(data), desc="read", unit="shard")
    for sample in (s for shard in shards for s in read_samples(shard, drops)):
        texts = [region.text for region in sample.regions]
        for text in [*texts, sample.caption] if sample.caption else texts:
            if text not in seen:
                seen.add(text)
                yield text
