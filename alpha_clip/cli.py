"""`alpha-clip`: thin entry points. What a command does lives in the module that it calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from alpha_clip.evaluation.base import Benchmark
from alpha_clip.factory import create_model
from alpha_clip.model import AlphaClip

_COMMANDS = {
    "demo": "the whole road, on drawn scenes or on your own tars, with a report",
    "fit": "train (LightningCLI)",
    "validate": "validate a training checkpoint (LightningCLI)",
    "phrases": "compute the text features of training data once, for a frozen text tower",
    "eval": "run a benchmark on a model",
    "export": "write a model as a drop-in backbone",
    "embed": "write embeddings of regions or pictures, for retrieval databases",
}
# Modules of alpha_clip.export that write no format.
_NO_TARGETS = {
    "base",
    "model_card",
    "towers",
    "layouts",
    "mixture_of_features",
    "multimodal",
    "region_processor",
    "region_prompts",
}
_EXTRA = {"export": "export", "embed": "train,data", "demo": "train,data,export"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    typed = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        lines = [f"  {name:<10}{text}" for name, text in _COMMANDS.items()]
        usage = "usage: alpha-clip COMMAND [--config FILE] [--key value ...]"
        more = "alpha-clip COMMAND --help tells more; alpha-clip-data makes training data."
        sys.stdout.write("\n".join([usage, "", *lines, "", more, ""]))
        return 0
    if command not in _COMMANDS:
        sys.stderr.write(
            f"alpha-clip: unknown command {command!r}; one of {', '.join(_COMMANDS)}\n"
        )
        return 2
    try:
        if command in ("fit", "validate"):
            from alpha_clip.training import TrainingCLI

            TrainingCLI(None if typed else arguments)
        else:
            _call(command, arguments[1:])
    except ModuleNotFoundError as error:
        extra = _EXTRA.get(command, "train")
        sys.stderr.write(
            f"alpha-clip {command} needs {error.name}: pip install 'alpha-clip[{extra}]'\n"
        )
        return 2
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"alpha-clip {command}: {error}\n")
        return 2
    return 0


def _call(command: str, arguments: list[str]) -> None:
    """Run one of the commands that are plain functions."""
    from jsonargparse import auto_cli

    if command == "eval" and "--compare" in arguments:
        return _compare(arguments)
    function: Callable[..., object]
    if command == "demo":
        from alpha_clip.demo import demo

        function = demo
    elif command == "embed":
        from alpha_clip.embedding.embed import embed

        function = embed
    else:
        functions: dict[str, Callable[..., object]]
        functions = {"eval": evaluate, "export": export, "phrases": phrases}
        function = functions[command]
    auto_cli(function, args=arguments, as_positional=False, prog=f"alpha-clip {command}")


def _compare(arguments: list[str]) -> None:
    """Parse `eval --compare A.json B.json ...`: files in a row, as a shell's pattern gives them."""
    from jsonargparse import ArgumentParser

    from alpha_clip.evaluation.compare import compare

    parser = ArgumentParser("alpha-clip eval", description="Compare results of one benchmark.")
    parser.add_argument("--config", action="config", help="Path to a configuration file.")
    parser.add_argument(
        "--compare", type=str, nargs="+", metavar="FILE", help="What eval wrote, NAME.json."
    )
    parser.add_argument("--output", default="runs/eval/compare.md", help="Table; also .csv, .png.")
    typed = parser.parse_args(arguments)
    sys.stdout.write(compare(typed.compare, typed.output))


def phrases(
    checkpoint: str | None,
    data: list[str],
    output: str,
    name: str | None = None,
    pretrained: str | None = None,
    device: str = "cpu",
    batch_size: int = 256,
) -> None:
    """Write the text features of every phrase and caption of region-text shards.

    Args:
        checkpoint: A folder written by training or by save_checkpoint; null with name and
            pretrained.
        data: Folders of finished shards.
        output: Folder to write, for data.phrases of a training config.
        name: Architecture, where the checkpoint does not say it.
        pretrained: Weights of the CLIP to start from: a tag or a file.
        device: Where to compute them.
        batch_size: Phrases that go through the tower at a time.
    """
    from alpha_clip.phrases import write_phrase_features

    model, _, _ = create_model(name, pretrained, checkpoint, device=device)
    count = write_phrase_features(model, data, output, batch_size)
    sys.stdout.write(f"{output}: {count} phrases\n")


