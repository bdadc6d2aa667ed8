"""FSDP2 on two processes of the CPU: the same step as one process, with half the weights each."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_surgery_towers import build
from torch import multiprocessing as mp

import alpha_clip
from alpha_clip.lora import LoraConfig
from alpha_clip.many_regions import encode_many
from alpha_clip.optim import OptimConfig, create_optimizer, declare_roles
from alpha_clip.sharding import _blocks, join, shard, split
from alpha_clip.trainable import TrainableConfig

RATES = OptimConfig(lr_alpha=1e-2, lr=1e-2, lr_lora=1e-2, weight_decay=0.1)
RECIPES = {
    "all": TrainableConfig(),
    "lora": TrainableConfig(lora=LoraConfig(rank=2)),
    "late alpha": TrainableConfig(),
}


def trained(name: str, recipe: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Take two steps; return the image tower's weights, joined."""
    torch.manual_seed(0)
    block = 2 if recipe == "late alpha" else 0
    model, _, _ = alpha_clip.create_model(name, alpha_block=block)
    RECIPES[recipe].apply(model)
    roles = declare_roles(model)
    if world > 1:
        mesh = torch.distributed.init_device_mesh("cpu", (world,))
        shard(model, mesh)
        shard(model, mesh)  # again: nothing
        weight = dict(model.visual.named_parameters())["proj"]
        assert weight.to_local().shape[0] * world == weight.shape[0]
    optimizer = create_optimizer(model.named_parameters(), roles, RATES)
    size = model.image_size
    join(model)  # validation: the second process has nothing to do, and the first does not wait
    if rank == 0:
        with torch.no_grad():
            ones, halves = torch.ones(2, 4, size, size), torch.full((1, 4, size, size), 0.5)
            validated = [model.encode_image(rgba) for rgba in (ones, halves, ones)]
        assert torch.equal(validated[0], validated[2])
    split(model)
    for step in range(2):
        torch.manual_seed(step)
        rgba, target = torch.randn(4, 4, size, size), torch.randn(4, 4)
        rgb, alpha = rgba.chunk(world)[rank].split([3, 1], 1)
        # What a training step calls: with late alpha its two halves, each on its own.
        mine = encode_many(model.visual, rgb, alpha[:, None], chunk=4).flatten(0, 1)
        mine = F.normalize(mine, dim=-1)
        F.mse_loss(mine, target[:, :1].expand(4, mine.shape[1]).chunk(world)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {k: v for k, v in model.visual.state_dict().items()}
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def _process(rank: int, world: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    result = {recipe: trained(name, recipe, rank, world) for recipe in RECIPES}
    if rank == 0:
        torch.save(result, f"{folder}/sharded.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tiny_name: str, tmp_path: Path) -> None:
    mp.spawn(_process, (2, tiny_name, str(tmp_path)), nprocs=2)
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)
    for recipe in RECIPES:
        alone = trained(tiny_name, recipe, 0, 1)
        assert alone.keys() == sharded[recipe].keys()
        for name, value in alone.items():
            torch.testing.assert_close(sharded[recipe][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("name", "count"),
    [("ViT-B-16", 12), ("ViT-B-16-SigLIP", 12), ("convnext_base", 36), ("RN50", 16)],
)
def test_blocks_are_gathered_one_at_a_time(name: str, count: int) -> None:
    assert len(_blocks(build(name))) == count


def test_only_the_image_tower_may_train(tiny_name: str) -> None:
    model, _, _ = alpha_clip.create_model(tiny_name)
    TrainableConfig(text=True).apply(model)
    with pytest.raises(ValueError, match="under FSDP only the image tower trains"):
        shard(model, None)
