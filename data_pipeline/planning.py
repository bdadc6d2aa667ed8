"""What is to be done, and what was: the two ends of a run."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_pipeline.shard_maker import ShardMaker, ShardTask
from data_pipeline.shards import ShardManifest, read_manifests


@dataclass
class RunSummary:
    """What a run did, added up over shards.

    Attributes:
        shards: Shards that are committed, those of earlier runs included.
        samples: Samples in them.
        regions: Regions in them.
        rejects: Reason -> how often.
        bad_shards: Input shard -> why it could not be read; nothing of it was committed.
        failures: Input shard -> why its worker did not finish; nothing of it was committed.
        seconds: Stage -> time that this run's workers spent in it.
    """

    shards: int = 0
    samples: int = 0
    regions: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    bad_shards: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: Counter[str] = field(default_factory=Counter)

    def add(self, manifest: ShardManifest) -> None:
        """Count a committed shard."""
        self.shards += 1
        self.samples += manifest.samples
        self.regions += manifest.regions
        self.rejects.update(manifest.rejects)

    def __str__(self) -> str:
        lines = [f"{self.shards} shards: {self.samples} samples, {self.regions} regions"]
        for reason, count in sorted(self.rejects.items()):
            lines.append(f"  skipped {count:>8} {reason}")
        if total := sum(self.seconds.values()):
            shares = (f"{name} {s / total:.0%}" for name, s in self.seconds.most_common())
            lines.append(f"  time: {', '.join(shares)}")
        for path, reason in sorted(self.bad_shards.items()):
            lines.append(f"  skipped the whole of {path}: {reason}")
        for path, reason in sorted(self.failures.items()):
            lines.append(f"  not finished: {path}: {reason}; run the same command again")
        return "\n".join(lines)


class Progress:
    """A bar of shards that also tells how fast pictures go by: a shard may take an hour.

    Args:
        done: Shards that were there before.
        total: Shards that there will be.
    """

    def __init__(self, done: int, total: int) -> None:
        self._bar = tqdm(initial=done, total=total, desc="shards", unit="shard")
        self._samples = 0
        self._start = self._told = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def tick(self, samples: int) -> None:
        """Count pictures."""
        self._samples += samples
        now = time.monotonic()
        if self._samples and now - self._told > 1:
            self._told = now
            speed = self._samples / (now - self._start)
            self._bar.set_postfix_str(f"{self._samples} pictures, {speed:.1f}/s")

    def shard(self) -> None:
        """Count a shard."""
        self._bar.update()


def plan(inputs: list[str], output: Path, maker: ShardMaker) -> list[ShardTask]:
    """Return the shards that are still to be made.

    Args:
        inputs: Input shards; their order numbers the output.
        output: The data set's folder.
        maker: How shards are made.

    Raises:
        ValueError: If the folder holds shards of other settings or of other inputs, or the layout
            does not go with the source.
    """
    maker.check()
    done = read_manifests(output) if output.exists() else {}
    if surplus := [stem for stem in done if int(stem) >= len(inputs)]:
        raise ValueError(
            f"{output} holds shard {surplus[0]}, but {len(inputs)} inputs were given; keep the "
            "list of inputs as it was, or write to another folder"
        )
    tasks = []
    for index, path in enumerate(inputs):
        manifest = done.get(f"{index:05d}")
        if manifest is None:
            tasks.append(ShardTask(path, index))
        elif manifest.config_hash != maker.hash:
            raise ValueError(
                f"{output} holds shards made with other settings (config {manifest.config_hash}, "
                f"now {maker.hash}); write to another folder, or delete this one"
            )
        elif manifest.input["path"] != path:
            raise ValueError(
                f"{output} made shard {index:05d} of {manifest.input['path']}, now it would be "
                f"{path}; keep the list of inputs as it was, or write to another folder"
            )
    return tasks
