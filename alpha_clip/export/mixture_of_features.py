"""Mixture of features: an alpha tower and one that learned from pictures alone, as one backbone.

"Eyes Wide Shut?" (arXiv 2401.06209, section 5) gives a multimodal model DINOv2's features beside
CLIP's, which miss what the pairs of MMVP differ in: added (A-MoF), or interleaved (I-MoF).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class MixtureOfFeatures(nn.Module):
    """A vision tower in place of a multimodal model's own, with the interface of transformers'.

    `llava.model.vision_tower = MixtureOfFeatures(llava.model.vision_tower, dino)`, after
    `swap_vision_tower`. What the model is to learn of the second tower it has to be trained for.
    What is saved then loads only into a model that is built the same way.

    Args:
        tower: transformers' CLIP or SigLIP tower, such as an export of three or four channels.
        other: A ViT of timm's, such as DINOv2's (`num_classes=0`); frozen by default, as in the
            paper. Where its width is another, a linear layer, to be trained, brings it to the
            tower's.
        mixing: `additive` adds the features of each patch (A-MoF); `interleaved` puts them one
            after the other, twice as many (I-MoF; the paper gives each its own adapter, here they
            share the consumer's). LLaVA's processor then needs `num_additional_image_tokens` raised
            by the number of patches; LLaVA-NeXT, which lays its patches out, takes `additive`.
        share: Of the other tower, in `additive`: 0 leaves the first as it is.
        layer: The hidden state that the consumer takes (`vision_feature_layer`).
        tower_mean: Mean of RGB in what the first tower is given, 0..1.
        tower_std: Its standard deviation.
        trainable: Whether the other tower is trained as well.

    Raises:
        ValueError: If the share is out of range, or the towers' patches can't be matched.
    """

    tower_mean: Tensor
    tower_std: Tensor
    other_mean: Tensor
    other_std: Tensor

    def __init__(
        self,
        tower: Any,
        other: Any,
        mixing: Literal["additive", "interleaved"] = "additive",
        share: float = 0.5,
        layer: int = -2,
        tower_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073),
        tower_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711),
        trainable: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in 0..1, got {share}")
        if mixing not in ("additive", "interleaved"):
            raise ValueError(f"mixing must be additive or interleaved, got {mixing!r}")
        if not hasattr(other, "forward_features") or not hasattr(other, "patch_embed"):
            raise ValueError(
                f"expected a ViT of timm's as the other tower, got {type(other).__name__}"
            )
        self.tower, self.other = tower, other.requires_grad_(trainable)
        self.mixing, self.share, self.layer = mixing, share, layer
        width, wanted = other.num_features, tower.config.hidden_size
        same = width == wanted
        self.match = nn.Identity() if same else nn.Linear(width, wanted)
        self._grid = tower.config.image_size // tower.config.patch_size
        patch, _ = other.patch_embed.patch_size
        self._size = self._grid * patch
        taken = other.patch_embed.img_size
        if getattr(other, "dynamic_img_size", False) is False and taken != (self._size, self._size):
            raise ValueError(
                f"the first tower has {self._grid} x {self._grid} patches: create the other one "
                f"for images of {self._size} px (timm.create_model(..., img_size={self._size})), "
                f"it is for {taken}"
            )
        config = other.pretrained_cfg or {}
        statistics = {
            "mean": (tower_mean, config.get("mean", (0.485, 0.456, 0.406))),
            "std": (tower_std, config.get("std", (0.229, 0.224, 0.225))),
        }
        for name, (ours, theirs) in statistics.items():
            for whose, values in (("tower", ours), ("other", theirs)):
                buffer = torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
                self.register_buffer(f"{whose}_{name}", buffer, persistent=False)

    @property
    def config(self) -> Any:
        """The first tower's config, which consumers read."""
        return self.tower.config

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first tower's weights."""
        found: torch.dtype = self.tower.dtype
        return found

    def forward(
        self,
        pixel_values: Float[Tensor, "batch channels height width"],
        output_hidden_states: bool = True,
        **more: Any,
    ) -> Any:
        """Return what the tower returns, its hidden state of `layer` mixed.

        Args:
            pixel_values: What the first tower takes: RGB, normalised its way, then alpha if it has
                that.
            output_hidden_states: Taken for the interface's sake; they are always there.
            more: Passed on to the first tower.
        """
        more.pop("return_dict", None)
        found = self.tower(pixel_values=pixel_values, output_hidden_states=True, **more)
        states = list(found.hidden_states)
        own = states[self.layer]
        prefix = own.shape[1] - self._grid**2
        theirs = self.match(self._others(pixel_values[:, :3]).to(own.dtype))
        patches = own[:, prefix:]
        if self.mixing == "additive":
            mixed = (1 - self.share) * patches + self.share * theirs
        else:
            mixed = torch.stack([patches, theirs], 2).flatten(1, 2)
        states[self.layer] = torch.cat([own[:, :prefix], mixed], 1)
        found["hidden_states"] = tuple(states)
        return found

    def _others(self, rgb: Tensor) -> Float[Tensor, "batch patches width"]:
        """Return the other tower's features of the patches, from the same picture."""
        picture = rgb.float() * self.tower_std + self.tower_mean
        if picture.shape[-1] != self._size:
            size = (self._size, self._size)
            picture = F.interpolate(picture, size, mode="bicubic", antialias=True)
        shown = (picture - self.other_mean) / self.other_std
        weight = next(self.other.parameters())
        tokens: Tensor = self.other.forward_features(shown.to(weight.dtype))
        return tokens[:, self.other.num_prefix_tokens :]
