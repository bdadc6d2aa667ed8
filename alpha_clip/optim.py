"""Which parameters learn how fast, and how the rate moves over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from alpha_clip.model import AlphaClip
from alpha_clip.surgery import alpha_parameters


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a rate of its own for the alpha convolution.

    The defaults are the paper's (arXiv 2312.03818, appendix A.1).

    Attributes:
        lr_alpha: Peak rate of the alpha convolution.
        lr: Peak rate of the rest of the image tower, and of the temperature.
        lr_text: Peak rate of the text tower, where it trains; `None` is `lr`.
        weight_decay: Decay of weights; norms, biases and other vectors have none.
        betas: AdamW's averages.
        warmup_steps: Steps over which the rate rises from 0.
        schedule: `cosine` falls to 0 at the end of the run, `constant` stays.
    """

    lr_alpha: float = 2e-4
    lr: float = 2e-6
    lr_text: float | None = None
    weight_decay: float = 2e-2
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"


def parameter_groups(model: AlphaClip, config: OptimConfig) -> list[dict[str, Any]]:
    """Sort the parameters that train into named groups, by rate and by decay.

    Raises:
        ValueError: If nothing trains.
    """
    alpha = {id(p) for p in alpha_parameters(model)}
    image = {id(p) for p in model.visual.parameters()} | {id(model.logit_scale)}
    lr_text = config.lr if config.lr_text is None else config.lr_text
    rates = {"alpha": config.lr_alpha, "image": config.lr, "text": lr_text}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        key = id(parameter)
        part = "alpha" if key in alpha else "image" if key in image else "text"
        decays = parameter.ndim >= 2
        name = part if decays else f"{part}_no_decay"
        decay = config.weight_decay if decays else 0.0
        empty = {"name": name, "params": [], "lr": rates[part], "weight_decay": decay}
        groups.setdefault(name, empty)["params"].append(parameter)
    if not groups:
        raise ValueError("every parameter is frozen; let at least one part of `trainable` learn")
    return list(groups.values())


def create_optimizer(model: AlphaClip, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the parameters of `model` that train."""
    return torch.optim.AdamW(parameter_groups(model, config), betas=config.betas)


def create_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int
) -> LambdaLR:
    """Return the schedule, to be stepped once an optimizer step, over the real length of the run.

    Raises:
        ValueError: If the warm-up is longer than the run.
    """
    if config.warmup_steps >= max(total_steps, 1):
        raise ValueError(
            f"warmup_steps = {config.warmup_steps} leaves nothing of a run of {total_steps} steps"
        )

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return LambdaLR(optimizer, factor)
