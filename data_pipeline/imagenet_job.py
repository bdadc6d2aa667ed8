"""`alpha-clip-data imagenet`: masks, ranking and captions of ImageNet, one after the other."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from alpha_clip.regions import read_image
from data_pipeline.candidate_maker import CandidateMaker, EverythingSegmenter
from data_pipeline.candidates import Candidate
from data_pipeline.caption_maker import CaptionMaker, Words
from data_pipeline.captioners.base import Captioner
from data_pipeline.captioners.template import TemplateCaptioner
from data_pipeline.coco_json import write_coco
from data_pipeline.engines.base import Engine
from data_pipeline.engines.local import LocalEngine
from data_pipeline.filters import Filters
from data_pipeline.planning import RunSummary
from data_pipeline.ranking import rank
from data_pipeline.ranking_record import Keep
from data_pipeline.ranking_report import draw_ranking
from data_pipeline.run import make_shards
from data_pipeline.scorers.base import Scorer
from data_pipeline.scorers.contrast import ContrastScorer
from data_pipeline.segmenters.grabcut_everything import GrabCutEverything
from data_pipeline.sources.base import Reject
from data_pipeline.sources.imagenet import ImageNetSource
from data_pipeline.sources.mask_imagenet import MaskImageNetSource
from data_pipeline.sources.masked import KeptCandidates, MaskedSource

Stage = Literal["masks", "ranking", "captions"]


@dataclass
class ImageNetJob:
    """Make region–text shards of ImageNet: masks of everything, ranking by CLIP, captions.

    Attributes:
        input: Folders of classes (ImageNet's train folder), or patterns of tars, in quotes.
        annotations: The published MaskImageNet, `M_ImageNet_top_460k.json`: masks and captions are
            taken from there, and only the shards are left to make. The input is one folder then.
        output: Folder for `candidates`, `ranking`, `shards` and `instances.json`; what is there
            already is kept, and not made again.
        stages: What to do: `masks` finds everything in each picture and scores it, `ranking`
            decides what is kept of each class, `captions` writes the shards.
        source: Reads the input, and knows the names of classes.
        segmenter: Finds everything in a picture.
        scorer: Compares what was found with the class name.
        filters: Which pictures and masks are no candidates.
        keep: What is kept of each class.
        captioner: Describes what is kept.
        words: How captions are made of what it says.
        engine: Where the work is done: this machine, a SLURM array, Ray.
        workers: Processes, each making one shard (a class) at a time.
        max_reject_rate: Above this share of lost pictures a shard is not committed.
    """

    input: str | list[str] | None = None
    output: str | None = None
    annotations: str | None = None
    stages: list[Stage] = field(default_factory=lambda: ["masks", "ranking", "captions"])
    source: ImageNetSource = field(default_factory=ImageNetSource)
    segmenter: EverythingSegmenter = field(default_factory=GrabCutEverything)
    scorer: Scorer = field(default_factory=ContrastScorer)
    filters: Filters = field(default_factory=Filters)
    keep: Keep = field(default_factory=lambda: Keep(top_share=0.25, max_per_image=1))
    captioner: Captioner = field(default_factory=TemplateCaptioner)
    words: Words = field(default_factory=Words)
    engine: Engine = field(default_factory=LocalEngine)
    workers: int = 2
    max_reject_rate: float = 0.9

    def run(self) -> int:
        """Do what is missing of each stage, and tell; returns the exit code.

        Raises:
            ValueError: If input or output are not given or hold nothing, weights are missing, or
                the output folder holds something made with other settings.
        """
        if not self.input or not self.output:
            raise ValueError(
                "expected --input (ImageNet's train folder, or a pattern of tars in quotes) and "
                "--output (a folder)"
            )
        if self.annotations is not None:
            return self._publish(Path(self.output))
        inputs, output = self.source.shards(self.input), Path(self.output)
        if {"masks", "captions"} <= set(self.stages):
            copy(self.captioner).load()  # missing weights are told now, not after days of masks
        code = 0
        if "masks" in self.stages:
            code = self._told(self._find(inputs, output))
        if "ranking" in self.stages and not code:
            self._rank(inputs, output)
        if "captions" in self.stages and not code:
            source = KeptCandidates(self.source, output / "candidates", output / "ranking")
            code = self._describe(source, inputs, output)
        return code

    def _told(self, summary: RunSummary) -> int:
        print(summary)  # noqa: T201
        return 1 if summary.failures or not summary.shards else 0

    def _find(self, inputs: list[str], output: Path) -> RunSummary:
        maker = CandidateMaker(
            self.source, self.segmenter, self.scorer, self.filters, self.max_reject_rate
        )
        return make_shards(inputs, output / "candidates", maker, self.engine, self.workers)

    def _rank(self, inputs: list[str], output: Path) -> None:
        candidates, ranking = output / "candidates", output / "ranking"
        print(rank(candidates, ranking, self.keep))  # noqa: T201

        def open_picture(index: int, candidate: Candidate) -> Image.Image:
            for item in self.source.read(inputs[index], {candidate.image}):
                if not isinstance(item, Reject):
                    stored = read_image(item.data, self.source.max_image_px)
                    return Image.fromarray(stored.rgb)
            raise ValueError(f"{inputs[index]} has no {candidate.image} any more")

        draw_ranking(candidates, ranking, open_picture, ranking)

    def _describe(self, source: MaskedSource, inputs: list[str], output: Path) -> int:
        maker = CaptionMaker(source, self.captioner, self.words, self.max_reject_rate)
        code = self._told(make_shards(inputs, output / "shards", maker, self.engine, self.workers))
        file = output / "instances.json"
        count = write_coco(output / "shards", self.source.class_name, file)
        print(f"{count} annotations in {file}")  # noqa: T201
        return code

    def _publish(self, output: Path) -> int:
        """Make shards of the published annotations."""
        if not isinstance(self.input, str):
            raise ValueError(
                f"with --annotations, expected --input to be one folder, got {self.input}: the one "
                "that holds n01440764 and others"
            )
        source = MaskImageNetSource(
            str(self.annotations),
            self.input,
            self.source.class_names,
            max_image_px=self.source.max_image_px,
        )
        return self._describe(source, source.shards(), output)
