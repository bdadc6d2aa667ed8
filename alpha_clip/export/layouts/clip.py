"""open_clip's own ViTs as transformers' `CLIPVisionModelWithProjection`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alpha_clip.export.layouts.stock import StockTower
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import AlphaConv2d


def clip_tower(model: AlphaClip) -> StockTower:
    """Describe a tower, or refuse it by name.

    Raises:
        ValueError: If transformers' CLIP has no such tower.
    """
    config = _config(model)
    return StockTower(
        config_class="CLIPVisionConfig",
        model_class="CLIPVisionModelWithProjection",
        config=config,
        state=convert_state_dict(model.visual),
        features="image_embeds",
        stem="vision_model.embeddings.patch_embedding.weight",
        bias=None,
        positions="vision_model.embeddings.position_embedding.weight",
        first_patch=1,
    )


def convert_state_dict(visual: nn.Module) -> dict[str, Tensor]:
    """Rename and reshape an alpha ViT's weights for `CLIPVisionModelWithProjection`."""
    stem: AlphaConv2d = visual.get_submodule("conv1")  # type: ignore[assignment]
    state = visual.state_dict()
    out = {
        "vision_model.embeddings.class_embedding": state["class_embedding"],
        "vision_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": torch.cat(
            [stem.weight, stem.weight_alpha], 1
        ),
        "visual_projection.weight": state["proj"].T,
    }
    # transformers spells it so
    norms = {"ln_pre": "vision_model.pre_layrnorm", "ln_post": "vision_model.post_layernorm"}
    for ours, theirs in norms.items():
        out.update({f"{theirs}.{p}": state[f"{ours}.{p}"] for p in ("weight", "bias")})
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    blocks: Any = visual.get_submodule("transformer.resblocks")
    for i in range(len(blocks)):
        ours, theirs = f"transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
        for p in ("weight", "bias"):
            packed = state[f"{ours}.attn.in_proj_{p}"].chunk(3)
            for name, tensor in zip(("q_proj", "k_proj", "v_proj"), packed, strict=True):
                out[f"{theirs}.self_attn.{name}.{p}"] = tensor
            out.update({f"{theirs}.{v}.{p}": state[f"{ours}.{k}.{p}"] for k, v in parts.items()})
    return {k: v.detach().float().contiguous().clone() for k, v in out.items()}


def _config(model: AlphaClip) -> dict[str, Any]:
    """Describe the tower in transformers' words, or refuse it by name."""
    from open_clip.transformer import VisionTransformer

    visual: Any = model.visual
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"transformers' CLIP has no {type(visual).__name__} ({model.name}); export it to "
            "another target"
        )
    block = visual.transformer.resblocks[0]
    plain = isinstance(visual.conv1, AlphaConv2d) and visual.conv1.bias is None
    plain = plain and isinstance(block.attn, nn.MultiheadAttention)
    plain = plain and getattr(visual, "attn_pool", None) is None and visual.pool_type == "tok"
    plain = plain and isinstance(block.ls_1, nn.Identity) and not visual.final_ln_after_pool
    plain = plain and not isinstance(visual.ln_pre, nn.Identity) and visual.proj is not None
    if not plain:
        raise ValueError(
            f"{model.name} is a ViT that transformers' CLIP cannot express (it needs a class "
            "token, ln_pre, a projection, and neither attention pooling nor layer scale)"
        )
    activation = type(block.mlp.gelu).__name__
    return {
        "hidden_size": visual.conv1.out_channels,
        "intermediate_size": block.mlp.c_fc.out_features,
        "projection_dim": int(visual.proj.shape[1]),
        "num_hidden_layers": len(visual.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "num_channels": 4,
        "image_size": model.image_size,
        "patch_size": visual.conv1.kernel_size[0],
        "hidden_act": {"QuickGELU": "quick_gelu", "GELU": "gelu"}[activation],
        "layer_norm_eps": visual.ln_post.eps,
    }