def evaluate(
    checkpoint: str | None,
    benchmark: Benchmark,
    output: str,
    name: str | None = None,
    pretrained: str | None = None,
    device: str = "cpu",
    devices: int = 1,
    max_dropped: float = 0.01,
) -> None:
    """Run a benchmark on a model; write its figures, per-class tables and pictures.

    Stopped and started again, it goes on where it was; what is done lies beside the output, in
    NAME.parts. `alpha-clip eval --compare A.json B.json` puts several results side by side.

    Args:
        checkpoint: A folder written by training or by save_checkpoint, or published weights; null
            with name and pretrained measures a plain CLIP.
        benchmark: What to run, by class_path.
        output: JSON file for the figures; the others get its name with other endings.
        name: Architecture, where the checkpoint does not say it.
        pretrained: The CLIP that published weights belong to: a tag or a file.
        device: Where to run it, such as cpu or cuda.
        devices: How many of them; each has a process of its own.
        max_dropped: Share of pictures that may be missing or damaged.
    """
    from functools import partial

    import torch

    from alpha_clip.evaluation.results import write_results
    from alpha_clip.evaluation.runner import run_benchmark

    if devices < 1:
        raise ValueError(f"expected at least one device, got {devices}")
    file = Path(output)
    if file.suffix != ".json":
        raise ValueError(f"output is the JSON file for the figures, got {output}")
    several = devices > 1 and device != "cpu"
    places = [f"{device}:{i}" if several else device for i in range(devices)]
    make_model = partial(_model, name, pretrained, checkpoint)
    with torch.inference_mode():
        columns, dropped = run_benchmark(
            benchmark, make_model, file.with_suffix(".parts"), places, max_dropped
        )
    about = {"checkpoint": checkpoint, "name": name, "pretrained": pretrained}
    sys.stdout.write(write_results(benchmark, columns, dropped, file, **about))


def _model(
    name: str | None, pretrained: str | None, checkpoint: str | None, device: str
) -> AlphaClip:
    model, _, _ = create_model(name, pretrained, checkpoint, device=device)
    return model


def export(
    checkpoint: str,
    output: str,
    format: str = "huggingface",
    name: str | None = None,
    pretrained: str | None = None,
    overwrite: bool = False,
    training_data: str | None = None,
    licence: str | None = None,
    metrics: tuple[str, ...] = (),
) -> None:
    """Write a model as a drop-in backbone, load it again and compare.

    Args:
        checkpoint: A folder written by training or by save_checkpoint, or published weights.
        output: Folder to write; it appears whole or not at all.
        format: The target: a module of alpha_clip.export, such as huggingface.
        name: Architecture, where the checkpoint does not say it.
        pretrained: The CLIP that published weights belong to: a tag or a file.
        overwrite: Whether to replace a folder that is there.
        training_data: For the model card: what alpha was trained on.
        licence: For the model card: the licence of the weights, such as apache-2.0.
        metrics: For the model card: files that `alpha-clip eval` wrote.
    """
    from importlib import import_module
    from pkgutil import iter_modules

    import alpha_clip.export as targets
    from alpha_clip.export.base import warn_if_untrained
    from alpha_clip.export.model_card import Card

    names = {module.name for module in iter_modules(targets.__path__)}
    known = sorted(names - _NO_TARGETS)
    if format not in known:
        raise ValueError(f"unknown format {format!r}; expected one of {', '.join(known)}")
    model, _, _ = create_model(name, pretrained, checkpoint)
    warn_if_untrained(model)
    card = Card(training_data, licence, metrics)
    target = import_module(f"alpha_clip.export.{format}")
    report = target.export(model, output, overwrite, card=card)
    sys.stdout.write(f"{report.directory}: largest difference {report.max_difference:.1e}\n")
