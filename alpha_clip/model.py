"""AlphaClip: a CLIP whose image tower looks where alpha says, while it sees the whole image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from alpha_clip.transforms import Normalisation


class AlphaClip(nn.Module):
    """A CLIP with an alpha channel.

    Build it with `create_model`; the constructor receives built parts.

    Args:
        clip: An open_clip model whose image tower was treated by `add_alpha_channel`.
        name: Name of the architecture it was built from.
        config: open_clip's model config, enough to build the same model again.
        normalisation: What the tower expects of its input.
    """

    def __init__(
        self, clip: nn.Module, name: str, config: dict[str, Any], normalisation: Normalisation
    ) -> None:
        super().__init__()
        self.clip = clip
        self.name = name
        self.config = config
        self.normalisation = normalisation

    @property
    def visual(self) -> nn.Module:
        """The image tower."""
        return self.clip.get_submodule("visual")

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the inverse temperature."""
        return self.clip.get_parameter("logit_scale")

    @property
    def image_size(self) -> int:
        """Side of the input, in pixels."""
        size = getattr(self.visual, "image_size", None)
        return int(size[0] if isinstance(size, tuple | list) else size)  # type: ignore[arg-type]

    def encode_image(
        self,
        rgba: Float[Tensor, "batch channels height width"],
        alpha: Float[Tensor, "batch 1 height width"] | None = None,
        normalize: bool = False,
    ) -> Float[Tensor, "batch dim"]:
        """Embed images, attending to the region marked by alpha.

        Args:
            rgba: Output of `RegionTransform`: normalised RGB, then alpha (larger means "look
                here"). With `alpha`, or to look at the whole image, RGB alone.
            alpha: Normalised alpha, where `rgba` holds RGB alone.
            normalize: Whether to scale the embeddings to length 1.

        Raises:
            ValueError: If the channels or the sizes do not fit together.
        """
        features: Tensor = self.visual(self._join(rgba, alpha).to(self.dtype))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_regions(
        self,
        rgb: Float[Tensor, "batch 3 height width"],
        alphas: Float[Tensor, "batch regions 1 height width"],
        normalize: bool = False,
        chunk: int = 64,
    ) -> Float[Tensor, "batch regions dim"]:
        """Embed many regions of each image.

        Args:
            rgb: Normalised images, as `RegionTransform.many` gives them.
            alphas: Normalised alphas of their regions.
            normalize: Whether to scale the embeddings to length 1.
            chunk: Most regions that go through the tower at a time; bounds the memory.

        Raises:
            ValueError: If the shapes do not fit together.
        """
        if alphas.ndim != 5 or alphas.shape[2] != 1 or alphas.shape[0] != rgb.shape[0]:
            raise ValueError(
                "alphas must have shape [batch, regions, 1, height, width] with the batch of rgb, "
                f"got {list(alphas.shape)} for rgb of shape {list(rgb.shape)}"
            )
        batch, regions = alphas.shape[:2]
        owner = torch.arange(batch, device=rgb.device).repeat_interleave(regions)
        parts = [
            self.encode_image(rgb[image], alpha, normalize)
            for image, alpha in zip(
                owner.split(chunk), alphas.flatten(0, 1).split(chunk), strict=True
            )
        ]
        features: Tensor = torch.cat(parts).unflatten(0, (batch, regions))
        return features

    def encode_text(
        self, tokens: Int[Tensor, "batch context"], normalize: bool = False
    ) -> Float[Tensor, "batch dim"]:
        """Embed texts, as given by the tokenizer of `create_model`."""
        features: Tensor = self.clip.encode_text(tokens)  # type: ignore[operator]
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self,
        image: Float[Tensor, "images channels height width"],
        text: Int[Tensor, "texts context"],
        alpha: Float[Tensor, "images 1 height width"] | None = None,
    ) -> tuple[Float[Tensor, "images texts"], Float[Tensor, "texts images"]]:
        """Return the scaled cosine similarities per image and, transposed, per text."""
        features = self.encode_image(image, alpha, normalize=True)
        logits = self.logit_scale.exp() * features @ self.encode_text(text, normalize=True).T
        return logits, logits.T

    def _join(self, rgba: Tensor, alpha: Tensor | None) -> Tensor:
        if rgba.ndim != 4 or rgba.shape[1] not in (3, 4):
            raise ValueError(
                "expected images of shape [batch, 4, height, width] (RGB + alpha) or "
                f"[batch, 3, height, width], got {list(rgba.shape)}; build them with "
                "RegionTransform, and add the batch axis with image[None]"
            )
        if alpha is None:
            if rgba.shape[1] == 4:
                return rgba
            alpha = torch.full_like(rgba[:, :1], self.normalisation.whole_image)
        elif rgba.shape[1] != 3 or alpha.shape != (rgba.shape[0], 1, *rgba.shape[2:]):
            raise ValueError(
                "with a separate alpha, expected RGB [batch, 3, height, width] and alpha "
                f"[batch, 1, height, width] of one size, got {list(rgba.shape)} and "
                f"{list(alpha.shape)}"
            )
        return torch.cat([rgba, alpha.to(rgba.dtype)], dim=1)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the image tower's first convolution; inputs are cast to it."""
        return next(p for p in self.visual.parameters() if p.ndim == 4).dtype
