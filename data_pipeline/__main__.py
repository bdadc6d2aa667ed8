"""`alpha-clip-data`: makes region–text shards; commands take `--config FILE`, `--key value`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from data_pipeline.engines.base import Engine
from data_pipeline.engines.local import LocalEngine
from data_pipeline.filters import Filters
from data_pipeline.imagenet_job import ImageNetJob
from data_pipeline.inspection import inspect_shards
from data_pipeline.planning import RunSummary
from data_pipeline.run import make_shards
from data_pipeline.runner import PipelineConfig
from data_pipeline.segmenters.base import Segmenter
from data_pipeline.segmenters.grabcut import GrabCutSegmenter
from data_pipeline.shard_files import Layout
from data_pipeline.sources.base import Source
from data_pipeline.sources.grit import GritSource
from data_pipeline.sources.scene_drawing import SceneConfig
from data_pipeline.sources.scenes import write_scenes
from data_pipeline.sources.storage import find_inputs
from data_pipeline.stage_benchmark import StageReport, benchmark_stages
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
    """Make region–text shards of GRIT: tars, or parquet files with a folder of pictures.

    Attributes:
        input: Patterns of the inputs, such as '/data/grit/*.tar' or 's3://bucket/{000..099}.tar';
            quote them. Without it, a benchmark draws its pictures.
        output: Folder for the shards; what is there already is kept, and not made again.
        segmenter: Makes a mask for each box.
        source: Reads the input.
        filters: What is left out.
        layout: `tar` stores each picture with its masks; `sidecar` writes NNNNN.regions.jsonl and
            leaves the pictures in the input's tars.
        engine: Where the work is done: this machine, a SLURM array, Ray.
        workers: Processes, each making one shard at a time.
        max_reject_rate: Above this share of lost samples a shard is not committed.
        benchmark: Make no data set: time each stage on some pictures, and project.
        benchmark_images: Pictures to time.
        project_images: Pictures to project hours and disk for.
    """

    input: str | list[str] | None = None
    output: str | None = None
    segmenter: Segmenter = field(default_factory=GrabCutSegmenter)
    source: Source = field(default_factory=GritSource)
    filters: Filters = field(default_factory=Filters)
    layout: Layout = "tar"
    engine: Engine = field(default_factory=LocalEngine)
    workers: int = 2
    max_reject_rate: float = 0.9
    benchmark: bool = False
    benchmark_images: int = 200
    project_images: int = 20_000_000

    def run(self) -> int:
        """Make the missing shards and tell what was skipped; returns the exit code."""
        if self.benchmark:
            print(self.measure())  # noqa: T201
            return 0
        summary = self.make_shards()
        print(summary)  # noqa: T201
        return 1 if summary.failures or (summary.bad_shards and not summary.shards) else 0

    def config(self) -> PipelineConfig:
        """Return what decides the content of the shards."""
        return PipelineConfig(
            self.source, self.segmenter, self.filters, self.layout, self.max_reject_rate
        )

    def measure(self) -> StageReport:
        """Time each stage on some pictures of the input; nothing is kept.

        Raises:
            ValueError: If the pattern matches nothing, or weights are missing.
        """
        inputs = self.source.shards(find_inputs(self.input)) if self.input else None
        return benchmark_stages(inputs, self.config(), self.benchmark_images, self.project_images)

    def make_shards(self) -> RunSummary:
        """Make the missing shards.

        Raises:
            ValueError: If input or output are not given, the pattern matches nothing, weights are
                missing, or the output folder holds shards of something else.
        """
        if not self.input or not self.output:
            raise ValueError(
                "expected --input (a pattern of GRIT tars, in quotes) and --output (a folder)"
            )
        inputs = self.source.shards(find_inputs(self.input))
        return make_shards(inputs, Path(self.output), self.config(), self.engine, self.workers)


@dataclass
class InspectJob:
    """Look at finished shards: numbers, plots, a contact sheet, and IoU with true masks.

    Attributes:
        input: Folder of finished shards.
        output: Folder for inspection.json, plots.png and contact_sheet.png.
        masks: Pattern of COCO instances JSON or of scenes' '*.masks.jsonl', to compare with.
        tiles: Regions on the contact sheet.
        samples: Samples to read, spread over the shards; totals are of all.
    """

    input: str
    output: str
    masks: str | None = None
    tiles: int = 48
    samples: int = 20_000

    def run(self) -> int:
        """Write the files and print the numbers; returns the exit code."""
        folders = Path(self.input), Path(self.output)
        print(inspect_shards(*folders, self.masks, self.tiles, self.samples))  # noqa: T201
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


JOBS: dict[str, Any] = {
    "scenes": ScenesJob,
    "grit": GritJob,
    "imagenet": ImageNetJob,
    "inspect": InspectJob,
    "verify": VerifyJob,
}

# Switches, which are given without a value.
FLAGS = {"grit": {"benchmark": "make no data set: time each stage on some pictures, and project"}}


def build_parser() -> ArgumentParser:
    """Return the parser of all commands."""
    parser = ArgumentParser(prog="alpha-clip-data", description=__doc__, allow_abbrev=False)
    commands = parser.add_subcommands(dest="command")
    for name, job in JOBS.items():
        summary = str(job.__doc__).splitlines()[0]
        command = ArgumentParser(description=summary, allow_abbrev=False)
        command.add_argument("--config", action="config", help="YAML file with these keys")
        flags = FLAGS.get(name, {})
        command.add_class_arguments(job, skip=set(flags), sub_configs=True)
        for flag, text in flags.items():
            command.add_argument(f"--{flag}", action="store_true", help=text)
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
