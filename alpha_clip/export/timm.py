"""Export to timm: an image tower that `timm.create_model("local-dir:FOLDER")` builds and fills.

Trunks that open_clip took from timm go back to what they were, with four channels. open_clip's own
ViTs become timm's `vit_*_clip_*`, OpenAI's ResNets timm's `resnet*_clip`. The projection becomes
the classifier, so that the model gives CLIP's features; where timm has no place for it (an MLP),
the export gives the trunk's pooled features, and says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from alpha_clip.export.base import (
    ExportReport,
    check_difference,
    fresh_directory,
    largest_difference,
    probe,
    refuse_late_alpha,
)
from alpha_clip.export.model_card import Card
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import RGBA_CHANNELS, AlphaConv2d, fold_alpha

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_NO_NOTES = Card()
_ELSEWHERE = "export it to onnx, torch_export or open_clip"
_CROP_MODES = {"center_crop": "center", "squash": "squash", "pad": "border", "crop_box": "squash"}
_RESNETS = {
    (64, 3, 4, 6, 3): "resnet50_clip",
    (64, 3, 4, 23, 3): "resnet101_clip",
    (80, 4, 6, 10, 6): "resnet50x4_clip",
    (96, 6, 8, 18, 8): "resnet50x16_clip",
    (128, 3, 15, 36, 10): "resnet50x64_clip",
}
_USAGE = """
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()
# the same: timm.create_model("{architecture}", {arguments},
#                             checkpoint_path="model.safetensors")
# rgba: float32 [batch, 4, size, size], normalised
features = model(rgba)  # {what}
"""


@dataclass(frozen=True)
class _Plan:
    """What timm should build, and what belongs into it."""

    architecture: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]
    projected: bool = True


def export(
    model: AlphaClip,
    directory: str | Path,
    overwrite: bool = False,
    tolerance: float = 1e-5,
    card: Card = _NO_NOTES,
) -> ExportReport:
    """Write a model's image tower for timm, and compare the two.

    Args:
        model: What to export; a timm trunk, a plain ViT of open_clip's own or OpenAI's ResNet.
        directory: Folder to write; it appears whole or not at all.
        overwrite: Whether to replace a folder that is there.
        tolerance: Largest difference between features, relative to the largest feature.
        card: What the model card says beyond what the model tells.

    Returns:
        Where it lies and how much it differs.

    Raises:
        ValueError: If timm has no such tower, or the features differ.
    """
    plan, twin = _plan(model)
    twin.load_state_dict(plan.state)
    what = "CLIP's image features" if plan.projected else "pooled, before CLIP's projection"
    if not plan.projected:
        log.warning("timm can't hold %s's projection: the export gives pooled features", model.name)
    with fresh_directory(Path(directory), overwrite) as folder:
        save_file({k: v.contiguous() for k, v in twin.state_dict().items()}, folder / WEIGHTS_FILE)
        record = _config(model, plan, twin)
        (folder / CONFIG_FILE).write_text(json.dumps(record, indent=1) + "\n")
        difference = compare(model, folder)
        check_difference(difference, tolerance)
        arguments = ", ".join(f"{k}={v!r}" for k, v in plan.arguments.items())
        usage = _USAGE.format(architecture=plan.architecture, arguments=arguments, what=what)
        card.write(folder, model, usage, difference)
    return ExportReport(str(directory), difference)


@torch.no_grad()
def compare(model: AlphaClip, directory: str | Path) -> float:
    """Load an export with timm and return its largest difference to `model`.

    The difference is relative to the largest feature, in fp32, over random images with random
    regions. An export without the projection is compared with the tower's pooled features.
    """
    import timm

    theirs = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    ours = deepcopy(model).cpu().float().eval()
    rgba = probe(model)
    features: Tensor = theirs(rgba)
    if theirs.num_classes == 0 and getattr(ours.visual, "head", None):
        return largest_difference(ours.visual.get_submodule("trunk")(rgba), features)
    return largest_difference(ours.encode_image(rgba), features)


def _plan(model: AlphaClip) -> tuple[_Plan, nn.Module]:
    """Say how timm builds the tower, and build it with random weights, or refuse it by name."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    refuse_late_alpha(model, "timm")
    visual: Any = deepcopy(model.visual).cpu().float()
    if any(isinstance(m, AlphaConv2d) for m in visual.modules()):
        fold_alpha(visual)
    if isinstance(visual, TimmModel):
        plans = _trunk_plans(model, visual)
    elif isinstance(visual, VisionTransformer):
        plans = iter([_vit_plan(model, visual)])
    elif isinstance(visual, ModifiedResNet):
        plans = iter([_resnet_plan(model, visual)])
    else:
        raise ValueError(f"timm has no {type(visual).__name__} ({model.name}); {_ELSEWHERE}")
    for plan in plans:
        try:
            twin = _build(plan)
        except (AssertionError, RuntimeError, TypeError, ValueError):  # unknown argument or size
            continue
        plan = _fitted(plan, visual, twin)
        shapes = {k: v.shape for k, v in twin.state_dict().items()}
        if {k: v.shape for k, v in plan.state.items()} == shapes:
            return plan, twin
    raise ValueError(
        f"timm builds no tower that takes the weights of {model.name} "
        f"({type(visual).__name__}); {_ELSEWHERE}"
    )


def _build(plan: _Plan) -> Any:
    import timm

    return timm.create_model(plan.architecture, **plan.arguments).eval()


