"""`alpha-clip demo`: the whole road, by the commands that a user would type.

Every step is one command of ours in a process of its own; a step that has finished is not run
again, and one that was interrupted goes on by its own means.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from alpha_clip.demo_report import write_report

_PLAIN = ["no alpha", "crop", "masked crop", "red circle"]  # ways of pointing without alpha


@dataclass(frozen=True)
class Step:
    """One command of the demo.

    Attributes:
        name: What it does, in a few words; also the name of its mark.
        arguments: The command, as typed.
    """

    name: str
    arguments: tuple[str, ...]

    def process(self) -> list[str]:
        """Return the command as this Python runs it."""
        module = {"alpha-clip": "alpha_clip", "alpha-clip-data": "data_pipeline"}
        return [sys.executable, "-m", module[self.arguments[0]], *self.arguments[1:]]


def demo(
    input: str | None = None,
    masks: str | None = None,
    output: str = "runs/demo",
    sam_checkpoint: str | None = None,
    sam_type: str = "vit_h",
    model: str | None = None,
    pretrained: str | None = None,
    steps: int = 20,
) -> None:
    """Run the whole road and write one page about it.

    Without `input`: draws scenes, makes masks, trains a tiny CLIP and its alpha channel from
    scratch, evaluates, exports. With `input`: the same road on your own GRIT-layout tars, with a
    few training steps. Stopped and started again, it goes on where it was.

    Args:
        input: Pattern of your own tars, in quotes; None draws scenes.
        masks: COCO instances JSON with true masks of the same pictures, to compare with.
        output: Folder for everything; the page is report.html in it.
        sam_checkpoint: SAM's weights; adds SAM's masks, and trains on them.
        sam_type: The size that those weights are of.
        model: With `input`, an open_clip architecture to start from; None trains a tiny one.
        pretrained: With `model`, its weights: an open_clip tag or a file.
        steps: With `input`, training steps of each stage.

    Raises:
        ValueError: If the input pattern matches nothing, or an option does not apply.
        RuntimeError: If a step fails.
    """
    if input is None and (masks or sam_checkpoint or model or pretrained):
        raise ValueError("masks, sam_checkpoint, model and pretrained need --input 'PATTERN.tar'")
    if input is not None and not glob(input, recursive=True):
        raise ValueError(f"no file matches {input!r}; give a pattern of tars, in quotes")
    folder = Path(output)
    segmenters = ["grabcut", "box"] + (["sam"] if sam_checkpoint else [])
    if input is None:
        road = _scenes_road(folder)
    else:
        sam = (sam_checkpoint, sam_type) if sam_checkpoint else None
        road = _input_road(folder, input, masks, sam, (model, pretrained), steps)
    seconds = {step.name: _run(step, folder, i, len(road)) for i, step in enumerate(road, 1)}
    page = write_report(folder, seconds, segmenters)
    _say(f"\nThe report is {page}")
    _say("Next, embed a region of a picture of yours:")
    _say(
        '  python -c "import alpha_clip; from PIL import Image; '
        f"model, transform, _ = alpha_clip.create_model(checkpoint='{folder}/models/alpha'); "
        "image = Image.open('photo.jpg'); "
        'print(model.encode_image(transform(image, alpha_clip.Box(10, 10, 90, 90))[None]).shape)"'
    )


def config_file(name: str) -> str:
    """Return the path of a shipped config: of the source tree, else of the installed package."""
    package = Path(__file__).parent
    for root in (package.parent / "configs", package / "configs"):
        if (root / name).exists():
            return str(root / name)
    raise ValueError(f"the shipped config {name} is missing; install alpha-clip again")


def _scenes_road(folder: Path) -> list[Step]:
    """Draw, segment, look, train twice, evaluate twice, export."""
    road = []
    for split in ("train", "test"):
        road += [
            _data(
                "scenes",
                f"draw {split} scenes",
                f"scenes_{split}",
                output=folder / "scenes" / split,
            ),
            _data(
                "grit",
                f"make masks of {split} scenes",
                "grit_grabcut",
                input=folder / "scenes" / split / "*.tar",
                output=folder / "shards" / split,
            ),
        ]
    road.append(
        _data(
            "grit",
            "boxes of test scenes as masks",
            "grit_box",
            input=folder / "scenes/test/*.tar",
            output=folder / "shards/test-box",
        )
    )
    for name, shards in (("grabcut", "test"), ("box", "test-box")):
        road.append(
            _inspect(folder, name, folder / "shards" / shards, folder / "scenes/test/*.masks.jsonl")
        )
    tiny = f"local-dir:{Path(config_file('models/tiny/open_clip_config.json')).parent}"
    road.append(_fit(folder, "base", {"model.encoder.name": tiny}))
    road.append(
        _fit(
            folder,
            "alpha",
            {
                "model.encoder.checkpoint": str(folder / "models/base"),
                "data.val": json.dumps([str(folder / "shards/test")]),
            },
        )
    )
    for name in ("base", "alpha"):
        options: dict[str, object] = {
            "checkpoint": folder / "models" / name,
            "output": folder / "scores" / f"{name}.json",
            "benchmark.init_args.data": json.dumps([str(folder / "shards/test")]),
            "benchmark.init_args.names": folder / "scenes/test/names.json",
        }
        if name == "base":  # it does not see alpha
            options["benchmark.init_args.focus"] = json.dumps(_PLAIN)
        road.append(_ours("eval", f"evaluate {name}", "eval/regions.yaml", options))
    return [*road, _export(folder)]


def _input_road(
    folder: Path,
    pattern: str,
    masks: str | None,
    sam: tuple[str, str] | None,
    base: tuple[str | None, str | None],
    steps: int,
) -> list[Step]:
    """Segment by every means there is, look, train a little, export."""
    road = []
    for name in ["grabcut", "box"] + (["sam"] if sam else []):
        options: dict[str, object] = {"input": pattern, "output": folder / "shards" / name}
        options["source.phrases"] = "ref_exps"
        if name == "sam" and sam:
            options |= {"segmenter.checkpoint": sam[0], "segmenter.model_type": sam[1]}
        road.append(_data("grit", f"make masks: {name}", f"grit_{name}", **options))
        road.append(_inspect(folder, name, folder / "shards" / name, masks))
    best = folder / "shards" / ("sam" if sam else "grabcut")
    few: dict[str, object] = {
        "data.train": json.dumps([str(best)]),
        "data.workers": 0,
        "data.batch_size": 16,
        "trainer.max_steps": steps,
        "trainer.log_every_n_steps": 1,
        "model.optim.warmup_steps": 0,
    }
    start: dict[str, object] = {"model.encoder.checkpoint": folder / "models/base"}
    if base[0]:
        start = {"model.encoder": json.dumps({"name": base[0], "pretrained": base[1]})}
    else:
        tiny = f"local-dir:{Path(config_file('models/tiny/open_clip_config.json')).parent}"
        road.append(_fit(folder, "base", {"model.encoder.name": tiny, **few}))
    return [*road, _fit(folder, "alpha", {**start, **few, "data.val": "[]"}), _export(folder)]


def _data(command: str, name: str, config: str, **options: object) -> Step:
    arguments = ["alpha-clip-data", command, "--config", config_file(f"data/{config}.yaml")]
    return Step(name, (*arguments, *_flags(options)))


def _ours(command: str, name: str, config: str, options: dict[str, object]) -> Step:
    return Step(name, ("alpha-clip", command, "--config", config_file(config), *_flags(options)))


def _inspect(folder: Path, name: str, shards: Path, masks: object) -> Step:
    options = {"input": shards, "output": folder / "masks" / name}
    more = ("--masks", str(masks)) if masks else ()
    arguments = ("alpha-clip-data", "inspect", *_flags(options), *more)
    return Step(f"look at masks: {name}", arguments)


def _fit(folder: Path, stage: str, options: dict[str, object]) -> Step:
    paths: dict[str, object] = {
        "output": folder / "training" / stage,
        "data.train": json.dumps([str(folder / "shards/train")]),
        "model.output": folder / "models" / stage,
    }
    return _ours("fit", f"train {stage}", f"train/tiny_{stage}.yaml", {**paths, **options})


def _export(folder: Path) -> Step:
    options = {"checkpoint": folder / "models/alpha", "output": folder / "export/huggingface"}
    return _ours("export", "export", "export/huggingface.yaml", dict(options))


def _flags(options: Mapping[str, object]) -> list[str]:
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def _run(step: Step, folder: Path, number: int, total: int) -> float:
    """Run a step unless its mark says that the same command has finished; return its seconds."""
    mark = folder / ".steps" / f"{step.name.replace(' ', '-').replace(':', '')}.json"
    _say(f"\n[{number}/{total}] {step.name}\n$ {shlex.join(step.arguments)}")
    if mark.exists():
        done = json.loads(mark.read_text())
        if done["arguments"] == list(step.arguments):
            _say(f"done before, in {done['seconds']:.0f} s")
            return float(done["seconds"])
    begin = time.monotonic()
    code = subprocess.run(step.process(), check=False).returncode
    if code:
        raise RuntimeError(f"the step {step.name!r} failed (exit code {code}); its words are above")
    seconds = time.monotonic() - begin
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"arguments": step.arguments, "seconds": seconds}))
    return seconds


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # before the next process writes
