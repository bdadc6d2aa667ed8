"""`alpha-clip-data`: makes region–text shards; commands take `--config FILE`, `--key value`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from tqdm import tqdm

from data_pipeline.engines.local import run_local
from data_pipeline.inspection import inspect_shards
from data_pipeline.runner import PipelineConfig, RunSummary, plan
from data_pipeline.segmenters.base import Segmenter
from data_pipeline.segmenters.grabcut import GrabCutSegmenter
from data_pipeline.shards import read_manifests
from data_pipeline.sources.base import Source
from data_pipeline.sources.grit import GritSource
from data_pipeline.sources.scene_drawing import SceneConfig
from data_pipeline.sources.scenes import write_scenes
from data_pipeline.verification import verify_shards


@dataclass
class ScenesJob:
    """Draw scenes: embedded data in GRIT's layout.

    Attributes:
        output: Folder for the tars, their true masks and names.json.
        scenes: What to draw.
        workers: Processes.
    """

    output: str
    scenes: SceneConfig = field(default_factory=SceneConfig)
    workers: int = 2

    def run(self) -> int:
        """Draw what is missing; returns the exit code."""
        write_scenes(self.output, self.scenes, self.workers)
        print(f"{self.scenes.samples} pictures in {self.output}")  # noqa: T201
        return 0


@dataclass
class GritJob:
    """Make region–text shards of GRIT tars.

    Attributes:
        input: Pattern of the input tars, such as '/data/grit/*.tar'; quote it.
        output: Folder for the shards; what is there already is kept, and not made again.
        segmenter: Makes a mask for each box.
        source: Reads the input.
        workers: Processes.
    """

    input: str
    output: str
    segmenter: Segmenter = field(default_factory=GrabCutSegmenter)
    source: Source = field(default_factory=GritSource)
    workers: int = 2

    def run(self) -> int:
        """Make the missing shards and tell what was skipped; returns the exit code."""
        summary = self.make_shards()
        print(summary)  # noqa: T201
        return 0 if summary.shards else 1

    def make_shards(self) -> RunSummary:
        """Make the missing shards.

        Raises:
            ValueError: If the pattern matches nothing, weights are missing, or the output folder
                holds shards of something else.
        """
        inputs = [Path(p) for p in sorted(glob(self.input, recursive=True))]
        if not inputs:
            raise ValueError(
                f"no file matches {self.input!r}; give a pattern of tars such as "
                "'/data/grit/*.tar', in quotes"
            )
        output = Path(self.output)
        config = PipelineConfig(self.source, self.segmenter)
        tasks = plan(inputs, output, config)
        summary = RunSummary()
        done = len(inputs) - len(tasks)
        with tqdm(total=len(inputs), initial=done, desc="shards", unit="shard") as progress:
            for task, outcome in run_local(tasks, output, config, self.workers):
                if isinstance(outcome, str):
                    summary.bad_shards[str(task.path)] = outcome
                progress.update()
        for manifest in read_manifests(output).values():
            summary.add(manifest)
        return summary


@dataclass
class InspectJob:
    """Look at finished shards: numbers, a contact sheet, and IoU with true masks.

    Attributes:
        input: Folder of finished shards.
        output: Folder for inspection.json and contact_sheet.png.
        masks: Pattern of COCO instances JSON or of scenes' '*.masks.jsonl', to compare with.
        tiles: Regions on the contact sheet.
    """

    input: str
    output: str
    masks: str | None = None
    tiles: int = 48

    def run(self) -> int:
        """Write the two files and print the numbers; returns the exit code."""
        found = inspect_shards(Path(self.input), Path(self.output), self.masks, self.tiles)
        for name, value in asdict(found).items():
            print(f"{name:<16}{value}")  # noqa: T201
        return 0


@dataclass
class VerifyJob:
    """Read finished shards again: digests, every sample and mask, and counts in = out + rejected.

    Attributes:
        input: Folder of finished shards.
        workers: Processes.
    """

    input: str
    workers: int = 2

    def run(self) -> int:
        """Print the numbers and what is wrong; returns 1 if anything is."""
        found = verify_shards(Path(self.input), self.workers)
        for name, value in asdict(found).items():
            if not isinstance(value, list):
                print(f"{name:<16} {value}")  # noqa: T201
        for name in found.unfinished:
            print(f"unfinished       {name}")  # noqa: T201
        for problem in found.problems:
            sys.stderr.write(f"alpha-clip-data verify: {problem}\n")
        print("sound" if not found.problems else f"{len(found.problems)} problems")  # noqa: T201
        return 1 if found.problems else 0


JOBS: dict[str, type[ScenesJob] | type[GritJob] | type[InspectJob] | type[VerifyJob]] = {
    "scenes": ScenesJob,
    "grit": GritJob,
    "inspect": InspectJob,
    "verify": VerifyJob,
}


def build_parser() -> ArgumentParser:
    """Return the parser of all commands."""
    parser = ArgumentParser(prog="alpha-clip-data", description=__doc__, allow_abbrev=False)
    commands = parser.add_subcommands(dest="command")
    for name, job in JOBS.items():
        summary = str(job.__doc__).splitlines()[0]
        command = ArgumentParser(description=summary, allow_abbrev=False)
        command.add_argument("--config", action="config", help="YAML file with these keys")
        command.add_class_arguments(job, sub_configs=True)
        commands.add_subcommand(name, command, help=summary)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    try:
        values: Any = parser.instantiate(parsed)[parsed.command]
        values.pop("config", None)
        job: Callable[..., Any] = JOBS[parsed.command]
        return int(job(**values.as_dict()).run())
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"alpha-clip-data: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
