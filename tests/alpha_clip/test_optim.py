import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from open_clip.transformer import ResidualAttentionBlock
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import alpha_clip
from alpha_clip.lora import LoraConfig
from alpha_clip.model import AlphaClip
from alpha_clip.optim import (
    OptimConfig,
    create_optimizer,
    create_schedule,
    declare_roles,
    parameter_groups,
)
from alpha_clip.surgery import add_alpha_channel, alpha_parameters
from alpha_clip.trainable import TrainableConfig


@pytest.fixture
def learner(tiny_name: str) -> AlphaClip:
    return alpha_clip.create_model(tiny_name)[0]


def group(model: AlphaClip, config: OptimConfig = OptimConfig()) -> dict[str, dict[str, Any]]:
    groups = parameter_groups(model.named_parameters(), declare_roles(model), config)
    return {g["name"]: g for g in groups}


def members(model: AlphaClip) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {name: {names[id(p)] for p in g["params"]} for name, g in group(model).items()}


# What each parameter is.


def test_parts_are_told_apart_by_what_they_are(learner: AlphaClip) -> None:
    TrainableConfig(lora=LoraConfig(rank=2)).apply(learner)
    found: dict[str, set[str]] = {}
    for name, role in declare_roles(learner).items():
        found.setdefault(role.part, set()).add(name)
    names = {name for name, _ in learner.named_parameters()}
    assert found["alpha"] == {"clip.visual.conv1.weight_alpha"}
    assert found["lora"] == {n for n in names if ".lora_A." in n or ".lora_B." in n}
    assert found["logit_scale"] == {"clip.logit_scale"}
    image = {n for n in names if n.startswith("clip.visual.")}
    assert found["image"] == image - found["lora"] - found["alpha"]
    assert found["text"] == names - image - {"clip.logit_scale"}
    assert set().union(*found.values()) == names
    assert len(found["lora"]) == 2 * 4 * 4


