"""Each training recipe as it is shipped, for two steps of a tiny tower of the same family."""

import csv
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml

import alpha_clip
from data_pipeline.engines.local import LocalEngine
from data_pipeline.planning import plan
from data_pipeline.runner import PipelineConfig
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.sources.grit import GritSource

REPO = Path(__file__).resolve().parent.parent
RECIPES = sorted((REPO / "configs/train").glob("*.yaml"))
REAL = [recipe for recipe in RECIPES if not recipe.stem.startswith("tiny")]
# The folders that recipes read, from where one types the command.
FOLDERS = ["data/grit-1m", "data/grit-20m", "data/imagenet-pairs", "data/val"]
FOLDERS += ["runs/demo/shards/train", "runs/demo/shards/test"]
HARDWARE = re.compile(
    r"# (?P<nodes>\d+) nodes? x (?P<devices>\d+) GPUs? of \d+ GB x (?P<images>\d+) images"
    r"(?: x (?P<regions>\d+) regions)? = (?P<total>\d+) regions a step"
)

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 12, "head_width": 16}
SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}


def timm(name: str, pool: str, proj: str | None, **more: Any) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, **more}


# What a recipe's architecture begins with -> a small one of the family, and the size to run it at.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "ViT-SO400M": (
        {
            **{"custom_text": True, "init_logit_bias": -10, "embed_dim": 64},
            "vision_cfg": timm("test_vit", "map", "none"),
            "text_cfg": {**TEXT, **SIGLIP_TEXT},
        },
        32,
    ),
    "EVA0": (
        {"custom_text": True, "vision_cfg": timm("eva02_tiny_patch14_224", "token", None)},
        28,
    ),
    "PE-Core": (
        {"custom_text": True, "vision_cfg": timm("vit_pe_core_tiny_patch16_384", "map", None)},
        32,
    ),
    "convnext": (
        {"vision_cfg": timm("test_convnext", "", "mlp", timm_drop_path=0.1, image_size=64)},
        64,
    ),
    "": ({"vision_cfg": VIT}, 32),
}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, grit: Any) -> Path:
    """A folder with the data that recipes read: eight images of two regions in each data set."""
    folder = tmp_path_factory.mktemp("world")
    colours = ["red", "green", "blue", "white", "black", "brown", "pink", "grey"]
    boxes = PipelineConfig(GritSource(), BoxSegmenter())
    for number, name in enumerate(FOLDERS):
        samples = []
        for i, colour in enumerate(colours):
            first, second = f"a {colour} box", f"a {colours[i - 3]} thing"
            caption = f"{first} on {second}"
            spans = [[0, len(first)], [caption.index(second), len(caption)]]
            places = [[0.1, 0.2, 0.5, 0.8, 0.9], [0.55, 0.1, 0.95, 0.9, 0.7]]
            phrases = [span + place for span, place in zip(spans, places, strict=True)]
            key = f"{number}{i}"
            samples.append(grit.sample(key, caption=caption, ref_exps=phrases, noun_chunks=[]))
        (folder / name).mkdir(parents=True)
        tar = grit.tar(tmp_path_factory.mktemp("tars") / "0.tar", *samples)
        list(LocalEngine().run(plan([str(tar)], folder / name, boxes), folder / name, boxes, 1))
    return folder


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a folder with random weights of a tower of an architecture's family."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        family = next(start for start in FAMILIES if architecture.startswith(start))
        if family not in made:
            folder = tmp_path_factory.mktemp("base")
            config, size = FAMILIES[family]
            record = {"model_cfg": {"embed_dim": 32, "text_cfg": TEXT, **config}}
            (folder / "open_clip_config.json").write_text(
                json.dumps({**record, "preprocess_cfg": {}})
            )
            torch.manual_seed(0)
            model, _, _ = alpha_clip.create_model(f"local-dir:{folder}", image_size=size)
            for name, parameter in model.named_parameters():
                if name.endswith(
                    ".gamma"
                ):  # 1e-6 in a new ConvNeXt: its blocks would learn nothing
                    torch.nn.init.ones_(parameter)
            made[family] = alpha_clip.save_checkpoint(model, folder / "weights")
        return made[family]

    return make


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Type `alpha-clip fit ...` in this process."""
    from alpha_clip.cli import main

    monkeypatch.setattr(sys, "argv", ["alpha-clip", "fit", *arguments])
    try:
        return main()
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def two_steps(
    world: Path, stand_in: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, Path]]:
    """Take two steps of a recipe where its data are; return folders of the weights before, after.

    Only what this machine does not have is replaced: weights, GPUs, a large batch, a long run, and
    the minutes that a compiler takes.
    """

    def fit(recipe: Path, *more: str) -> tuple[Path, Path]:
        settings = yaml.safe_load(recipe.read_text())
        base = stand_in(settings["model"]["encoder"].get("name", ""))
        for folder in FOLDERS:
            (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder).symlink_to(world / folder)
        monkeypatch.chdir(tmp_path)
        options = {
            **{"model.encoder.name": "null", "model.encoder.pretrained": "null"},
            **{"model.encoder.checkpoint": base, "model.compile": "false"},
            **{"model.optim.warmup_steps": 0, "trainer.max_steps": 2},
            **{"data.batch_size": 4, "data.workers": 0, "data.shuffle": 4},
            **{"trainer.accelerator": "cpu", "trainer.strategy": "auto"},
            **{"trainer.devices": 1, "trainer.num_nodes": 1, "trainer.log_every_n_steps": 1},
            **{"trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false"},
        }
        typed = [f"--{key}={value}" for key, value in options.items()]
        assert run(monkeypatch, "--config", str(recipe), *typed, *more) == 0
        return base, Path(settings["model"].get("output", f"{settings['output']}/model"))

    return fit


def part(name: str) -> str:
    """Say what a weight of a stand-in is; blocks by their number."""
    if name.endswith("weight_alpha"):
        return "alpha"
    if name.startswith("logit_"):
        return "logit_scale"
    if not name.startswith("visual."):
        return "text"
    block = re.match(r"visual\.transformer\.resblocks\.(\d+)\.", name)
    if block:
        linear = name.endswith(
            ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
        )
        return f"block {block[1]} {'linear' if linear else 'rest'}"
    return "head" if name.startswith(("visual.ln_post", "visual.proj")) else "image"


def changes(name: str, model: dict[str, Any]) -> bool:
    """Say whether a recipe's settings of the model mean to change a weight of a stand-in."""
    kind, trainable = part(name), model.get("trainable", {})
    if kind == "logit_scale":
        return "logit_scale" in model or bool(trainable.get("logit_scale"))
    if kind in ("alpha", "text"):
        return bool(trainable.get(kind, kind == "alpha"))
    if "lora" in trainable:
        return kind.endswith("linear")
    if "last_blocks" in trainable:
        first = int(VIT["layers"]) - trainable["last_blocks"]
        return kind == "head" or (kind.startswith("block") and int(kind.split()[1]) >= first)
    return bool(trainable.get("visual", True))


