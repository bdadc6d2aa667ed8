import math

import pytest
import torch

import alpha_clip
from alpha_clip.model import AlphaClip
from alpha_clip.optim import OptimConfig, create_optimizer, create_schedule, parameter_groups
from alpha_clip.surgery import alpha_parameters


@pytest.fixture
def learner(tiny_name: str) -> AlphaClip:
    return alpha_clip.create_model(tiny_name)[0]


def test_groups_have_their_rates_and_decays(learner: AlphaClip) -> None:
    config = OptimConfig(lr_alpha=3.0, lr=2.0, lr_text=1.0, weight_decay=0.5)
    groups = {g["name"]: g for g in parameter_groups(learner, config)}
    settings = {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert settings == {
        "alpha": (3.0, 0.5),
        "image": (2.0, 0.5),
        "image_no_decay": (2.0, 0.0),
        "text": (1.0, 0.5),
        "text_no_decay": (1.0, 0.0),
    }
    members = {name: {id(p) for p in g["params"]} for name, g in groups.items()}
    assert members["alpha"] == {id(p) for p in alpha_parameters(learner)}
    visual = {id(p) for p in learner.visual.parameters()}
    assert members["image"] | members["image_no_decay"] | members["alpha"] == visual | {
        id(learner.logit_scale)
    }
    assert id(learner.logit_scale) in members["image_no_decay"]
    assert all(p.ndim < 2 for n, g in groups.items() if "no_decay" in n for p in g["params"])
    assert all(p.ndim >= 2 for n, g in groups.items() if "no_decay" not in n for p in g["params"])


def test_every_parameter_is_in_one_group(learner: AlphaClip) -> None:
    grouped = [id(p) for g in parameter_groups(learner, OptimConfig()) for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in learner.parameters()}


def test_text_learns_as_the_image_does_unless_said_otherwise(learner: AlphaClip) -> None:
    rates = {g["name"]: g["lr"] for g in parameter_groups(learner, OptimConfig(lr=7.0))}
    assert rates["text"] == rates["image"] == 7.0
    rates = {
        g["name"]: g["lr"] for g in parameter_groups(learner, OptimConfig(lr=7.0, lr_text=0.0))
    }
    assert rates["text"] == 0.0


def test_frozen_parameters_are_left_out(learner: AlphaClip) -> None:
    learner.requires_grad_(False)
    for parameter in alpha_parameters(learner):
        parameter.requires_grad_(True)
    (group,) = parameter_groups(learner, OptimConfig())
    assert group["name"] == "alpha"
    learner.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        parameter_groups(learner, OptimConfig())


def test_the_defaults_are_the_papers() -> None:
    config = OptimConfig()
    assert (config.lr_alpha, config.lr, config.weight_decay) == (2e-4, 2e-6, 2e-2)
    assert config.schedule == "cosine"


def test_the_optimizer_takes_the_groups(learner: AlphaClip) -> None:
    optimizer = create_optimizer(learner, OptimConfig(betas=(0.8, 0.9)))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {g["name"] for g in optimizer.param_groups} >= {"alpha", "image"}
    assert all(g["betas"] == (0.8, 0.9) for g in optimizer.param_groups)


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


@pytest.mark.parametrize(("warmup", "steps"), [(5, 5), (800, 20), (1, 0), (1, 1)])
def test_warm_up_longer_than_the_run_is_refused(warmup: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    with pytest.raises(ValueError, match=f"warmup_steps = {warmup} leaves nothing of .* {steps}"):
        create_schedule(optimizer, OptimConfig(warmup_steps=warmup), steps)
