"""EVA-CLIP's first giant tower, which is timm's, as the vision tower of transformers' BLIP-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alpha_clip.export.base import refuse_late_alpha
from alpha_clip.export.layouts.stock import StockTower
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import AlphaConv2d

_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def eva_tower(model: AlphaClip) -> StockTower:
    """Describe a tower, or refuse it by name.

    Raises:
        ValueError: If BLIP-2's vision tower does not compute the same.
    """
    refuse_late_alpha(model, "BLIP-2")
    trunk: Any = getattr(model.visual, "trunk", None)
    if trunk is None or not _is_eva(trunk):
        raise ValueError(
            f"{model.name} is no tower that BLIP-2 has: that is EVA-CLIP's first giant, EVA01-g-14 "
            "(timm's Eva with a class token, absolute positions, a norm before each part of a "
            "block, and neither rotary positions nor gates)"
        )
    mlp, attention = trunk.blocks[0].mlp, trunk.blocks[0].attn
    config = {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": attention.num_heads,
        "num_channels": 4,
        "image_size": model.image_size,
        "patch_size": trunk.patch_embed.proj.kernel_size[0],
        "hidden_act": "gelu",
        "layer_norm_eps": trunk.norm.eps,
        "qkv_bias": True,
    }
    return StockTower(
        config_class="Blip2VisionConfig",
        model_class="Blip2VisionModel",
        config=config,
        state=_convert(trunk),
        features="last_hidden_state",
        stem="embeddings.patch_embedding.weight",
        bias="embeddings.patch_embedding.bias",
        positions="embeddings.position_embedding",
        first_patch=1,
    )


def _is_eva(trunk: Any) -> bool:
    """Say whether `Blip2VisionModel` computes the same."""
    stem = getattr(getattr(trunk, "patch_embed", None), "proj", None)
    if type(trunk).__name__ != "Eva" or not isinstance(stem, AlphaConv2d) or stem.bias is None:
        return False
    block = trunk.blocks[0]
    plain = type(block).__name__ == "EvaBlock" and block.gamma_1 is None
    plain = plain and isinstance(block.attn.qkv, nn.Linear) and block.attn.q_bias is not None
    for name in ("q_norm", "k_norm", "norm"):
        plain = plain and isinstance(getattr(block.attn, name, nn.Identity()), nn.Identity)
    act = getattr(block.mlp, "act", None)
    plain = plain and isinstance(act, nn.GELU) and act.approximate == "none"
    plain = plain and isinstance(getattr(block.mlp, "norm", nn.Identity()), nn.Identity)
    plain = plain and trunk.rope is None and trunk.cls_token is not None
    plain = plain and getattr(trunk, "reg_token", None) is None and trunk.pos_embed is not None
    plain = plain and isinstance(getattr(trunk, "norm_pre", nn.Identity()), nn.Identity)
    return plain and isinstance(trunk.norm, nn.LayerNorm) and trunk.global_pool == "token"


def _convert(trunk: Any) -> dict[str, Tensor]:
    """Rename and reshape the weights of a trunk; the projection behind it has no place."""
    state = trunk.state_dict()
    stem = trunk.patch_embed.proj
    out = {
        "embeddings.class_embedding": state["cls_token"],
        "embeddings.position_embedding": state["pos_embed"],
        "embeddings.patch_embedding.weight": torch.cat([stem.weight, stem.weight_alpha], 1),
        "embeddings.patch_embedding.bias": stem.bias,
        **{f"post_layernorm.{p}": state[f"norm.{p}"] for p in ("weight", "bias")},
    }
    for i in range(len(trunk.blocks)):
        ours, theirs = f"blocks.{i}", f"encoder.layers.{i}"
        query, value = state[f"{ours}.attn.q_bias"], state[f"{ours}.attn.v_bias"]
        # Keys have no bias in EVA; BLIP-2 has one packed vector with zeros in their place.
        out[f"{theirs}.self_attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
        out[f"{theirs}.self_attn.qkv.weight"] = state[f"{ours}.attn.qkv.weight"]
        for p in ("weight", "bias"):
            out |= {f"{theirs}.{v}.{p}": state[f"{ours}.{k}.{p}"] for k, v in _BLOCK.items()}
    return {k: v.detach().float().cpu().contiguous().clone() for k, v in out.items()}
