"""Low-rank updates in the blocks of an image tower (LoRA, arXiv 2106.09685), by peft.

peft's own layer for `nn.MultiheadAttention` replaces the frozen weights in every pass, by the sum
and by the difference with the update: they drift by rounding, and neither FSDP nor torch.compile
follows. It drops nothing where dropout is asked for, and counts the update of `out_proj` twice
(0.21, huggingface/peft pull request 3774). So attention first gets its projections as layers.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from alpha_clip.blocks import group_by_block
from alpha_clip.layouts import from_published

_ADAPTED = re.compile(r"(.+)\.lora_A\.[^.]+\.weight")


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get a low-rank update, and of which rank: `W + alpha / rank * B A`.

    Attributes:
        rank: Rows of A, and columns of B.
        alpha: Strength of the update.
        dropout: Share of the update's input that is dropped in training, within 0..1.
        targets: Names of linear layers in the tower's blocks, or their ends: `in_proj`,
            `out_proj`, `c_fc` and `c_proj` in open_clip's own ViT, `qkv`, `proj`, `fc1`, `fc2` in
            most of timm's. `None` is every linear layer of the blocks: attention and MLP.

    Raises:
        ValueError: If a value is out of its range.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        sound = self.rank >= 1 and self.alpha > 0 and 0 <= self.dropout < 1
        if not sound or self.targets == []:
            raise ValueError(
                "expected LoRA of rank >= 1, alpha > 0, dropout within 0..1 and at least one "
                f"target (or none named, for all), got {self}"
            )


class LayeredAttention(nn.Module):
    """What `nn.MultiheadAttention` computes within one sequence, with layers for its projections.

    Args:
        attention: What to take the weights from; they are shared.

    Raises:
        ValueError: If it does more than open_clip's image towers ask of it.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        weight, out = attention.in_proj_weight, attention.out_proj
        extras = attention.bias_k is not None or attention.add_zero_attn or attention.dropout
        if weight is None or extras or not attention.batch_first:
            raise ValueError(
                "LoRA needs attention over [batch, tokens, width] with one width, no dropout and "
                f"no extra tokens, got {attention}; name other layers in `targets`"
            )
        self.num_heads = attention.num_heads
        self.in_proj, self.out_proj = (
            nn.Linear(w.shape[1], w.shape[0], device="meta") for w in (weight, out.weight)
        )
        self.in_proj.weight, self.in_proj.bias = weight, attention.in_proj_bias
        self.out_proj.weight, self.out_proj.bias = out.weight, out.bias
        self.train(attention.training)

    def forward(
        self,
        query: Float[Tensor, "batch tokens width"],
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch tokens width"], None]:
        """Attend to the tokens of `query`; the other arguments are the original's."""
        heads = self.in_proj(query).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def add_lora(visual: nn.Module, config: LoraConfig) -> nn.Module:
    """Give the linear layers of a tower low-rank updates, in place; all other weights freeze.

    The updates are zero at first: the tower computes what it computed before. Parameters keep
    their identity, not their names; `merge_lora` gives back the tower's own.

    Args:
        visual: An open_clip image tower, or a timm model.
        config: Which layers, and of which rank.

    Returns:
        The same tower.

    Raises:
        ValueError: If no layer, or none of a named kind, is there to adapt, or the tower has
            updates already.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    if lora_parameters(visual):
        raise ValueError(f"{type(visual).__name__} has low-rank updates already; add them once")
    chosen = _choose(visual, config.targets)
    for name, layer in list(visual.named_modules()):
        inside = {f"{name}.in_proj", f"{name}.out_proj"} & set(chosen)
        if isinstance(layer, nn.MultiheadAttention) and inside:
            visual.set_submodule(name, LayeredAttention(layer))
        if f"{name}.qkv" in chosen and hasattr(layer, "qkv_bias_separate"):
            # timm's EVA-01 would read the layer's weight and never call it.
            layer.qkv_bias_separate = True
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=chosen,
    )
    inject_adapter_in_model(peft_config, visual)
    return visual


def _choose(visual: nn.Module, targets: list[str] | None) -> list[str]:
    """Return the names, after the change of attention, of the layers to adapt."""
    inside = {name for block in group_by_block(visual).blocks for name in block}
    found: list[str] = []
    for name, layer in visual.named_modules():
        if isinstance(layer, nn.MultiheadAttention) and f"{name}.out_proj.weight" in inside:
            found.append(f"{name}.in_proj")  # its out_proj is a layer already
        elif isinstance(layer, nn.Linear) and f"{name}.weight" in inside:
            found.append(name)
    tower = type(getattr(visual, "trunk", visual)).__name__
    if not found:
        raise ValueError(
            f"the blocks of {tower} have no linear layer that LoRA could adapt; train the whole "
            "tower, its last blocks, or alpha alone"
        )
    if targets is None:
        return found
    chosen = {t: [n for n in found if n == t or n.endswith(f".{t}")] for t in targets}
    if missing := [target for target, names in chosen.items() if not names]:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in found})
        raise ValueError(
            f"the blocks of {tower} have no linear layer called {', '.join(missing)}; expected "
            f"some of {', '.join(kinds)}"
        )
    return [name for name in found if any(name in names for names in chosen.values())]


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model that low-rank updates added."""
    if "peft" not in sys.modules:  # then nothing can be peft's; the import alone takes seconds
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    parts = [getattr(m, name) for m in layers for name in m.adapter_layer_names]
    return [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]


def merge_lora(state: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Add low-rank updates to the weights they belong to, under the tower's own names.

    Args:
        state: A state dict after `add_lora`: of a tower, or of a model around it.
        config: What the updates were made with.

    Returns:
        What loads into the tower before `add_lora`; `state` itself where it has no updates.

    Raises:
        ValueError: If a part is missing, or of another rank than `config` says.
    """
    layers = {m[1]: key for key in state if (m := _ADAPTED.fullmatch(key))}
    if not layers:
        return state
    merged = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
    for layer, key in layers.items():
        down, up = state[key], state.get(key.replace(".lora_A.", ".lora_B."))
        weight = merged.get(f"{layer}.weight")
        if weight is None or up is None or not down.shape[0] == up.shape[1] == config.rank:
            shapes = [None if t is None else list(t.shape) for t in (weight, down, up)]
            raise ValueError(
                f"expected {layer} to have a weight and updates of rank {config.rank}, got weight, "
                f"A and B of {shapes}; merge with the LoraConfig of the training run"
            )
        change = (config.alpha / config.rank) * (up.float() @ down.float())
        merged[f"{layer}.weight"] = (weight.float() + change).to(weight.dtype)
    return from_published(merged)  # the published layout's attention is layered, too
