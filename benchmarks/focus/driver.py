"""Trains and evaluates every method, by the commands that a user would type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from benchmarks.focus.methods import AS_IT_IS, TRAINED, Method
from benchmarks.focus.scenes import write_scenes
from benchmarks.focus.table import report
from data_pipeline.sources.scene_drawing import HELD_OUT_NAMES, NAMES, SceneConfig

_HERE = Path(__file__).parent
_CLASSES = "alpha_clip.evaluation"


def focus(
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - shown by --help, never changed
    output: Path = Path("runs/benchmarks/focus"),
    train: list[str] | None = None,
    test: list[str] | None = None,
    base: str | None = None,
    config: Path = _HERE / "alpha.yaml",
    parallel: int = 2,
) -> None:
    """Compare ways of pointing at a region: accuracy, and what they cost the whole image.

    On drawn scenes, or on any region–text shards with a CLIP to start from. What is done stays: the
    same command goes on.

    Args:
        seeds: Of training; each is a run of every trained method.
        output: Folder for everything: models, scores, `focus.csv`, `focus.md`, `focus.png`.
        train: Folders of shards to train on; `None` draws scenes.
        test: Folders of other shards to evaluate on.
        base: What `create_model(checkpoint=...)` takes; `None` trains a tiny CLIP on the captions.
        config: Recipe of the training with alpha, for `alpha-clip fit`.
        parallel: Commands at a time; each has its part of the cores.

    Raises:
        ValueError: If only one of `train`, `test` and `base` is given.
        RuntimeError: If a command fails.
    """
    if len({train is None, test is None, base is None}) > 1:
        raise ValueError("give train, test and base together, or none of them for drawn scenes")
    names = None
    if train is None or test is None or base is None:
        train, test, names = _draw(output)
        base = str(output / "base" / "model")
        data = ["--data.train", json.dumps(train), "--output", str(output / "base")]
        _run(["fit", "--config", str(_HERE / "base.yaml"), *data], Path(base), os.cpu_count() or 1)
    threads = max(1, (os.cpu_count() or 1) // parallel)
    job = _Job(output, train, test, base, names, config, threads)
    work = [(None, 0), *((method, seed) for seed in seeds for method in TRAINED)]
    with ThreadPoolExecutor(parallel) as pool, tqdm(total=len(work), unit="run") as progress:
        runs = [pool.submit(job.run, method, seed) for method, seed in work]
        try:
            for run in as_completed(runs):
                run.result()
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what runs may end, the rest need not begin
            raise
    report(output, seeds)


def _draw(output: Path) -> tuple[list[str], list[str], str]:
    """Draw what is trained and tested on; six (colour, shape) pairs are never trained on."""
    write_scenes(output / "train", SceneConfig(12_000, "seen", seed=10))
    write_scenes(output / "test", SceneConfig(1_000, "all", seed=12))
    names = output / "names.json"
    names.write_text(json.dumps({"names": NAMES, "held_out": HELD_OUT_NAMES}, indent=1))
    return [str(output / "train")], [str(output / "test")], str(names)


class _Job:
    """One method with one seed, or the base in all ways."""

    def __init__(
        self,
        output: Path,
        train: list[str],
        test: list[str],
        base: str,
        names: str | None,
        config: Path,
        threads: int,
    ) -> None:
        self.output = output
        self.train, self.test, self.base, self.names = train, test, base, names
        self.config, self.threads = config, threads

    def run(self, method: Method | None, seed: int) -> None:
        """Train, if there is something to train, and evaluate."""
        if method is None:
            self._evaluate(self.base, [m.way for m in AS_IT_IS], self.output / "runs" / "base")
            return
        folder = self.output / "runs" / method.slug / str(seed)
        options = {
            "output": folder,
            "seed_everything": seed,
            "data.seed": seed,
            "data.train": json.dumps(self.train),
            "model.encoder.checkpoint": self.base,
            **(method.options or {}),
        }
        flags = [f"--{key}={value}" for key, value in options.items()]
        _run(["fit", "--config", str(self.config), *flags], folder / "trained", self.threads)
        ways = ["no alpha"] if method.way == "no alpha" else ["no alpha", method.way]
        self._evaluate(str(folder / "model"), ways, folder)

    def _evaluate(self, model: str, ways: list[str], folder: Path) -> None:
        regions = {"data": self.test, "focus": ways, "names": self.names}
        for name, kind, options in (
            ("regions", "region_classification.RegionClassification", regions),
            ("retrieval", "image_retrieval.ImageRetrieval", {"data": self.test}),
        ):
            scores = folder / f"{name}.json"
            values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in options.items()}
            flags = [f"--benchmark.init_args.{key}={value}" for key, value in values.items()]
            paths = ["--checkpoint", model, "--output", str(scores)]
            _run(
                ["eval", *paths, "--benchmark", f"{_CLASSES}.{kind}", *flags], scores, self.threads
            )


def _run(arguments: list[str], result: Path, threads: int) -> None:
    """Run a command of ours unless its result is there; a mark where it does not write one."""
    if result.exists():
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "alpha_clip", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        words = done.stderr[-2000:]
        raise RuntimeError(f"alpha-clip {' '.join(arguments)} failed:\n{words}")
    if arguments[0] == "fit" and result.name == "trained":
        result.touch()