class Towers(nn.Module):
    """A CLIP with every kind of parameter that is a vector or a bias in disguise."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 8, 4)
        self.visual.norm = nn.LayerNorm(8)
        self.visual.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.visual.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.visual.gamma = nn.Parameter(torch.ones(8, 1, 1))
        self.visual.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.text = nn.Embedding(7, 8)
        self.text_decoder = nn.Linear(8, 8)
        self.logit_scale = nn.Parameter(torch.ones([1]))
        self.logit_bias = nn.Parameter(torch.ones([]))


def test_vectors_and_biases_do_not_decay_whatever_their_axes() -> None:
    clip = Towers()
    add_alpha_channel(clip.visual)
    roles = declare_roles(AlphaClip(clip, "test", {}, None))  # type: ignore[arg-type]
    own = {n.removeprefix("clip."): (role.part, role.decays) for n, role in roles.items()}
    assert own == {
        "visual.conv1.weight": ("image", True),
        "visual.conv1.weight_alpha": ("alpha", True),
        "visual.conv1.bias": ("image", False),
        "visual.norm.weight": ("image", False),
        "visual.norm.bias": ("image", False),
        "visual.cls_token": ("image", False),
        "visual.pos_embed": ("image", True),
        "visual.gamma": ("image", False),
        "visual.relative_position_bias_table": ("image", False),
        "text.weight": ("text", True),
        "text_decoder.weight": ("other", True),
        "text_decoder.bias": ("other", False),
        "logit_scale": ("logit_scale", False),
        "logit_bias": ("logit_scale", False),
    }


def test_updates_of_rank_1_decay_as_others_do(learner: AlphaClip) -> None:
    TrainableConfig(lora=LoraConfig(rank=1)).apply(learner)
    assert set(group(learner)) == {"alpha", "lora"}


# Groups.


def test_groups_have_their_rates_and_decays(learner: AlphaClip) -> None:
    config = OptimConfig(lr_alpha=3.0, lr=2.0, lr_text=1.0, weight_decay=0.5)
    settings = {n: (g["lr"], g["weight_decay"]) for n, g in group(learner, config).items()}
    assert settings == {
        "alpha": (3.0, 0.5),
        "image": (2.0, 0.5),
        "image_no_decay": (2.0, 0.0),
        "text": (1.0, 0.5),
        "text_no_decay": (1.0, 0.0),
        "logit_scale": (2.0, 0.0),
    }
    found = members(learner)
    assert found["alpha"] == {"clip.visual.conv1.weight_alpha"}
    assert found["logit_scale"] == {"clip.logit_scale"}
    visual = {f"clip.visual.{name}" for name, _ in learner.visual.named_parameters()}
    assert found["image"] | found["image_no_decay"] | found["alpha"] == visual
    shapes = {name: p.ndim for name, p in learner.named_parameters()}
    assert {shapes[n] for n in found["image_no_decay"] | found["text_no_decay"]} == {1}
    assert min(shapes[n] for n in found["image"] | found["text"]) == 2


def test_low_rank_updates_have_a_rate_of_their_own(learner: AlphaClip) -> None:
    TrainableConfig(lora=LoraConfig(rank=2)).apply(learner)
    groups = group(learner, OptimConfig(lr_alpha=3.0, lr_lora=4.0))
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "alpha": (3.0, 2e-2),
        "lora": (4.0, 2e-2),
    }


def test_every_parameter_is_in_one_group(learner: AlphaClip) -> None:
    grouped = [id(p) for g in group(learner).values() for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in learner.parameters()}


def test_text_learns_as_the_image_does_unless_said_otherwise(learner: AlphaClip) -> None:
    groups = group(learner, OptimConfig(lr=7.0))
    assert groups["text"]["lr"] == groups["image"]["lr"] == 7.0
    assert group(learner, OptimConfig(lr=7.0, lr_text=0.0))["text"]["lr"] == 0.0


def test_frozen_parameters_are_left_out(learner: AlphaClip) -> None:
    learner.requires_grad_(False)
    for parameter in alpha_parameters(learner):
        parameter.requires_grad_(True)
    assert list(group(learner)) == ["alpha"]
    learner.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        group(learner)


def test_the_defaults_are_the_papers() -> None:
    config = OptimConfig()
    assert (config.lr_alpha, config.lr, config.weight_decay) == (2e-4, 2e-6, 2e-2)
    assert config.schedule == "cosine"


def test_the_optimizer_takes_the_groups(learner: AlphaClip) -> None:
    config = OptimConfig(betas=(0.8, 0.9), eps=1e-5)
    optimizer = create_optimizer(learner.named_parameters(), declare_roles(learner), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {g["name"] for g in optimizer.param_groups} >= {"alpha", "image"}
    assert all((g["betas"], g["eps"]) == ((0.8, 0.9), 1e-5) for g in optimizer.param_groups)


# Wrapped models.


def test_wrappers_change_names_and_no_groups(learner: AlphaClip) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    expected = {name: {id(p) for p in g["params"]} for name, g in group(learner).items()}
    roles = declare_roles(learner)
    blocks = learner.visual.transformer.resblocks
    blocks[0] = torch.compile(blocks[0])
    blocks[1] = checkpoint_wrapper(blocks[1])
    learner.visual = checkpoint_wrapper(torch.compile(learner.visual))
    wrapped = torch.compile(learner)
    names = [name for name, _ in wrapped.named_parameters()]
    assert sum("_orig_mod." in n for n in names) == len(names)
    assert any("_checkpoint_wrapped_module" in n for n in names)
    groups = parameter_groups(wrapped.named_parameters(), roles, OptimConfig())
    assert {g["name"]: {id(p) for p in g["params"]} for g in groups} == expected


def test_a_parameter_that_was_not_declared_is_refused(learner: AlphaClip) -> None:
    roles = declare_roles(learner)
    learner.visual.late = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"nothing was declared of .* clip\.visual\.late"):
        parameter_groups(learner.named_parameters(), roles, OptimConfig())


def _shard(model: AlphaClip, kind: str) -> nn.Module:
    """Wrap a model; neither kind takes parameters without axes, as the temperature is."""
    if kind == "FSDP2":
        for block in model.visual.transformer.resblocks:
            fully_shard(block)
        fully_shard(model, ignored_params={model.logit_scale})
        return model
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({ResidualAttentionBlock}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        ignored_states=[model.logit_scale],
    )


def _sharded(rank: int, folder: str, tiny_name: str) -> None:
    """Shard, sort and step; note each group's rate, decay, parameters and elements."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    notes: dict[str, dict[str, list[float]]] = {}
    for kind in ("FSDP1", "FSDP2"):
        model = alpha_clip.create_model(tiny_name)[0]
        TrainableConfig(text=True).apply(model)
        roles = declare_roles(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FSDP1 says that it is the older of the two
            wrapped = _shard(model, kind)
            optimizer = create_optimizer(wrapped.named_parameters(), roles, OptimConfig())
            wrapped(torch.randn(1, 4, 48, 48), torch.ones(2, 32).long())[0].sum().backward()
        optimizer.step()
        notes[kind] = {
            g["name"]: [g["lr"], g["weight_decay"], len(g["params"]), elements(g)]
            for g in optimizer.param_groups
        }
    Path(f"{folder}/{rank}.json").write_text(json.dumps(notes))
    dist.destroy_process_group()


def elements(g: dict[str, Any]) -> int:
    return sum(p.numel() for p in g["params"])


@pytest.mark.slow
@pytest.mark.skipif(Version(torch.__version__) < Version("2.7"), reason="no ignored_params")
def test_sharded_parameters_keep_their_groups(tmp_path: Path, tiny_name: str) -> None:
    mp.spawn(_sharded, (str(tmp_path), tiny_name), nprocs=2)
    notes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    model = alpha_clip.create_model(tiny_name)[0]
    TrainableConfig(text=True).apply(model)
    expected = group(model)
    for kind in ("FSDP1", "FSDP2"):
        first, second = (note[kind] for note in notes)
        assert set(first) == set(second) == set(expected)
        for name, g in expected.items():
            facts = [g["lr"], g["weight_decay"], len(g["params"])]
            assert first[name][:3] == second[name][:3] == facts
            # FSDP1 gives each process its share, FSDP2 a tensor that knows of all shares.
            whole = first[name][3] + (second[name][3] if kind == "FSDP1" else 0)
            assert whole == elements(g)


# The schedule.


def rates(config: OptimConfig, steps: int) -> list[float]:
    """The rate that each optimizer step sees."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = create_schedule(optimizer, config, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*seen, optimizer.param_groups[0]["lr"]]


def test_cosine_falls_to_0_over_the_real_run() -> None:
    seen = rates(OptimConfig(), 10)
    expected = [1 + math.cos(math.pi * step / 10) for step in range(11)]
    assert seen == pytest.approx(expected)
    assert seen[-1] == pytest.approx(0)


def test_warm_up_rises_evenly_and_meets_the_peak() -> None:
    seen = rates(OptimConfig(warmup_steps=4), 10)
    assert seen[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert seen[4:] == pytest.approx([1 + math.cos(math.pi * step / 6) for step in range(7)])


def test_constant_stays() -> None:
    assert rates(OptimConfig(schedule="constant"), 4) == [2.0] * 5
    assert rates(OptimConfig(schedule="constant", warmup_steps=2), 4) == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_steps_beyond_the_run_do_not_rise_again() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = create_schedule(optimizer, OptimConfig(), 3)
    for _ in range(9):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_the_cosine_can_be_longer_or_shorter_than_the_run() -> None:
    whole = rates(OptimConfig(warmup_steps=2), 10)
    assert rates(OptimConfig(warmup_steps=2, total_steps=10), 4) == whole[:5]
    assert rates(OptimConfig(warmup_steps=2, total_steps=10), 14)[:11] == whole
    assert rates(OptimConfig(warmup_steps=2, total_steps=10), 14)[10:] == pytest.approx([0] * 5)


def test_the_published_scripts_rate_rises_again() -> None:
    """Against the formula of train/scheduler.py, with the script's `steps` of 5000."""
    peak, warmup, total, run = 2.0, 800, 5000, 9500
    expected = [peak * (step + 1) / warmup for step in range(warmup)]
    for step in range(warmup, run + 1):
        angle = math.pi * (step - warmup) / (total - warmup)
        expected.append(peak * math.cos(angle / 2) ** 2)  # = (1 + cos(angle)) / 2
    config = OptimConfig(warmup_steps=800, total_steps=5000, schedule="cosine_waves")
    seen = rates(config, run)
    assert seen == pytest.approx(expected, abs=1e-12)
    assert seen[5000] == pytest.approx(0, abs=1e-12)
    assert seen[9200] == pytest.approx(peak)


@pytest.mark.parametrize("values", [{"total_steps": 0}, {"total_steps": 5, "schedule": "constant"}])
def test_an_end_without_a_cosine_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected total_steps above 0 and a schedule with"):
        OptimConfig(**values)


def test_warm_up_longer_than_the_cosine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps = 8 leaves nothing of .* 8 steps"):
        rates(OptimConfig(warmup_steps=8, total_steps=8), 100)


@pytest.mark.parametrize(("warmup", "steps"), [(5, 5), (800, 20), (1, 0), (1, 1)])
def test_warm_up_longer_than_the_run_is_refused(warmup: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    with pytest.raises(ValueError, match=f"warmup_steps = {warmup} leaves nothing of .* {steps}"):
        create_schedule(optimizer, OptimConfig(warmup_steps=warmup), steps)
