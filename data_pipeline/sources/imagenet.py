"""ImageNet as it comes: a folder, or a tar, of pictures for each class."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from alpha_clip.regions import IMAGE_EXTENSIONS
from data_pipeline.caption_text import readable_class_name
from data_pipeline.sources.base import BadShardError, Reject
from data_pipeline.sources.storage import MAX_FILE_BYTES, find_inputs
from data_pipeline.sources.tars import read_groups

_WNID = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"(n\d{8})_(\d{1,9})")
_TAR = re.compile(r"\.tar(\.\w+)?$")
_LINE = re.compile(r"(n\d{8})[\s,]+(.+)")


@dataclass(frozen=True)
class ClassPicture:
    """A picture that is known to show a class.

    Attributes:
        key: Digits, unique in the data set: those of the class, then the picture's.
        id: The picture's name in ImageNet, such as `n01440764_10026`.
        image: Where it lies in its shard: the name of a file or of a tar's member.
        wnid: The class.
        name: The class in words.
        data: The picture's bytes as they came.
    """

    key: str
    id: str
    image: str
    wnid: str
    name: str
    data: bytes


@dataclass(frozen=True)
class ImageNetSource:
    """Reads ImageNet-1k or -21k: folders of classes, or tars of one class or of several.

    A class is the folder's or the tar's name, `n01440764`; in a tar of several classes the member's
    name begins with it, `n01440764_10026.JPEG`. Each folder and each tar makes one shard.

    Attributes:
        class_names: A file that gives each class a name: JSON, `{"n01440764": "tench"}`, or lines
            of `n01440764 tench, Tinca tinca`, as WordNet's words.txt and Kaggle's
            LOC_synset_mapping.txt have them. By default timm's table of all of ImageNet-21k; of
            several lemmas the first is taken.
        max_image_px: Larger pictures are rejected by their header, before memory is spent.
    """

    class_names: str | None = None
    max_image_px: int = 50_000_000

    name = "imagenet"

    def shards(self, inputs: str | list[str]) -> list[str]:
        """Return the folders of classes and the tars that inputs hold, in order.

        Args:
            inputs: Folders whose subfolders are classes, folders of one class, and patterns of
                tars.

        Raises:
            ValueError: If one of them holds none.
        """
        found: list[str] = []
        for given in [inputs] if isinstance(inputs, str) else inputs:
            folder = Path(given).expanduser()
            if not folder.is_dir():
                found += find_inputs(given)
                continue
            below = sorted(str(p) for p in folder.iterdir() if p.is_dir() or _TAR.search(p.name))
            if not below and not any(_is_picture(p) for p in folder.iterdir()):
                raise ValueError(
                    f"{folder} holds neither folders of classes, nor tars, nor pictures; expected "
                    "ImageNet's train folder, with n01440764 and others in it"
                )
            found += below or [str(folder)]
        return list(dict.fromkeys(found))

    def settings(self) -> dict[str, Any]:
        """Return what decides the samples: every field, and the digest of the class names."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "class_names"}
        names = json.dumps(self._names, sort_keys=True) if self.class_names else "timm"
        return {**shown, "class_names": hashlib.sha256(names.encode()).hexdigest()[:16]}

    def read(
        self, shard: str, only: Collection[str] | None = None
    ) -> Iterator[ClassPicture | Reject]:
        """Yield every picture of a folder or tar, or why it can't be used.

        Args:
            shard: A name that `shards` gave.
            only: Names of the pictures to read, as `ClassPicture.image` has them; by default all.

        Raises:
            BadShardError: If it is no class, has no name, or can't be read at all.
            StorageError: If the storage fails.
        """
        own = _TAR.sub("", shard.rstrip("/").rsplit("/", 1)[-1])
        if Path(shard).is_dir():
            if not _WNID.fullmatch(own):
                raise BadShardError(
                    f"{shard} is no synset; expected a folder with a name such as n01440764"
                )
            self.class_name(own)
            pictures = _files(Path(shard), only)
        else:
            pictures = _members(shard)
        seen: set[str] = set()
        for item in pictures:
            if isinstance(item, Reject):
                yield item
            elif only is None or item[0] in only:
                yield self._picture(*item, own, seen)

    def _picture(self, image: str, data: bytes, own: str, seen: set[str]) -> ClassPicture | Reject:
        stem = image.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        match = _NUMBERED.fullmatch(stem)
        wnid = own if _WNID.fullmatch(own) else match[1] if match else ""
        key = picture_key(wnid, stem)
        try:
            name = self.class_name(wnid)
        except BadShardError as error:
            return Reject(key, None, "no_class_name", str(error))
        if key in seen:
            return Reject(key, None, "duplicate_key", f"{image} has the number of another picture")
        seen.add(key)
        return ClassPicture(key, stem, image, wnid, name, data)

    def class_name(self, wnid: str) -> str:
        """Return a class's name in words.

        Raises:
            BadShardError: If it has none.
            ValueError: If the file of class names can't be read.
        """
        names = self._names
        try:
            return readable_class_name(names[wnid])
        except (KeyError, ValueError) as error:
            where = self.class_names or "timm's table"
            raise BadShardError(f"{where} has no name for the class {wnid!r}") from error

    @cached_property
    def _names(self) -> Any:
        if self.class_names is None:
            return _TimmNames()
        return read_class_names(self.class_names)