def _trunk_plans(model: AlphaClip, visual: Any) -> Iterator[_Plan]:
    """Yield ways to build a trunk as open_clip did, the likeliest first."""
    facts, head = model.config["vision_cfg"], dict(visual.head.named_children())
    if "pool" in head:
        raise ValueError(
            f"timm's {facts['timm_model_name']} can't hold the pooling of {model.name}; "
            f"{_ELSEWHERE}"
        )
    linear, pool = head.get("proj"), facts.get("timm_pool", "avg")
    pools: list[dict[str, Any]] = [{"global_pool": pool}] if pool or not head else []
    if head:  # open_clip changed the pooling afterwards, which leaves a ViT's norm where it was
        pools += [{"global_pool": pool, "fc_norm": False}] if pool else []
        pools.append({})
    size = visual.trunk.pretrained_cfg["input_size"][-1]
    sizes: list[dict[str, Any]] = [{}]
    if size != model.image_size:
        sizes.insert(0, {"img_size": model.image_size})
    # A bare trunk gives features as well; it is the last resort.
    classes = [linear.out_features] if linear is not None else []
    classes += [0] if head else [visual.trunk.num_classes]
    state = visual.trunk.state_dict()
    for number, more, again in product(classes, pools, sizes):
        arguments = {"in_chans": RGBA_CHANNELS, "num_classes": number, **more, **again}
        projected = bool(number) or not head
        yield _Plan(facts["timm_model_name"], arguments, state, projected)


def _fitted(plan: _Plan, visual: Any, twin: Any) -> _Plan:
    """Put the projection that open_clip keeps beside a trunk into timm's classifier."""
    head = getattr(visual, "head", None)
    if not head or not plan.projected:
        return plan
    name = twin.pretrained_cfg["classifier"]
    if not isinstance(name, str):
        return plan
    weight, bias = head.proj.weight, head.proj.bias
    bias = torch.zeros(len(weight)) if bias is None else bias
    added = {f"{name}.weight": weight.detach().clone(), f"{name}.bias": bias.detach().clone()}
    return replace(plan, state={**plan.state, **added})


def _vit_plan(model: AlphaClip, visual: Any) -> _Plan:
    """Describe open_clip's own ViT in timm's words, or refuse it by name."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    block = visual.transformer.resblocks[0]
    plain = visual.conv1.bias is None and isinstance(block.attn, nn.MultiheadAttention)
    plain = plain and getattr(visual, "attn_pool", None) is None and visual.pool_type == "tok"
    plain = plain and isinstance(block.ls_1, nn.Identity) and not visual.final_ln_after_pool
    plain = plain and not isinstance(visual.ln_pre, nn.Identity) and visual.proj is not None
    if not plain or visual.ln_post.eps != 1e-5:
        raise ValueError(
            f"{model.name} is a ViT that timm's CLIP towers cannot express (they have a class "
            "token, ln_pre, a projection, and neither attention pooling nor layer scale); "
            f"{_ELSEWHERE}"
        )
    width = visual.conv1.out_channels
    quick = type(block.mlp.gelu).__name__ == "QuickGELU"
    arguments = {
        "img_size": model.image_size,
        "patch_size": visual.conv1.kernel_size[0],
        "embed_dim": width,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / width,
        "num_classes": int(visual.proj.shape[1]),
        "in_chans": RGBA_CHANNELS,
    }
    name = "vit_base_patch32_clip_quickgelu_224" if quick else "vit_base_patch32_clip_224"
    plan = _Plan(name, arguments, {})
    state = {f"visual.{key}": value for key, value in visual.state_dict().items()}
    return replace(plan, state=checkpoint_filter_fn(state, _build(plan)))


def _resnet_plan(model: AlphaClip, visual: Any) -> _Plan:
    """Find timm's name for one of OpenAI's ResNets, or refuse it."""
    from timm.models.byobnet import checkpoint_filter_fn

    layers = [len(getattr(visual, f"layer{i}")) for i in (1, 2, 3, 4)]
    key = (visual.conv1.out_channels * 2, *layers)
    if key not in _RESNETS:
        raise ValueError(
            f"timm has none of {model.name}'s ModifiedResNets (width {key[0]}, layers {layers}); "
            f"{_ELSEWHERE}"
        )
    arguments = {"num_classes": visual.output_dim, "in_chans": RGBA_CHANNELS}
    plan = _Plan(_RESNETS[key], arguments, {})
    if visual.attnpool.positional_embedding.shape[0] != 50 or model.image_size != 224:
        arguments["img_size"] = model.image_size
    state = {f"visual.{key}": value for key, value in visual.state_dict().items()}
    return replace(plan, state=checkpoint_filter_fn(state, _build(plan)))


def _config(model: AlphaClip, plan: _Plan, twin: Any) -> dict[str, Any]:
    """Return what timm's `config.json` says: how to build the model and what it expects."""
    n, size, facts = model.normalisation, model.image_size, twin.pretrained_cfg
    same_size = facts["input_size"][-1] == size
    return {
        "architecture": plan.architecture,
        "num_classes": twin.num_classes,
        "num_features": twin.num_features,
        "model_args": plan.arguments,
        "pretrained_cfg": {
            "num_classes": twin.num_classes,
            "input_size": [RGBA_CHANNELS, size, size],
            "fixed_input_size": bool(facts.get("fixed_input_size")),
            "pool_size": facts.get("pool_size") if same_size else None,
            "crop_pct": 1.0,
            "crop_mode": _CROP_MODES[model.transform.geometry],
            "interpolation": model.transform.interpolation,
            "mean": [*n.mean, n.alpha_mean],
            "std": [*n.std, n.alpha_std],
            # Where it is named, timm 1.0.17 takes it for an RGB kernel and draws it anew.
            "first_conv": None,
            "classifier": facts.get("classifier"),
        },
    }
