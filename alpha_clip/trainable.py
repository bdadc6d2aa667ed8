"""Which parameters learn: alpha, the image tower or a part of it, low-rank updates, the text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from alpha_clip.blocks import group_by_block
from alpha_clip.lora import LoraConfig, add_lora
from alpha_clip.model import AlphaClip
from alpha_clip.optim import declare_roles


@dataclass(frozen=True)
class TrainableConfig:
    """Which parts learn. The paper trains alpha and all visual blocks (Table 6).

    Attributes:
        alpha: The alpha convolution; without it the model is a plain CLIP.
        visual: The rest of the image tower: all of its own weights, unless one of the next two
            says how it adapts.
        last_blocks: Of the image tower's own weights only those of the last so many blocks, and of
            what follows them: final norm, pooling, projection.
        lora: Low-rank updates in the image tower's blocks. Its own weights are all frozen then.
        text: The text tower.
        logit_scale: The temperature, kept within 1..100, and SigLIP's bias where there is one.

    Raises:
        ValueError: If `last_blocks` is below 1, or is asked for together with `lora`, or either
            without `visual`.
    """

    alpha: bool = True
    visual: bool = True
    last_blocks: int | None = None
    lora: LoraConfig | None = None
    text: bool = False
    logit_scale: bool = False

    def __post_init__(self) -> None:
        if self.last_blocks is not None and self.last_blocks < 1:
            raise ValueError(
                f"expected last_blocks to be 1 or more, got {self.last_blocks}; leave it out for "
                "the whole image tower, or set visual to false for none of it"
            )
        if self.last_blocks is not None and self.lora is not None:
            raise ValueError(
                f"last_blocks = {self.last_blocks} trains the tower's own weights, lora freezes "
                "them; leave one of the two out"
            )
        if not self.visual and (self.last_blocks is not None or self.lora is not None):
            asked = "lora" if self.last_blocks is None else "last_blocks"
            raise ValueError(
                f"visual = false freezes the image tower, {asked} says how it learns; set visual "
                f"to true, or leave {asked} out"
            )

    def apply(self, model: AlphaClip) -> None:
        """Freeze what does not learn, add low-rank updates, and set the modes for training.

        Frozen parts are in eval mode: their dropout is off and their BatchNorm keeps its
        statistics. To be called once, before anything wraps the model.

        Args:
            model: A model as `create_model` gives it.

        Raises:
            ValueError: If the tower has fewer blocks than `last_blocks`, nobody knows where they
                are, or LoRA finds no layer to adapt.
        """
        if self.lora is not None:
            add_lora(model.visual, self.lora)
        learns = {
            "alpha": self.alpha,
            "lora": True,
            "image": self.visual and self.last_blocks is None and self.lora is None,
            "text": self.text,
            "logit_scale": self.logit_scale,
            "other": False,
        }
        for name, role in declare_roles(model).items():
            model.get_parameter(name).requires_grad_(learns[role.part])
        if self.last_blocks is not None:
            self._unfreeze_last(model.visual, self.last_blocks)
        model.train(self.text)
        model.visual.train(self.visual)
        for module in model.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()

    def _unfreeze_last(self, visual: nn.Module, count: int) -> None:
        tower = group_by_block(visual)
        if count > len(tower.blocks):
            raise ValueError(
                f"{type(getattr(visual, 'trunk', visual)).__name__} has {len(tower.blocks)} "
                f"blocks, fewer than last_blocks = {count}"
            )
        for name in [n for block in tower.blocks[-count:] for n in block] + tower.head:
            visual.get_parameter(name).requires_grad_(True)