@pytest.mark.filterwarnings("ignore:You passed .Trainer.accelerator='cpu', precision='16-mixed'")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_trains_what_it_says(
    recipe: Path, two_steps: Callable[..., tuple[Path, Path]]
) -> None:
    settings = yaml.safe_load(recipe.read_text())
    base, trained = two_steps(recipe)
    metrics = Path(settings["output"]) / "metrics/version_0/metrics.csv"
    rows = list(csv.DictReader(metrics.read_text().splitlines()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    place = settings["model"]["encoder"].get("alpha_block")
    before, after = (
        alpha_clip.create_model(checkpoint=folder, alpha_block=place)[0].clip.state_dict()
        for folder in (base, trained)
    )
    assert before.keys() == after.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in after if changes(name, settings["model"])}


def test_the_average_that_a_comment_offers_is_what_is_written(
    two_steps: Callable[..., tuple[Path, Path]],
) -> None:
    (recipe,) = (r for r in RECIPES if r.stem == "vit_b16")
    (offer,) = (options for words, options in offers(recipe) if words == "Averaged weights")
    _, trained = two_steps(recipe, *offer)
    alpha = alpha_clip.load_checkpoint(trained).visual.conv1.weight_alpha
    # The average begins with the first step, of 2e-4, and takes a thousandth of the second.
    assert alpha.abs().max().item() == pytest.approx(2e-4, rel=2e-3)


def offers(recipe: Path) -> list[tuple[str, list[str]]]:
    """Return the options that a recipe's comments suggest, with the words before them."""
    text = recipe.read_text().replace(":\n# --", ": --")
    found = re.findall(r"^# (.+?): (--.+)$", text, flags=re.MULTILINE)
    return [(words, shlex.split(options)) for words, options in found]


OFFERS = {f"{r.stem}: {words}": (r, options) for r in REAL for words, options in offers(r)}


def regions_a_step(settings: dict[str, Any]) -> int:
    trainer, data = settings["trainer"], settings["data"]
    regions = data.get("sampling", {}).get("regions_per_image", 1)
    gpus = trainer["devices"] * trainer.get("num_nodes", 1)
    strategy = trainer.get("strategy", "auto")
    if strategy != "auto":
        assert strategy["init_args"]["data_parallel_size"] == gpus
        assert strategy["init_args"]["tensor_parallel_size"] == 1
    return int(gpus * data["batch_size"] * regions)


@pytest.mark.parametrize("recipe", REAL, ids=lambda recipe: recipe.stem)
def test_the_hardware_in_the_comment_is_that_of_the_settings(recipe: Path) -> None:
    stated = HARDWARE.search(recipe.read_text())
    assert stated, "say in a comment: N nodes x N GPUs of N GB x N images x N regions = N regions"
    settings = yaml.safe_load(recipe.read_text())
    trainer, data = settings["trainer"], settings["data"]
    assert int(stated["nodes"]) == trainer.get("num_nodes", 1)
    assert int(stated["devices"]) == trainer["devices"]
    assert int(stated["images"]) == data["batch_size"]
    assert int(stated["regions"] or 1) == data.get("sampling", {}).get("regions_per_image", 1)
    assert int(stated["total"]) == regions_a_step(settings)
    if recipe.stem.startswith(("paper", "published")):
        assert int(stated["total"]) == 4096


@pytest.mark.parametrize("name", OFFERS)
def test_what_a_comment_offers_is_accepted(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, options = OFFERS[name]
    assert run(monkeypatch, "--config", str(recipe), *options, "--print_config") == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    if "same step" in name:
        assert regions_a_step(settings) == regions_a_step(yaml.safe_load(recipe.read_text()))


@pytest.mark.parametrize("recipe", REAL, ids=lambda recipe: recipe.stem)
def test_the_weights_are_known_to_open_clip(recipe: Path) -> None:
    encoder = yaml.safe_load(recipe.read_text())["model"]["encoder"]
    assert (encoder["name"], encoder["pretrained"]) in open_clip.list_pretrained()


@pytest.mark.parametrize("recipe", REAL, ids=lambda recipe: recipe.stem)
def test_a_recipe_has_an_output_and_an_end_of_its_own(recipe: Path) -> None:
    settings = yaml.safe_load(recipe.read_text())
    assert settings["output"] == f"runs/{recipe.stem}"
    assert {"max_epochs", "max_steps"} & settings["trainer"].keys()  # Lightning's own is 1000


# On a cluster: the batch script, with stand-ins for SLURM's commands.

BATCH = REPO / "configs/train/slurm/train.sbatch"
# As srun does, its stand-in starts the processes and hands on their exit code.
TOOLS = {
    "srun": """
        echo "$@" >> srun.log
        while [[ $1 == --* ]]; do shift; done
        export SLURM_NODEID=0
        SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
        SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
        echo $first $second > processes
        code=0
        wait $first || code=$?
        wait $second || code=$?
        exit $code""",
    "scancel": """
        [[ "$*" == "--signal=TERM 4242" ]] && kill -TERM $(cat processes)""",
    "scontrol": """
        echo "$@" >> scontrol.log""",
}


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.Popen[str]]:
    """Return what starts the script, in a folder of its own, with a stand-in for the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"JOB_ID": 4242, "JOB_NAME": "alpha-clip", "NODELIST": "127.0.0.1", "NNODES": 1}
    job |= {"NTASKS": 2, "NTASKS_PER_NODE": 2, "CPUS_PER_TASK": 12}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environ |= {f"SLURM_{name}": str(value) for name, value in job.items()}
    environ |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_PORT": str(port)}
    environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    monkeypatch.chdir(tmp_path)

    def start(command: str, *arguments: str) -> subprocess.Popen[str]:
        for name, lines in {**TOOLS, "alpha-clip": command}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
            (tmp_path / name).chmod(0o755)
        return subprocess.Popen(
            ["bash", str(BATCH), *arguments],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not (file.exists() and file.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{file} was never written"
        time.sleep(0.02)


@pytest.mark.parametrize("code", [0, 3, 143])
def test_a_run_that_ends_by_itself_is_not_queued_again(
    submit: Callable[..., subprocess.Popen[str]], code: int
) -> None:
    process = submit(f'echo "$@"; exit {code}', "--config", "some.yaml", "--output", "a b")
    words, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert words.splitlines() == 2 * ["fit --config some.yaml --output a b"]
    assert Path("srun.log").read_text().startswith("--cpus-per-task=12 --kill-on-bad-exit=1 alpha-")
    assert not Path("scontrol.log").exists()


@pytest.mark.parametrize(
    ("answer", "code"),
    [("exit 0", 0), ("sleep 0.3; exit 0", 0), ("trap - TERM; kill $$", 0), ("exit 2", 2)],
    ids=["at once", "later", "before it listened", "failing"],
)
def test_a_run_that_is_told_to_end_is_queued_again_unless_it_fails(
    submit: Callable[..., subprocess.Popen[str]], answer: str, code: int
) -> None:
    listen = f"trap '{answer}' TERM; echo > $SLURM_PROCID.listens; while true; do sleep 0.05; done"
    process = submit(listen)
    for rank in range(2):
        wait_for(Path(f"{rank}.listens"), process)
    process.send_signal(signal.SIGUSR1)
    words, _ = process.communicate(timeout=30)
    assert process.returncode == code, words
    queued = Path("scontrol.log").read_text() if Path("scontrol.log").exists() else ""
    assert queued == ("requeue 4242\n" if code == 0 else "")


def test_the_script_asks_for_what_a_run_needs() -> None:
    lines = BATCH.read_text().splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH --")
    )
    # To the script alone: processes that got USR1 would queue themselves again, as Lightning does.
    assert asked["signal"] == "B:USR1@300"
    assert asked["open-mode"] == "append"
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    assert {"nodes", "time", "requeue", "output"} <= asked.keys()
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])  # sbatch reads no further


@pytest.mark.slow
def test_a_job_out_of_time_goes_on_where_it_stopped(
    submit: Callable[..., subprocess.Popen[str]],
    world: Path,
    stand_in: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Two processes, both told at once; the second job comes to the end of the run."""
    (tmp_path / "data").symlink_to(world / "data")
    recipe = REPO / "configs/train/paper_vit_b16.yaml"
    options = {
        **{"model.encoder.name": "null", "model.encoder.pretrained": "null"},
        **{"model.encoder.checkpoint": stand_in("ViT-B-16"), "data.batch_size": 2},
        **{"data.workers": 0, "data.shuffle": 2, "trainer.accelerator": "cpu"},
        **{"trainer.devices": 2, "trainer.max_epochs": -1, "trainer.max_steps": 1000},
        **{"trainer.enable_progress_bar": "false", "last.every_n_train_steps": 5},
    }
    arguments = ["--config", str(recipe), *(f"--{key}={value}" for key, value in options.items())]
    command = f'exec {sys.executable} -m alpha_clip "$@"'
    last = Path("runs/paper_vit_b16/checkpoints/last.ckpt")

    process = submit(command, *arguments)
    wait_for(last, process)
    process.send_signal(signal.SIGUSR1)
    words, _ = process.communicate(timeout=200)
    assert process.returncode == 0, words
    assert Path("scontrol.log").read_text() == "requeue 4242\n"
    step = torch.load(last, weights_only=True)["global_step"]
    assert 5 <= step < 1000

    process = submit(command, *arguments, f"--trainer.max_steps={step + 3}")
    words, _ = process.communicate(timeout=200)
    assert process.returncode == 0, words
    assert Path("scontrol.log").read_text() == "requeue 4242\n"
    assert torch.load(last, weights_only=True)["global_step"] == step + 3
