"""Trains and evaluates models by the commands that a user would type; what is done stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.focus.methods import Method
from benchmarks.focus.scenes import write_scenes
from data_pipeline.sources.scene_drawing import HELD_OUT_NAMES, NAMES, SceneConfig

HERE = Path(__file__).parent
_CLASSES = "alpha_clip.evaluation"


@dataclass(frozen=True)
class Material:
    """What models are trained and measured on.

    Attributes:
        train: Folders of shards to train on.
        test: Folders of other shards.
        names: File with the names to choose from, or `None` for the phrases of the test.
    """

    train: list[str]
    test: list[str]
    names: str | None = None


def given_or_drawn(
    output: Path,
    train: list[str] | None,
    test: list[str] | None,
    base: str | None,
    recipe: Sequence[str],
) -> tuple[Material, str]:
    """Return what to train and test on and the CLIP to start from: the user's, or drawn scenes.

    Args:
        output: Folder for what has to be made; what is there stays.
        train: Folders of shards to train on; `None` draws scenes.
        test: Folders of other shards.
        base: What `create_model(checkpoint=...)` takes; `None` trains a tiny CLIP on the captions.
        recipe: Options of `alpha-clip fit` for that CLIP.

    Raises:
        ValueError: If only some of `train`, `test` and `base` are given.
    """
    if len({train is None, test is None, base is None}) > 1:
        raise ValueError("give train, test and base together, or none of them for drawn scenes")
    if train is not None and test is not None and base is not None:
        return Material(train, test), base
    material = draw(output)
    folder = output / "base"
    data = ["--data.train", json.dumps(material.train), "--output", str(folder)]
    run_command(["fit", *recipe, *data], folder / "model", os.cpu_count() or 1)
    return material, str(folder / "model")


def draw(output: Path) -> Material:
    """Draw what is trained and tested on; six (colour, shape) pairs are never trained on."""
    write_scenes(output / "train", SceneConfig(12_000, "seen", seed=10))
    write_scenes(output / "test", SceneConfig(1_000, "all", seed=12))
    names = output / "names.json"
    names.write_text(json.dumps({"names": NAMES, "held_out": HELD_OUT_NAMES}, indent=1))
    return Material([str(output / "train")], [str(output / "test")], str(names))


@dataclass(frozen=True)
class Job:
    """Training and evaluation of the methods of a study.

    Attributes:
        output: The study's folder.
        material: What to train and measure on.
        base: The CLIP that every method starts from.
        config: Recipe of the training, for `alpha-clip fit`; a method changes some of it.
        as_it_is: Ways of pointing the base itself.
        threads: Cores of each command.
    """

    output: Path
    material: Material
    base: str
    config: Path
    as_it_is: Sequence[Method]
    threads: int

    def run_all(self, methods: Sequence[Method], seeds: Sequence[int], parallel: int) -> None:
        """Run the base in all its ways, and every method with every seed.

        Args:
            methods: What to train.
            seeds: Of training.
            parallel: Commands at a time.

        Raises:
            RuntimeError: If a command fails.
        """
        work = [(None, 0), *((method, seed) for seed in seeds for method in methods)]
        with ThreadPoolExecutor(parallel) as pool, tqdm(total=len(work), unit="run") as progress:
            runs = [pool.submit(self.run, method, seed) for method, seed in work]
            try:
                for run in as_completed(runs):
                    run.result()
                    progress.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what runs may end, the rest need not begin
                raise

    def run(self, method: Method | None, seed: int) -> None:
        """Train, if there is something to train, and evaluate."""
        if method is None:
            ways = [m.way for m in self.as_it_is]
            self._evaluate(self.base, ways, self.output / "runs" / "base")
            return
        folder = self.output / "runs" / method.slug / str(seed)
        options = {
            "output": folder,
            "seed_everything": seed,
            "data.seed": seed,
            "data.train": json.dumps(self.material.train),
            "model.encoder.checkpoint": self.base,
            **(method.options or {}),
        }
        flags = [f"--{key}={value}" for key, value in options.items()]
        fit = ["fit", "--config", str(self.config), *flags]
        run_command(fit, folder / "trained", self.threads)
        ways = dict.fromkeys(["no alpha", method.way, *method.others])
        self._evaluate(str(folder / "model"), list(ways), folder)

    def _evaluate(self, model: str, ways: list[str], folder: Path) -> None:
        test = self.material.test
        regions = {"data": test, "focus": ways, "names": self.material.names}
        for name, kind, options in (
            ("regions", "region_classification.RegionClassification", regions),
            ("retrieval", "image_retrieval.ImageRetrieval", {"data": test}),
        ):
            scores = folder / f"{name}.json"
            values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in options.items()}
            flags = [f"--benchmark.init_args.{key}={value}" for key, value in values.items()]
            paths = ["--checkpoint", model, "--output", str(scores)]
            command = ["eval", *paths, "--benchmark", f"{_CLASSES}.{kind}", *flags]
            run_command(command, scores, self.threads)


def run_command(arguments: list[str], result: Path, threads: int) -> None:
    """Run a command of ours unless its result is there; a mark where it does not write one.

    Args:
        arguments: Of `alpha-clip`.
        result: What is there when the command is done.
        threads: Cores to use.

    Raises:
        RuntimeError: If the command fails, with its last words.
    """
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
