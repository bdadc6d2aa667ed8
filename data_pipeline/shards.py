"""Writing shards so that a shard is either whole or not there.

Write to `.tmp/` -> close and fsync -> read back strictly -> rename to `NNNNN-<8 hex>.tar` -> write
`NNNNN.rejects.jsonl` -> link `NNNNN.done.json`, last. Readers believe the `done.json`s alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alpha_clip.regions import RegionSample, SampleError, pack_sample, parse_sample
from data_pipeline.sources.base import Reject


@dataclass(frozen=True)
class ShardManifest:
    """What `NNNNN.done.json` says.

    Attributes:
        tar: Name of the shard, beside the manifest.
        samples: Samples in it.
        regions: Regions in it.
        bytes: Its size.
        sha256: Its digest.
        rejects: Reason -> how often, samples and regions together.
        rejected_samples: Samples that were lost.
        rejected_regions: Regions that were lost, alone or with their sample.
        config_hash: Digest of the settings it was made with.
        input: `path`, `samples` and `regions` of the input shard.
    """

    tar: str
    samples: int
    regions: int
    bytes: int
    sha256: str
    rejects: dict[str, int]
    rejected_samples: int
    rejected_regions: int
    config_hash: str
    input: dict[str, Any]


class ShardWriter:
    """Collects the samples and rejects of one shard, then commits them all or none.

    Args:
        directory: The data set's folder.
        index: The shard's number.
    """

    def __init__(self, directory: Path, index: int) -> None:
        self.directory = directory
        self.stem = f"{index:05d}"
        temporary = directory / ".tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        self.path = temporary / f"{self.stem}-{uuid.uuid4().hex}.tar"
        self.samples = 0
        self.regions = 0
        self.rejects: list[Reject] = []
        self._tar = tarfile.open(self.path, "w", format=tarfile.USTAR_FORMAT)

    def write(self, sample: RegionSample) -> None:
        """Add a sample.

        Raises:
            SampleError: If it is not sound; the shard stays as it was.
        """
        jpeg, text = pack_sample(sample)
        for suffix, data in (("jpg", jpeg), ("json", text)):
            member = tarfile.TarInfo(f"{sample.key}.{suffix}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self.samples += 1
        self.regions += len(sample.regions)

    def reject(self, reject: Reject) -> None:
        """Note something that was lost."""
        self.rejects.append(reject)

    def commit(self, config_hash: str, source: str) -> ShardManifest:
        """Make the shard visible.

        Raises:
            OSError: If what was written does not read back; nothing is visible then.
        """
        self._tar.close()
        _fsync(self.path)
        read = [len(s.regions) for s in read_shard(self.path)]
        if (len(read), sum(read)) != (self.samples, self.regions):
            raise OSError(f"{self.path} does not read back as it was written; is the disk sound?")
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        tar = f"{self.stem}-{digest[:8]}.tar"
        lost = [r for r in self.rejects if r.rid is None]
        lost_regions = sum(r.regions for r in lost) + len(self.rejects) - len(lost)
        manifest = ShardManifest(
            tar=tar,
            samples=self.samples,
            regions=self.regions,
            bytes=self.path.stat().st_size,
            sha256=digest,
            rejects=dict(sorted(Counter(r.reason for r in self.rejects).items())),
            rejected_samples=len(lost),
            rejected_regions=lost_regions,
            config_hash=config_hash,
            input={
                "path": source,
                "samples": self.samples + len(lost),
                "regions": self.regions + lost_regions,
            },
        )
        os.replace(self.path, self.directory / tar)
        lines = "".join(json.dumps(asdict(r), sort_keys=True) + "\n" for r in self.rejects)
        self._publish(f"{self.stem}.rejects.jsonl", lines, replace=True)
        text = json.dumps(asdict(manifest), sort_keys=True, indent=1) + "\n"
        self._publish(f"{self.stem}.done.json", text, replace=False)
        return manifest

    def abandon(self) -> None:
        """Drop what was written; for when something systemic goes wrong."""
        self._tar.close()
        self.path.unlink(missing_ok=True)

    def _publish(self, name: str, text: str, replace: bool) -> None:
        temporary = self.path.with_suffix(f".{name}")
        temporary.write_text(text)
        _fsync(temporary)
        if replace:
            os.replace(temporary, self.directory / name)
            return
        try:
            os.link(temporary, self.directory / name)
        except FileExistsError:  # another worker was first, with the same bytes
            pass
        finally:
            temporary.unlink()


def read_shard(path: Path) -> Iterator[RegionSample]:
    """Yield the samples of a shard, refusing whatever is not exactly as it should be.

    Raises:
        OSError: If a member is damaged, missing or out of place.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = iter(tar)
            for jpg in members:
                text = next(members, None)
                key = jpg.name.removesuffix(".jpg")
                if text is None or (jpg.name, text.name) != (f"{key}.jpg", f"{key}.json"):
                    raise OSError(f"{path}: expected KEY.jpg and KEY.json in turn, got {jpg.name}")
                image, record = tar.extractfile(jpg), tar.extractfile(text)
                if image is None or record is None:
                    raise OSError(f"{path}: {key} is not a plain file")
                yield parse_sample(key, image.read(), record.read())
    except (tarfile.TarError, SampleError) as error:
        raise OSError(f"{path} is damaged: {error}") from error


def read_manifests(directory: Path) -> dict[str, ShardManifest]:
    """Return the manifests of a data set's folder, by shard number.

    Raises:
        ValueError: If one of them is damaged.
    """
    manifests = {}
    for file in sorted(directory.glob("*.done.json")):
        try:
            manifests[file.name.split(".")[0]] = ShardManifest(**json.loads(file.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{file} is damaged ({error}); delete it to make the shard again"
            ) from error
    return manifests


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
