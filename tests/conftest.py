"""What all tests share: generated pictures and GRIT tars of them, and the photographs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
Members = list[tuple[str, bytes]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each worker its share of the long tests to begin with.

    Workers get equal stretches of the list and steal from one another's ends: long tests that come
    last, or all in one stretch, keep one core busy while the others are idle.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    files = list(dict.fromkeys(item.path for item in slow))  # they share what they set up
    stretch = -(-len(fast) // workers)
    items[:] = [
        item
        for w in range(workers)
        for item in [
            *(item for item in slow if files.index(item.path) % workers == w),
            *fast[w * stretch : (w + 1) * stretch],
        ]
    ]


class Grit:
    """Makes pictures and samples as GRIT has them."""

    caption = "a red box on a blue thing"
    ref_exps = ([0, 9, 0.1, 0.2, 0.5, 0.8, 0.9], [13, 25, 0.55, 0.1, 0.95, 0.9, 0.7])
    noun_chunks = ([2, 9, 0.1, 0.2, 0.5, 0.8, 0.9],)

    @staticmethod
    def image(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
        """A smooth picture that looks different after every flip and turn."""
        y, x = np.mgrid[0:height, 0:width].astype(float)
        shade = np.random.default_rng(seed).uniform(40, 200)
        pixels = np.stack([255 * x / width, 255 * y / height, np.full_like(x, shade)], -1)
        pixels[: height // 4, : width // 4] = 230
        return Image.fromarray(pixels.astype(np.uint8))

    @staticmethod
    def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    def record(self, **changes: Any) -> dict[str, Any]:
        record = {
            "caption": self.caption,
            "ref_exps": [list(r) for r in self.ref_exps],
            "noun_chunks": [list(c) for c in self.noun_chunks],
        }
        return {**record, **changes}

    def sample(
        self, key: str, image: bytes | None = None, extension: str = "jpg", **changes: Any
    ) -> Members:
        """The three members of a sample with two ref_exps and one noun chunk."""
        record = self.record(**changes)
        seed = int(key) if key.isascii() and key.isdigit() else 0
        return [
            (f"{key}.{extension}", image or self.encode(self.image(seed=seed))),
            (f"{key}.txt", str(record.get("caption")).encode("utf-8", "replace")),
            (f"{key}.json", json.dumps(record).encode()),
        ]

    @staticmethod
    def tar(path: Path, *samples: Members) -> Path:
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for name, data in (member for sample in samples for member in sample):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    @staticmethod
    def offsets(path: Path) -> dict[str, tuple[int, int]]:
        """Member -> where its header and where its data begin."""
        with tarfile.open(path) as tar:
            return {m.name: (m.offset, m.offset_data) for m in tar}


@pytest.fixture(scope="session")
def grit() -> Grit:
    return Grit()


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def photos() -> Path:
    folder = REPO.parent / "shared" / "photos"
    if not folder.exists():
        pytest.skip("needs the photographs in ../shared/photos, which are not part of the product")
    return folder
