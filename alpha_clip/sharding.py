"""Splitting a model over GPUs (FSDP2), for towers whose training state does not fit on one."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from alpha_clip.late_alpha import LateAlpha
from alpha_clip.model import AlphaClip


def shard(model: AlphaClip, mesh: Any) -> None:
    """Split the image tower's weights, gradients and optimizer state over a mesh, in place.

    Each transformer block, or stage, is gathered when it is needed and freed again. The text tower
    is frozen and stays whole on every GPU.

    Args:
        model: The model; a second call changes nothing.
        mesh: A one-dimensional `DeviceMesh`.

    Raises:
        ValueError: If anything outside the image tower trains: its gradients would not be joined.
    """
    tower = model.visual
    inside = {id(parameter) for parameter in tower.parameters()}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if others:
        raise ValueError(
            f"under FSDP only the image tower trains, but {others[0]} and {len(others) - 1} others "
            "do as well; freeze them (trainable.text, trainable.logit_scale), or use ddp"
        )
    if isinstance(tower, FSDPModule):  # done before
        return
    for block in _blocks(tower):
        fully_shard(block, mesh=mesh)
    fully_shard(tower, mesh=mesh)
    if isinstance(tower, LateAlpha):  # called on their own, when regions share an image
        for half in ("image_tokens", "region_features"):
            register_fsdp_forward_method(tower, half)


def join(model: AlphaClip) -> None:
    """Gather all weights on every process until `split`; every process has to call it.

    So each may encode as many batches as it likes: validation data seldom come out even, and a
    forward pass of split weights waits for the other processes.
    """
    for part in _sharded(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def split(model: AlphaClip) -> None:
    """Undo `join`."""
    for part in _sharded(model):
        # The whole tower's own few weights stay between forward and backward, as FSDP has it.
        part.set_reshard_after_forward(part is not model.visual, recurse=False)
        part.reshard()


def _sharded(model: AlphaClip) -> list[Any]:
    return [part for part in model.visual.modules() if isinstance(part, FSDPModule)]


def _blocks(tower: nn.Module) -> list[nn.Module]:
    """Return the parts that are gathered one at a time: what the longest list of layers is of."""
    lists = [list(m) for m in tower.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    even = [part for part in lists if len(part) > 1 and len({type(layer) for layer in part}) == 1]
    kind = type(max(even, key=len)[0]) if even else None
    return [m for m in tower.modules() if type(m) is kind]
