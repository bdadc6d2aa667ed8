"""open_clip's own ViTs as transformers' `CLIPVisionModelWithProjection`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alpha_clip.export.base import refuse_late_alpha
from alpha_clip.export.layouts.stock import StockTower
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import AlphaConv2d

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}


def clip_tower(model: AlphaClip) -> StockTower:
    """Describe a tower, or refuse it by name.

    Raises:
        ValueError: If transformers' CLIP has no such tower.
    """
    refuse_late_alpha(model, "transformers")
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
    count = len(visual.get_submodule("transformer.resblocks"))  # type: ignore[arg-type]
    out |= convert_blocks(state, count, "transformer.resblocks", "vision_model.encoder.layers")
    return {k: v.detach().float().cpu().contiguous().clone() for k, v in out.items()}


def convert_blocks(
    state: Mapping[str, Tensor], count: int, ours: str, theirs: str
) -> dict[str, Tensor]:
    """Rename the blocks of one of open_clip's transformers, and take packed attention apart.

    Args:
        state: Weights of a tower.
        count: Number of blocks.
        ours: What the keys of blocks begin with, there.
        theirs: What they begin with in transformers.
    """
    out = {}
    for i in range(count):
        for p in ("weight", "bias"):
            packed = state[f"{ours}.{i}.attn.in_proj_{p}"].chunk(3)
            for name, tensor in zip(("q_proj", "k_proj", "v_proj"), packed, strict=True):
                out[f"{theirs}.{i}.self_attn.{name}.{p}"] = tensor
            for k, v in _BLOCK.items():
                out[f"{theirs}.{i}.{v}.{p}"] = state[f"{ours}.{i}.{k}.{p}"]
    return out


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
        "hidden_act": _ACTIVATIONS[activation],
        "layer_norm_eps": visual.ln_post.eps,
    }


def text_config(model: AlphaClip) -> dict[str, Any]:
    """Describe the text tower in transformers' words.

    Raises:
        ValueError: If transformers' CLIP has no such text tower.
    """
    text: Any = text_of(model)
    blocks: Any = getattr(getattr(text, "transformer", None), "resblocks", None)
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    plain = blocks is not None and pool in ("argmax", "eos") and text.attn_mask is not None
    plain = plain and isinstance(blocks[0].attn, nn.MultiheadAttention)
    plain = plain and isinstance(blocks[0].ls_1, nn.Identity)
    plain = plain and isinstance(text.text_projection, Tensor)
    plain = plain and getattr(text, "cls_emb", None) is None
    if not plain:
        raise ValueError(
            f"the text tower of {model.name} is none of CLIP's (causal, read at the end of the "
            "text, projected without a bias); export its image tower: --format huggingface"
        )
    vocabulary = text.token_embedding.num_embeddings
    return {
        "hidden_size": text.token_embedding.embedding_dim,
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": len(text.positional_embedding),
        "hidden_act": _ACTIVATIONS[type(blocks[0].mlp.gelu).__name__],
        "layer_norm_eps": text.ln_final.eps,
        "bos_token_id": vocabulary - 2,  # where open_clip's tokenizer has them
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
    }


def convert_text(model: AlphaClip) -> dict[str, Tensor]:
    """Rename and reshape the weights of the text tower, and the logit scale, for `CLIPModel`."""
    text: Any = text_of(model)
    state = text.state_dict()
    out = {
        "logit_scale": model.clip.state_dict()["logit_scale"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_projection.weight": state["text_projection"].T,
        **{f"text_model.final_layer_norm.{p}": state[f"ln_final.{p}"] for p in ("weight", "bias")},
    }
    count = len(text.transformer.resblocks)
    out |= convert_blocks(state, count, "transformer.resblocks", "text_model.encoder.layers")
    return {k: v.detach().float().cpu().contiguous().clone() for k, v in out.items()}


def text_of(model: AlphaClip) -> nn.Module:
    """Return the module that has the text tower's parts: `clip.text`, or `clip` itself."""
    own = getattr(model.clip, "text", None)
    return own if isinstance(own, nn.Module) else model.clip
