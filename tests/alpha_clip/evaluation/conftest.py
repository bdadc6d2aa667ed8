"""The photographs as benchmarks read them: a folder of files, COCO's JSON, ReCLIP's lines."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Photographs:
    """Photographs with people's annotations.

    Attributes:
        folder: The pictures.
        instances: COCO's JSON.
        expressions: The phrases of objects, as ReCLIP's lines of JSON.
        imagenet: The same in ImageNet's layout, with `class_names.json`.
    """

    folder: Path
    instances: Path
    expressions: Path
    imagenet: Path


@pytest.fixture(scope="session")
def photographs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    root = tmp_path_factory.mktemp("photographs")
    folder = root / "images"
    folder.mkdir()
    instances = root / "instances.json"
    shutil.copyfile(photos / "instances.json", instances)
    annotations = json.loads(instances.read_text())["annotations"]
    by_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in annotations:
        about = {"id": annotation["id"], "bbox": annotation["bbox"]}
        by_image.setdefault(annotation["image_id"], []).append(about)
    meant = json.loads((photos / "phrase_annotation_ids.json").read_text())
    lines = []
    for tar in sorted((photos / "grit").glob("*.tar")):
        with tarfile.open(tar) as stream:
            members = {m.name: stream.extractfile(m).read() for m in stream}  # type: ignore[union-attr]
        for name, data in members.items():
            key, _, kind = name.partition(".")
            if kind == "jpg":
                (folder / f"{int(key):012d}.jpg").write_bytes(data)
            if kind == "json":
                record = json.loads(data)
                for (start, end, *_), annotation in zip(
                    record["ref_exps"], meant[key], strict=True
                ):
                    text = record["caption"][int(start) : int(end)]
                    lines.append(
                        {
                            "image_id": int(key),
                            "file_name": f"{int(key):012d}.jpg",
                            "ann_id": annotation,
                            "anns": by_image[int(key)],
                            "sentences": [{"raw": text}],
                        }
                    )
    expressions = root / "photographs_val.jsonl"
    expressions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Photographs(folder, instances, expressions, photos / "imagenet")
