"""A tower in transformers' words: which stock class, its config, its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StockTower:
    """An image tower as transformers has it.

    Attributes:
        config_class: Name of the config's class.
        model_class: Name of the model's class.
        config: Arguments of the config.
        state: Weights, fp32, on the CPU; the patch embedding has four channels.
        features: Attribute of the model's output that holds the features.
        stem: Key of the patch embedding's kernel.
        bias: Key of its bias, if the class has one.
        positions: Key of the position embeddings.
        first_patch: Position of the first patch: 1 behind a class token.
    """

    config_class: str
    model_class: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    features: str
    stem: str
    bias: str | None
    positions: str
    first_patch: int

    def seeing_everything(self, whole_image: float) -> StockTower:
        """Return a tower of three channels that takes all of every image for the region.

        Patches do not overlap the edge, so that a constant alpha adds the same to each of them: to
        the bias where there is one, else to their position embeddings. Nothing is approximated.

        Args:
            whole_image: Alpha of the whole image, normalised.
        """
        kernel = self.state[self.stem]
        constant = whole_image * kernel[:, 3:].double().sum((1, 2, 3))
        state = {**self.state, self.stem: kernel[:, :3].contiguous()}
        if self.bias is not None:
            state[self.bias] = (state[self.bias].double() + constant).float()
        else:
            positions = state[self.positions].double().clone()
            positions[self.first_patch :] += constant
            state[self.positions] = positions.float()
        return replace(self, state=state, config={**self.config, "num_channels": 3})
