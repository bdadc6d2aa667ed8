"""AlphaClip: a CLIP whose image tower looks where alpha says, while it sees the whole image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from alpha_clip.many_regions import encode_many, usual_chunk
from alpha_clip.pooled import pooled_features
from alpha_clip.regions import Region
from alpha_clip.surgery import has_alpha
from alpha_clip.text import Tokenizer, encode_text
from alpha_clip.transforms import Normalisation, RegionTransform


class AlphaClip(nn.Module):
    """A CLIP with an alpha channel.

    Build it with `create_model`; the constructor receives built parts. What is not defined here is
    the CLIP's own: `model.token_embedding`, `model.context_length`, ...

    Args:
        clip: An open_clip model whose image tower was treated by `add_alpha_channel`.
        name: Name of the architecture it was built from.
        config: open_clip's model config, enough to build the same model again.
        transform: Makes its input from images and regions.
        base: Where the weights came from that alpha was added to, if anywhere.
    """

    def __init__(
        self,
        clip: nn.Module,
        name: str,
        config: dict[str, Any],
        transform: RegionTransform,
        base: str | None = None,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.name = name
        self.config = config
        self.transform = transform
        self.base = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "clip":  # not there yet
                raise
            return getattr(self.clip, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Scripts wrap the tower (`model.visual = DistributedDataParallel(model.visual)`).
        if name in ("visual", "logit_scale"):
            setattr(self.clip, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def visual(self) -> nn.Module:
        """The image tower."""
        return self.clip.get_submodule("visual")

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the inverse temperature."""
        return self.clip.get_parameter("logit_scale")

    @property
    def normalisation(self) -> Normalisation:
        """What the tower expects of its input."""
        return self.transform.normalisation

    @property
    def image_size(self) -> int:
        """Side of the input, in pixels."""
        return self.transform.size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Turns texts into ids."""
        return Tokenizer(self.name, self.config["text_cfg"])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the image tower's first convolution; inputs are cast to it."""
        return next(p for p in self.visual.parameters() if p.ndim == 4).dtype

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
        joined = join_alpha(rgba, alpha, self.normalisation.whole_image)
        _check_finite(joined)
        # A tower that was just given its alpha is in evaluation the CLIP it came from, to the bit.
        exactly = not self.visual.training and has_alpha(self.visual)
        with self._explaining(joined):
            features = pooled_features(self.visual, joined.to(self.dtype), exactly)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_regions(
        self,
        rgb: Float[Tensor, "batch 3 height width"],
        alphas: Float[Tensor, "batch regions 1 height width"],
        normalize: bool = False,
        chunk: int | None = None,
    ) -> Float[Tensor, "batch regions dim"]:
        """Embed many regions of each image; what comes before alpha is done once an image.

        That is the first convolution of RGB, or, with `alpha_block`, whole blocks.

        Args:
            rgb: Normalised images, as `RegionTransform.many` gives them.
            alphas: Normalised alphas of their regions.
            normalize: Whether to scale the embeddings to length 1.
            chunk: Most images, or regions, that go through the tower at a time; bounds the memory.
                By default 64, on the CPU as many as have the pixels of eight 224 px images.

        Raises:
            ValueError: If the shapes do not fit together.
        """
        size = rgb.shape[-2:]
        fits = rgb.ndim == 4 and alphas.ndim == 5 and rgb.shape[1] == 3
        if not fits or alphas.shape != (rgb.shape[0], alphas.shape[1], 1, *size):
            raise ValueError(
                "expected rgb [batch, 3, height, width] and alphas [batch, regions, 1, height, "
                f"width] of the same batch and size, got {list(rgb.shape)} and "
                f"{list(alphas.shape)}; RegionTransform.many gives both, without the batch axis"
            )
        if (chunk is not None and chunk < 1) or alphas.shape[1] == 0:
            raise ValueError(
                f"expected at least one region and a chunk of at least 1, got {alphas.shape[1]} "
                f"regions and chunk={chunk}"
            )
        _check_finite(rgb, alphas)
        with self._explaining(rgb):
            given = rgb.to(self.dtype), alphas.to(self.dtype)
            features = encode_many(self.visual, *given, chunk or usual_chunk(rgb))
        return F.normalize(features, dim=-1) if normalize else features

    @contextmanager
    def _explaining(self, inputs: Tensor) -> Iterator[None]:
        """Say what size the tower takes, if it failed over another one."""
        try:
            yield
        except (RuntimeError, AssertionError) as error:
            if inputs.shape[-2:] == (self.image_size, self.image_size):
                raise
            raise ValueError(
                f"{self.name} takes images of {self.image_size} x {self.image_size} px, got "
                f"{list(inputs.shape[-2:])} ({error}); use its transform, or build it with "
                "create_model(..., image_size=...)"
            ) from error

    def encode_text(
        self, tokens: Int[Tensor, "batch context"], normalize: bool = False
    ) -> Float[Tensor, "batch dim"]:
        """Embed texts.

        Args:
            tokens: Ids as given by the model's tokenizer.
            normalize: Whether to scale the embeddings to length 1.

        Raises:
            TypeError, ValueError: If these are no token ids, or longer than the context.
        """
        features = encode_text(self.clip, tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self,
        image: Float[Tensor, "images channels height width"],
        text: Int[Tensor, "texts context"],
        alpha: Float[Tensor, "images 1 height width"] | None = None,
    ) -> tuple[Float[Tensor, "images texts"], Float[Tensor, "texts images"]]:
        """Return the scaled cosine similarities per image and, transposed, per text."""
        logits = self._compare(self.encode_image(image, alpha, normalize=True), text)
        return logits, logits.T

    @torch.inference_mode()
    def classify(
        self,
        image: Image.Image,
        regions: list[Region],
        labels: list[str],
        template: str = "a photo of a {}.",
    ) -> Float[Tensor, "regions labels"]:
        """Say what the regions of an image are.

        Args:
            image: Any PIL image.
            regions: What to look at; see `region_to_alpha`.
            labels: Names to choose from.
            template: Sentence with a place `{}` for the name.

        Returns:
            Probabilities; each row sums to 1.

        Raises:
            TypeError, ValueError: If a region does not fit the image; if there are no labels.
        """
        if not labels or not regions or "{}" not in template:
            raise ValueError(
                "expected at least one region, one label and a template with {}, got "
                f"{len(regions)} regions, {len(labels)} labels and {template!r}"
            )
        device = self.logit_scale.device
        if self.transform.geometry == "crop_box":  # each region has its own window
            rgba = self.transform.stack(image, regions).to(device)
            features = self.encode_image(rgba, normalize=True)
        else:
            rgb, alphas = (part.to(device) for part in self.transform.many(image, regions))
            features = self.encode_regions(rgb[None], alphas[None], normalize=True)[0]
        tokens = self.tokenizer([template.format(label) for label in labels]).to(device)
        return self._compare(features, tokens).float().softmax(-1)

    def _compare(self, features: Tensor, text: Tensor) -> Tensor:
        logits = self.logit_scale.exp() * features @ self.encode_text(text, normalize=True).T
        if getattr(self.clip, "logit_bias", None) is not None:  # SigLIP
            logits = logits + self.clip.get_parameter("logit_bias")
        return logits


