"""Which parameters learn how fast, and how the rate moves over a run.

What a parameter is, is declared before training wraps the model: FSDP flattens parameters or turns
them into distributed tensors, and several wrappers change their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from alpha_clip.late_alpha import AlphaSummary
from alpha_clip.lora import lora_parameters
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import alpha_parameters

Part = Literal["alpha", "lora", "image", "text", "logit_scale", "other"]
# What FSDP, torch.compile and activation checkpointing put into names.
_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a rate of its own for the alpha convolution.

    The defaults are the paper's (arXiv 2312.03818, appendix A.1).

    Attributes:
        lr_alpha: Peak rate of the alpha convolution.
        lr: Peak rate of the rest of the image tower, and of the temperature.
        lr_text: Peak rate of the text tower, where it trains; `None` is `lr`.
        lr_lora: Peak rate of low-rank updates, where there are any. They start at zero, so it is
            nearer to alpha's than to that of pre-trained weights.
        weight_decay: Decay of weights; norms, biases and other vectors have none.
        betas: AdamW's averages.
        eps: What AdamW adds to its denominator.
        warmup_steps: Steps over which the rate rises from 0.
        schedule: `cosine` falls to 0 and stays there; `cosine_waves` falls to 0, then rises and
            falls again, as the published script's rate does (SunzeY/AlphaCLIP,
            train/scheduler.py); `constant` stays at the peak.
        total_steps: Step at which the cosine reaches 0, whatever the run's length; `None` is the
            end of the run. The published script has 5000.

    Raises:
        ValueError: If `total_steps` is not above 0, or the schedule has no cosine to end there.
    """

    lr_alpha: float = 2e-4
    lr: float = 2e-6
    lr_text: float | None = None
    lr_lora: float = 1e-4
    weight_decay: float = 2e-2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup_steps: int = 0
    schedule: Literal["cosine", "cosine_waves", "constant"] = "cosine"
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if self.total_steps is not None and (self.total_steps < 1 or self.schedule == "constant"):
            raise ValueError(
                "expected total_steps above 0 and a schedule with a cosine to end there, got "
                f"total_steps = {self.total_steps} and schedule = {self.schedule}; leave "
                "total_steps out for the run's own length"
            )


@dataclass(frozen=True)
class Role:
    """What a parameter is.

    Attributes:
        part: `alpha`, the convolution; `lora`, low-rank updates; `image`, the rest of the image
            tower; `text`, its tower; `logit_scale`, the temperature and SigLIP's bias; `other`,
            what no embedding needs (CoCa's decoder).
        decays: Whether weight decay is for it: not for biases, gains, class tokens and other
            vectors, whatever the number of their axes (as in open_clip, but by shape, where it
            goes by the names of norms). Nor for late alpha's summary, which at alpha's rate would
            be held near zero (0.02 of accuracy on drawn scenes).
    """

    part: Part
    decays: bool


def declare_roles(model: AlphaClip) -> dict[str, Role]:
    """Say what each parameter is; to be asked before anything wraps the model.

    Returns:
        Name in the model -> role.
    """
    alpha = {id(p) for p in alpha_parameters(model)}
    summaries = {id(m.weight_alpha) for m in model.modules() if isinstance(m, AlphaSummary)}
    lora = {id(p) for p in lora_parameters(model)}
    image = {id(p) for p in model.visual.parameters()}
    scales = {id(getattr(model.clip, name, None)) for name in ("logit_scale", "logit_bias")}
    # open_clip's CLIP has the layers of its text tower itself.
    text = {id(p) for p in getattr(model.clip, "text", model.clip).parameters()}

    def part(key: int) -> Part:
        if key in alpha:
            return "alpha"
        if key in lora:
            return "lora"
        if key in image:
            return "image"
        if key in scales:
            return "logit_scale"
        return "text" if key in text else "other"

    roles = {}
    for name, parameter in model.named_parameters():
        extents = sum(size > 1 for size in parameter.shape)
        is_bias = "bias" in name.rsplit(".", 1)[-1]
        found = part(id(parameter))
        is_weight = extents >= 2 and not is_bias and found != "logit_scale"
        decays = is_weight and id(parameter) not in summaries
        roles[name] = Role(found, decays or found == "lora")  # of rank 1, too
    return roles


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    roles: dict[str, Role],
    config: OptimConfig,
) -> list[dict[str, Any]]:
    """Sort the parameters that train into named groups, by rate and by decay.

    Args:
        named_parameters: The model's, wrapped or not. Under FSDP1 with `use_orig_params=True`.
        roles: What `declare_roles` said of the model before it was wrapped.
        config: Rates and decay.

    Returns:
        Groups as `torch.optim` takes them. `name` is the part; `_no_decay` follows where only some
        of a part decays.

    Raises:
        ValueError: If nothing trains, or a parameter has no role.
    """
    lr_text = config.lr if config.lr_text is None else config.lr_text
    rates = {"alpha": config.lr_alpha, "lora": config.lr_lora, "text": lr_text}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        role = _role(name, roles)
        decays = role.decays
        group = role.part if decays or role.part == "logit_scale" else f"{role.part}_no_decay"
        decay = config.weight_decay if decays else 0.0
        lr = rates.get(role.part, config.lr)
        empty = {"name": group, "params": [], "lr": lr, "weight_decay": decay}
        groups.setdefault(group, empty)["params"].append(parameter)
    if not groups:
        raise ValueError("every parameter is frozen; let at least one part of `trainable` learn")
    return list(groups.values())


def _role(name: str, roles: dict[str, Role]) -> Role:
    own = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    if own not in roles:
        raise ValueError(
            f"nothing was declared of the parameter {name}; call declare_roles when the model is "
            "complete, before it is wrapped, and use FSDP with use_orig_params=True"
        )
    return roles[own]


def create_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    roles: dict[str, Role],
    config: OptimConfig,
) -> torch.optim.AdamW:
    """Return AdamW over the parameters that train; see `parameter_groups`."""
    groups = parameter_groups(named_parameters, roles, config)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)


def create_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, run_steps: int
) -> LambdaLR:
    """Return the schedule, to be stepped once an optimizer step.

    Args:
        optimizer: Whose groups have the peak rates.
        config: The shape of the schedule.
        run_steps: Real length of the run, in optimizer steps.

    Raises:
        ValueError: If the warm-up is longer than the run, or than the cosine where that is given.
    """
    total = run_steps if config.total_steps is None else config.total_steps
    if config.warmup_steps >= max(total, 1):
        raise ValueError(
            f"warmup_steps = {config.warmup_steps} leaves nothing of a run of {total} steps"
        )

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
        if config.schedule == "cosine":
            done = min(done, 1.0)
        return 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)
