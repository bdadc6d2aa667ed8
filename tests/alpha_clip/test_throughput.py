from types import SimpleNamespace
from typing import Any

import pytest
import torch

import alpha_clip
from alpha_clip.throughput import Throughput, flops_per_region
from alpha_clip.trainable import TrainableConfig


def test_a_step_of_vit_b_16_is_three_forward_passes() -> None:
    model, _, _ = alpha_clip.create_model("ViT-B-16")
    TrainableConfig().apply(model)
    flops = flops_per_region(model)
    # 35.1 GFLOP forward, less five sixths of the last of twelve blocks, which only the class token
    # goes through to the end; the first layer needs no gradient of its input.
    assert flops == pytest.approx(3 * 32.7e9, rel=0.02)


def test_what_is_frozen_costs_less(tiny_name: str) -> None:
    costs = []
    for trainable in (TrainableConfig(), TrainableConfig(last_blocks=1, alpha=False)):
        model, _, _ = alpha_clip.create_model(tiny_name)
        trainable.apply(model)
        costs.append(flops_per_region(model))
    assert costs[1] < 0.6 * costs[0]


def test_what_is_computed_again_does_not_count(tiny_name: str) -> None:
    model, _, _ = alpha_clip.create_model(tiny_name)
    TrainableConfig().apply(model)
    before = flops_per_region(model)
    model.visual.set_grad_checkpointing(True)
    assert flops_per_region(model) == before
    assert model.visual.transformer.grad_checkpointing  # the model itself is left as it was


class Log:
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append({**metrics, "step": step})


def test_speed_is_images_and_regions_a_second(
    tiny_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alpha_clip import throughput

    clock = iter([0.0, 2.0, 2.0, 100.0, 104.0, 104.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(throughput, "get_available_flops", lambda device, dtype: 1e12)
    log, meter = Log(), Throughput()
    model, _, _ = alpha_clip.create_model(tiny_name)
    TrainableConfig().apply(model)
    trainer: Any = SimpleNamespace(
        precision="bf16-mixed",
        log_every_n_steps=2,
        loggers=[log],
        world_size=4,
        global_step=7,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    batch: Any = SimpleNamespace(alphas=torch.zeros(5, 3, 1, 8, 8))
    module: Any = SimpleNamespace(model=model)
    meter.setup(trainer, module, "fit")
    meter.on_train_start(trainer, module)
    for step in range(2):
        meter.on_train_batch_end(trainer, module, None, batch, step)
    meter.on_validation_end(trainer, module)  # its time does not count
    for step in range(2, 4):
        meter.on_train_batch_end(trainer, module, None, batch, step)
    first, second = log.seen
    assert first["speed/images"] == 4 * 10 / 2
    assert first["speed/regions"] == 4 * 30 / 2
    assert first["speed/mfu"] == pytest.approx(30 * flops_per_region(model) / 2 / 1e12)
    assert first["step"] == 7
    assert second["speed/regions"] == 4 * 30 / 4
