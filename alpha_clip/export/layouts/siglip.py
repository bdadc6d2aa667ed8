"""SigLIP's image towers, 1 and 2, which are timm's, as transformers' `SiglipVisionModel`."""

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
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HEAD = {"attn_pool.norm": "head.layernorm", "attn_pool.mlp.fc1": "head.mlp.fc1"}
_HEAD |= {"attn_pool.mlp.fc2": "head.mlp.fc2", "attn_pool.proj": "head.attention.out_proj"}


def siglip_tower(model: AlphaClip) -> StockTower:
    """Describe a tower, or refuse it by name.

    Raises:
        ValueError: If it is none of SigLIP's.
    """
    refuse_late_alpha(model, "transformers")
    trunk: Any = getattr(model.visual, "trunk", None)
    if trunk is None or not _is_siglip(model.visual, trunk):
        raise ValueError(
            f"{model.name} is no SigLIP tower: those are timm's plain ViTs with attention pooling, "
            "without class token and projection"
        )
    mlp, attention = trunk.blocks[0].mlp, trunk.blocks[0].attn
    tanh = "Tanh" in type(mlp.act).__name__ or getattr(mlp.act, "approximate", "none") == "tanh"
    config = {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": attention.num_heads,
        "num_channels": 4,
        "image_size": model.image_size,
        "patch_size": trunk.patch_embed.proj.kernel_size[0],
        "hidden_act": "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": trunk.norm.eps,
    }
    return StockTower(
        config_class="SiglipVisionConfig",
        model_class="SiglipVisionModel",
        config=config,
        state=_convert(trunk),
        features="pooler_output",
        stem="embeddings.patch_embedding.weight",
        bias="embeddings.patch_embedding.bias",
        positions="embeddings.position_embedding.weight",
        first_patch=0,
    )


def _is_siglip(visual: Any, trunk: Any) -> bool:
    """Say whether `SiglipVisionModel` computes the same."""
    stem = getattr(getattr(trunk, "patch_embed", None), "proj", None)
    pool = getattr(trunk, "attn_pool", None)
    if not isinstance(stem, AlphaConv2d) or stem.bias is None or pool is None:
        return False
    block = trunk.blocks[0]
    plain = all(hasattr(block, name) for name in ("norm1", "attn", "norm2", "mlp"))
    attention: Any = getattr(block, "attn", None)
    plain = plain and isinstance(getattr(attention, "qkv", None), nn.Linear)
    for module in (attention, pool):
        for norm in ("q_norm", "k_norm"):
            plain = plain and isinstance(getattr(module, norm, nn.Identity()), nn.Identity)
    plain = plain and isinstance(getattr(block, "ls1", nn.Identity()), nn.Identity)
    plain = plain and trunk.cls_token is None and isinstance(trunk.norm_pre, nn.Identity)
    plain = plain and isinstance(trunk.fc_norm, nn.Identity) and pool.latent.shape[1] == 1
    plain = plain and pool.num_heads == attention.num_heads and pool.pos_embed is None
    return plain and not list(visual.head.parameters()) and isinstance(trunk.head, nn.Identity)


def _convert(trunk: Any) -> dict[str, Tensor]:
    """Rename and reshape the weights of a trunk."""
    state = trunk.state_dict()
    stem = trunk.patch_embed.proj
    out = {
        "embeddings.patch_embedding.weight": torch.cat([stem.weight, stem.weight_alpha], 1),
        "embeddings.patch_embedding.bias": stem.bias,
        "embeddings.position_embedding.weight": state["pos_embed"][0],
        "head.probe": state["attn_pool.latent"],
    }
    for p in ("weight", "bias"):
        out[f"post_layernorm.{p}"] = state[f"norm.{p}"]
        packed = [state[f"attn_pool.{name}.{p}"] for name in ("q", "kv")]
        out[f"head.attention.in_proj_{p}"] = torch.cat(packed)
        out |= {f"{theirs}.{p}": state[f"{ours}.{p}"] for ours, theirs in _HEAD.items()}
        for i in range(len(trunk.blocks)):
            ours, theirs = f"blocks.{i}", f"encoder.layers.{i}"
            parts = state[f"{ours}.attn.qkv.{p}"].chunk(3)
            for name, tensor in zip("qkv", parts, strict=True):
                out[f"{theirs}.self_attn.{name}_proj.{p}"] = tensor
            out |= {f"{theirs}.{v}.{p}": state[f"{ours}.{k}.{p}"] for k, v in _BLOCK.items()}
    return {k: v.detach().float().cpu().contiguous().clone() for k, v in out.items()}
