"""The published layout of Alpha-CLIP weights, and OpenAI's: names, LoRA, the shape of the model.

In the published layout a tower has `conv1_alpha.weight` and `attn.in_proj.weight`
(SunzeY/AlphaCLIP, alpha_clip/model.py) where ours, with open_clip's names, has `conv1.weight_alpha`
and `attn.in_proj_weight`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from alpha_clip.surgery import RGBA_CHANNELS, AlphaConv2d

PUBLISHED_ALPHA = "conv1_alpha.weight"
OWN_ALPHA = ".weight_alpha"


def merge_lora(state: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Add `loralib` weights to the layers that they adapt: `W + B A / r`.

    The published training script builds its layers with `lora_alpha = 1`, and adapts the query and
    the value rows of the joint projection `in_proj` (`enable_lora=[True, False, True]`).

    Args:
        state: A state dict; `lora_A` and `lora_B` stand beside the `weight` they adapt.
        origin: Where it comes from, for messages.

    Returns:
        A state dict without LoRA weights.

    Raises:
        ValueError: If a part is missing or the shapes do not fit together.
    """
    state = dict(state)
    for key in [k for k in state if k.endswith(".lora_A")]:
        layer = key.removesuffix(".lora_A")
        down, up = state.pop(key).float(), state.pop(f"{layer}.lora_B", torch.empty(0, 0)).float()
        weight = state.get(f"{layer}.weight", torch.empty(0, 0))
        rank = up.shape[1]
        if rank and down.shape[0] == rank and up.shape[0] == weight.shape[0]:
            change = up @ down
        elif rank and down.shape[0] == 2 * rank and 2 * weight.shape[0] == 3 * up.shape[0]:
            query, value = (b @ a for b, a in zip(up.chunk(2), down.chunk(2), strict=True))
            change = torch.cat([query, torch.zeros_like(query), value])
        else:
            raise ValueError(
                f"the LoRA weights of {layer} in {origin} do not fit: lora_A "
                f"{list(down.shape)}, lora_B {list(up.shape)}, weight {list(weight.shape)}"
            )
        state[f"{layer}.weight"] = weight.float() + change / rank
    return state


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict from the published layout; names of the text tower stay."""
    return {_ours(key): value for key, value in state.items()}


def to_published(visual: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of an alpha tower in the published layout.

    Args:
        visual: A ViT or ModifiedResNet of OpenAI's kind with an alpha channel.

    Returns:
        What the paper's package loads with `model.visual.load_state_dict`.

    Raises:
        ValueError: If the published code has no such tower.
    """
    state = visual.state_dict()
    if (
        f"conv1{OWN_ALPHA}" not in state
        or ("proj" not in state and "attnpool.c_proj.weight" not in state)
        or any(key.startswith("attn_pool.") for key in state)
    ):
        raise ValueError(
            "the published layout holds OpenAI's ViT or ModifiedResNet with an alpha channel kept "
            f"apart, not this {type(visual).__name__}; use save_checkpoint"
        )
    return {
        key.replace(f"conv1{OWN_ALPHA}", PUBLISHED_ALPHA).replace(
            "attn.in_proj_", "attn.in_proj."
        ): (value.detach().cpu().contiguous().clone())
        for key, value in state.items()
    }


def _ours(key: str) -> str:
    """Translate one name; `visual.` in front or not."""
    if key.removeprefix("visual.") == PUBLISHED_ALPHA:
        return key.replace(PUBLISHED_ALPHA, f"conv1{OWN_ALPHA}")
    return key.replace(".attn.in_proj.", ".attn.in_proj_")


def split_folded(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `fold_alpha` in a state dict, for a module whose stems keep RGB and alpha apart."""
    state = dict(state)
    for name, layer in module.named_modules():
        key = f"{name}.weight"
        folded = state.get(key)
        if not isinstance(layer, AlphaConv2d) or folded is None or folded.ndim != 4:
            continue
        if folded.shape[1] == RGBA_CHANNELS and f"{name}{OWN_ALPHA}" not in state:
            state[key], state[f"{name}{OWN_ALPHA}"] = folded[:, :3], folded[:, 3:]
    return state


def infer_config(state: dict[str, Tensor], origin: str) -> dict[str, Any]:
    """Work out open_clip's model config from weights in OpenAI's layout.

    The shapes say everything but the number of heads, which is width / 64 in all of OpenAI's
    towers, and the activation, which is QuickGELU there.

    Args:
        state: Both towers, in open_clip's names.
        origin: Where they come from, for messages.

    Raises:
        ValueError: If they are not in OpenAI's layout.
    """
    try:
        text_width = state["ln_final.weight"].shape[0]
        return {
            "embed_dim": state["text_projection"].shape[1],
            "quick_gelu": True,
            "vision_cfg": _vision_config(state),
            "text_cfg": {
                "context_length": state["positional_embedding"].shape[0],
                "vocab_size": state["token_embedding.weight"].shape[0],
                "width": text_width,
                "heads": text_width // 64,
                "layers": _count(state, r"transformer\.resblocks\.(\d+)\."),
            },
        }
    except KeyError as error:
        raise ValueError(
            f"{origin} is not a whole CLIP in OpenAI's layout ({error} is missing); name "
            "the architecture it belongs to"
        ) from error


def _vision_config(state: dict[str, Tensor]) -> dict[str, Any]:
    conv1 = state["visual.conv1.weight"]
    if "visual.proj" in state:
        grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        return {
            "image_size": grid * conv1.shape[-1],
            "layers": _count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
            "width": conv1.shape[0],
            "patch_size": conv1.shape[-1],
        }
    grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_size": grid * 32,
        "layers": [_count(state, rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4)],
        "width": state["visual.layer1.0.conv1.weight"].shape[0],
        "patch_size": None,
    }


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.match(pattern, key))})
