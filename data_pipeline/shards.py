"""Writing shards so that a shard is either whole or not there.

Write to `.tmp/` -> close and fsync -> read back strictly -> rename to `NNNNN-<8 hex>.tar` -> write
`NNNNN.rejects.jsonl` -> link `NNNNN.done.json`, last. Readers believe the `done.json`s alone.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic

from alpha_clip.regions import RegionSample
from data_pipeline.locks import exclusive
from data_pipeline.shard_files import (
    SampleT,
    ShardFile,
    TarShardFile,
    file_sha256,
    read_shard,
    read_sidecar_with_pictures,
)
from data_pipeline.sources.base import Reject


@dataclass(frozen=True)
class ShardManifest:
    """What `NNNNN.done.json` says.

    Attributes:
        tar: Where the pictures are: the shard beside the manifest, or, of a sidecar, the input.
        samples: Samples in it.
        regions: Regions in it.
        bytes: Size of the shard or the sidecar.
        sha256: Its digest.
        rejects: Reason -> how often, samples and regions together.
        rejected_samples: Samples that were lost.
        rejected_regions: Regions that were lost, alone or with their sample.
        config_hash: Digest of the settings it was made with.
        input: `path`, `samples` and `regions` of the input shard.
        sidecar: Name of the sidecar beside the manifest, or `None`.
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
    sidecar: str | None = None

    def file(self, directory: Path) -> Path:
        """Return the file that the shard is, in its data set's folder."""
        return directory / (self.sidecar or self.tar)

    def read(self, directory: Path) -> Iterator[RegionSample]:
        """Yield the samples with their pictures, refusing whatever is not as it should be.

        Raises:
            OSError: If anything is damaged, missing or out of place.
        """
        if self.sidecar:
            return read_sidecar_with_pictures(directory / self.sidecar, self.tar)
        return read_shard(directory / self.tar)


class ShardWriter(Generic[SampleT]):
    """Collects the samples and rejects of one shard, then commits them all or none.

    Args:
        directory: The data set's folder.
        index: The shard's number.
        kind: What holds the samples: a tar with their pictures, or a file beside those.
    """

    def __init__(
        self,
        directory: Path,
        index: int,
        kind: type[ShardFile[SampleT]] = TarShardFile,  # type: ignore[assignment]  # mypy #3737
    ) -> None:
        self.directory = directory
        self.stem = f"{index:05d}"
        temporary = directory / ".tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        self.path = temporary / f"{self.stem}-{uuid.uuid4().hex}{kind.suffix}"
        self.samples = 0
        self.regions = 0
        self.rejects: list[Reject] = []
        self._file = kind(self.path)

    @property
    def lost_samples(self) -> int:
        """Samples that were rejected as a whole."""
        return sum(r.rid is None for r in self.rejects)

    def write(self, sample: SampleT, picture: bytes = b"") -> None:
        """Add a sample.

        Args:
            sample: The sample.
            picture: Its picture's bytes as they lie in the input, if those are not what it stores.

        Raises:
            SampleError: If it is not sound; the shard stays as it was.
        """
        self._file.write(sample, picture)
        self.samples += 1
        self.regions += len(sample.regions)

    def reject(self, reject: Reject) -> None:
        """Note something that was lost."""
        self.rejects.append(reject)

    def commit(self, config_hash: str, source: str) -> ShardManifest:
        """Make the shard visible.

        Args:
            config_hash: Digest of the settings it was made with.
            source: Path or URL of its input.

        Returns:
            The manifest; if another worker was first, its manifest, and nothing changes.

        Raises:
            OSError: If what was written does not read back; nothing is visible then.
        """
        self._file.close()
        _fsync(self.path)
        if self._file.read_back(self.path) != (self.samples, self.regions):
            raise OSError(f"{self.path} does not read back as it was written; is the disk sound?")
        manifest = self._manifest(config_hash, source)
        # Masks made on a GPU may differ in a pixel from worker to worker: one worker's files or
        # the other's, never a mixture.
        with exclusive(self.path.parent / "lock"):
            done = self.directory / f"{self.stem}.done.json"
            if done.exists():
                self.path.unlink()
                return _read_manifest(done)
            os.replace(self.path, manifest.file(self.directory))
            lines = "".join(json.dumps(asdict(r), sort_keys=True) + "\n" for r in self.rejects)
            self._publish(f"{self.stem}.rejects.jsonl", lines, os.replace)
            _fsync(self.directory)  # the names before the manifest that vouches for them
            text = json.dumps(asdict(manifest), sort_keys=True, indent=1) + "\n"
            self._publish(done.name, text, os.link)
        return manifest

    def abandon(self) -> None:
        """Drop what was written; for when something systemic goes wrong."""
        try:
            self._file.close()
        except OSError:  # a full disk fails here again
            pass
        finally:
            self.path.unlink(missing_ok=True)

    def _manifest(self, config_hash: str, source: str) -> ShardManifest:
        digest = file_sha256(self.path)
        lost_regions = sum(r.regions if r.rid is None else 1 for r in self.rejects)
        sidecar = None if self._file.pictures else self.stem + self._file.suffix
        origin = source if "://" in source else str(Path(source).absolute())
        return ShardManifest(
            tar=origin if sidecar else f"{self.stem}-{digest[:8]}.tar",
            samples=self.samples,
            regions=self.regions,
            bytes=self.path.stat().st_size,
            sha256=digest,
            rejects=dict(sorted(Counter(r.reason for r in self.rejects).items())),
            rejected_samples=self.lost_samples,
            rejected_regions=lost_regions,
            config_hash=config_hash,
            input={
                "path": source,
                "samples": self.samples + self.lost_samples,
                "regions": self.regions + lost_regions,
            },
            sidecar=sidecar,
        )

    def _publish(self, name: str, text: str, place: Callable[[Path, Path], None]) -> None:
        temporary = self.path.with_suffix(f".{name}")
        try:
            temporary.write_text(text)
            _fsync(temporary)
            place(temporary, self.directory / name)
        except FileExistsError:  # another worker was first, without a lock that we could see
            pass
        finally:
            temporary.unlink(missing_ok=True)


def read_manifests(directory: Path) -> dict[str, ShardManifest]:
    """Return the manifests of a data set's folder, by shard number.

    Raises:
        ValueError: If one of them is damaged.
    """
    manifests = {}
    for file in sorted(directory.glob("*.done.json"), key=lambda file: file.name):
        manifests[file.name.split(".")[0]] = _read_manifest(file)
    return manifests


def _read_manifest(file: Path) -> ShardManifest:
    try:
        return ShardManifest(**json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({error}); delete it to make the shard again"
        ) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