class _TimmNames:
    """The lemmas of all synsets of ImageNet-21k, as timm ships them."""

    def __init__(self) -> None:
        from timm.data import ImageNetInfo

        self._info = ImageNetInfo("imagenet22k")

    def __getitem__(self, wnid: str) -> str:
        return str(self._info.label_name_to_description(wnid))


def picture_key(wnid: str, stem: str) -> str:
    """Return a picture's key: the digits of its class, then the picture's own.

    Args:
        wnid: The class, such as `n01440764`; may be empty.
        stem: The picture's name without its extension, such as `n01440764_10026`.
    """
    match = _NUMBERED.fullmatch(stem)
    # Names of another kind get a number of their own: the same on every machine.
    number = int(match[2]) if match else int(hashlib.sha256(stem.encode()).hexdigest()[:9], 16)
    return f"{wnid[1:]}{number:0{9 if match else 11}d}"


def read_class_names(file: str | Path) -> dict[str, str]:
    """Read a file of class names; see `ImageNetSource.class_names`.

    Raises:
        ValueError: If it can't be read, or names no class.
    """
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            record = json.loads(text)
            firsts = {k: v[0] if isinstance(v, list) and v else v for k, v in record.items()}
            names = {k: v for k, v in firsts.items() if isinstance(v, str)}
        else:
            found = (_LINE.fullmatch(line.strip()) for line in text.splitlines())
            names = {match[1]: match[2] for match in found if match}
    except (OSError, ValueError) as error:
        raise ValueError(f"the class names in {file} can't be read: {error}") from error
    if not any(map(_WNID.fullmatch, names)):
        raise ValueError(
            f'{file} names no class; expected JSON, {{"n01440764": "tench"}}, or lines of '
            "'n01440764 tench, Tinca tinca'"
        )
    return names


def _is_picture(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file()


def _files(folder: Path, only: Collection[str] | None) -> Iterator[tuple[str, bytes] | Reject]:
    for path in sorted(folder.iterdir()):
        if only is not None and path.name not in only:
            continue
        if not _is_picture(path):
            yield Reject("", None, "no_picture", f"{path.name} is no picture")
            continue
        try:
            with path.open("rb") as file:
                yield path.name, file.read(MAX_FILE_BYTES)
        except OSError as error:
            yield Reject("", None, "unreadable_file", f"{path.name}: {error}")


def _members(shard: str) -> Iterator[tuple[str, bytes] | Reject]:
    for group in read_groups(shard):
        if group.fault:
            yield Reject("", None, group.fault, f"a picture is lost: {shard}")
        extension = next((e for e in IMAGE_EXTENSIONS if e in group.members), None)
        if extension is not None:
            yield f"{group.key}.{extension}", group.members[extension]
        elif group.members:
            yield Reject("", None, "no_picture", f"{group.key} has only {sorted(group.members)}")