def join_alpha(rgba: Tensor, alpha: Tensor | None, whole_image: float) -> Tensor:
    """Return RGBA from what was given of it.

    Args:
        rgba: Normalised images `[batch, 3 or 4, height, width]`.
        alpha: Normalised alpha `[batch, 1, height, width]`, where `rgba` holds RGB alone.
        whole_image: The normalised alpha of a pixel to look at, for images without alpha.

    Raises:
        ValueError: If the channels or the sizes do not fit together.
    """
    if rgba.ndim != 4 or rgba.shape[1] not in (3, 4):
        raise ValueError(
            "expected images of shape [batch, 4, height, width] (RGB + alpha) or "
            f"[batch, 3, height, width], got {list(rgba.shape)}; build them with "
            "RegionTransform, and add the batch axis with image[None]"
        )
    if alpha is None:
        if rgba.shape[1] == 4:
            return rgba
        alpha = torch.full_like(rgba[:, :1], whole_image)
    elif rgba.shape[1] != 3 or alpha.shape != (rgba.shape[0], 1, *rgba.shape[2:]):
        raise ValueError(
            "with a separate alpha, expected RGB [batch, 3, height, width] and alpha "
            f"[batch, 1, height, width] of one size, got {list(rgba.shape)} and "
            f"{list(alpha.shape)}"
        )
    return torch.cat([rgba, alpha.to(rgba.dtype)], dim=1)


def _check_finite(*inputs: Tensor) -> None:
    """Refuse NaN and infinity, which would silently become features.

    On the CPU only: elsewhere it would wait for the device.
    """
    if torch.compiler.is_compiling():
        return
    for part in inputs:
        if part.device.type == "cpu" and not torch.isfinite(part).all():
            raise ValueError(
                "the input holds NaN or infinity; build it with RegionTransform from pixels 0..255 "
                "and a mask 0..1"
            )
