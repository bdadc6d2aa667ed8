"""The alpha channel: a zero-initialised convolution beside a tower's first one, summed with it.

`y = conv_rgb(rgb) + conv_alpha(alpha)` (Alpha-CLIP, arXiv 2312.03818, section 3.2). With the second
kernel at zero the tower still computes exactly what it computed before. Alpha may also enter later,
see `late_alpha`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alpha_clip.late_alpha import (
    FIRST_LAYER,
    AlphaEntry,
    AlphaPatches,
    AlphaSummary,
    LateAlpha,
    add_late_alpha,
)

RGBA_CHANNELS = 4


class AlphaConv2d(nn.Conv2d):
    """A stem convolution over RGBA: the original RGB kernel and a kernel for alpha, summed.

    A subclass, so that every state-dict key of the tower stays and code that reads
    `conv1.weight.dtype` goes on working; the only new key is `weight_alpha`.
    """

    weight_alpha: nn.Parameter

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> AlphaConv2d:
        """Return the RGBA version of an RGB convolution; the parameters of `conv` are shared."""
        new = cls.__new__(cls)
        new.__dict__.update(conv.__dict__)  # same parameters, hooks and training flag
        new._parameters = dict(conv._parameters)  # `conv` itself gets no alpha
        new.in_channels = RGBA_CHANNELS
        new.weight_alpha = nn.Parameter(torch.zeros_like(conv.weight[:, :1]))
        return new

    def forward(self, rgba: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Convolve RGB and alpha with their own kernels and add the results.

        Args:
            rgba: Normalised RGB, then normalised alpha; within `sharing_rgb`, alpha alone.

        Raises:
            ValueError: If the input does not have four channels.
        """
        shared = _SHARED.get() if rgba.shape[-3] == 1 else None
        if shared is not None:
            alpha: Tensor = self._conv_forward(rgba, self.weight_alpha, None)
            return alpha.add_(shared.response(self))
        if rgba.shape[-3] != RGBA_CHANNELS:
            raise ValueError(
                "an alpha tower takes 4 channels (RGB + alpha), got an input of shape "
                f"{list(rgba.shape)}; build it with RegionTransform, or call "
                "AlphaClip.encode_image, which looks at the whole image when alpha is missing"
            )
        response = self.respond_to_rgb(rgba[..., :3, :, :])
        # In place: neither convolution needs its own output for the backward pass.
        return response.add_(self._conv_forward(rgba[..., 3:, :, :], self.weight_alpha, None))

    def respond_to_rgb(self, rgb: Float[Tensor, "batch 3 height width"]) -> Tensor:
        """Convolve RGB alone: what the layer computed before the surgery."""
        response: Tensor = self._conv_forward(rgb, self.weight, self.bias)
        return response


class SharedRgb:
    """Images that many alphas share: each stem convolves them once.

    Args:
        rgb: Normalised images `[images, 3, height, width]`.
    """

    def __init__(self, rgb: Float[Tensor, "images 3 height width"]) -> None:
        self.rgb = rgb
        self.owner: Tensor | None = None
        """Index into `rgb` for each alpha of the next pass; `None` where one image has them all."""
        self._responses: dict[AlphaConv2d, Tensor] = {}

    def response(self, stem: AlphaConv2d) -> Tensor:
        """Return the stem's response to RGB for each alpha of this pass."""
        if stem not in self._responses:
            self._responses[stem] = stem.respond_to_rgb(self.rgb)
        response = self._responses[stem]
        return response if self.owner is None else response[self.owner]


_SHARED: ContextVar[SharedRgb | None] = ContextVar("shared_rgb", default=None)


@contextmanager
def sharing_rgb(rgb: Float[Tensor, "images 3 height width"]) -> Iterator[SharedRgb]:
    """Let alpha towers take alpha alone, `[regions, 1, height, width]`, for regions of `rgb`.

    The first convolution of the images, and the copy of RGB into every region's input, are done
    once instead of once a region. Other threads are not affected.
    """
    shared = SharedRgb(rgb)
    token = _SHARED.set(shared)
    try:
        yield shared
    finally:
        _SHARED.reset(token)


def find_stems(visual: nn.Module) -> dict[str, nn.Conv2d]:
    """Find the convolutions that read the picture.

    Args:
        visual: An open_clip image tower, or a timm model.

    Returns:
        Name in the tower -> convolution; most towers have one, some MobileCLIPs two in parallel.

    Raises:
        ValueError: If the tower has no RGB convolution to extend, or has an alpha channel already.
    """
    if isinstance(visual, LateAlpha):
        raise ValueError(f"{type(visual).__name__} has an alpha channel already")
    layers = dict(visual.named_modules())
    stems: dict[str, nn.Conv2d] = {}
    for name in _stem_names(visual):
        layer, where = layers.get(name), f"{type(visual).__name__}.{name}"
        if isinstance(layer, AlphaConv2d):
            raise ValueError(f"{where} has an alpha channel already")
        if layer is None and any(n.endswith("reparam_conv") for n in layers):
            raise ValueError(
                f"{where} is gone: the tower was reparameterised for inference, which merged its "
                "first convolutions; add the alpha channel first, fold it, then reparameterise"
            )
        # A subclass may pad or scale in its own way, which AlphaConv2d would not repeat.
        if type(layer) is not nn.Conv2d or layer.in_channels != 3 or layer.groups != 1:
            raise ValueError(
                f"expected {where} to be a Conv2d over 3 channels, got {layer}; an alpha channel "
                "can't be added to such a stem"
            )
        stems[name] = layer
    return stems


def _stem_names(visual: nn.Module) -> list[str]:
    """Ask the tower which layers read the picture: timm says it, open_clip's own call it conv1."""
    trunk = getattr(visual, "trunk", visual)
    if isinstance(getattr(visual, "visual", None), nn.Module):
        raise ValueError(
            f"expected an image tower, got a whole {type(visual).__name__}; pass .visual"
        )
    facts = getattr(trunk, "pretrained_cfg", None)
    if facts is None:
        return ["conv1"]
    first = facts.get("first_conv")
    if not first:
        raise ValueError(f"{type(trunk).__name__} does not say which layer reads the picture")
    prefix = "" if trunk is visual else "trunk."
    return [prefix + name for name in ([first] if isinstance(first, str) else first)]


def add_alpha_channel(visual: nn.Module, block: int | AlphaEntry = 0) -> nn.Module:
    """Give an image tower a fourth input channel, in place, without changing what it computes.

    Args:
        visual: An open_clip image tower (`model.visual`), or a timm model.
        block: In front of which block alpha enters. 0 is the paper's place, the first layer; with a
            later one, all regions of an image share the blocks before it, see `AlphaEntry`.

    Returns:
        The same tower; it now takes `[batch, 4, height, width]`.

    Raises:
        ValueError: If the tower can't take an alpha channel, or not there; the message names the
            layer, or the tower's class.
    """
    stems, entry = find_stems(visual), AlphaEntry.of(block)
    if not entry.is_first_layer:
        return add_late_alpha(visual, entry)
    for name, conv in stems.items():
        visual.set_submodule(name, AlphaConv2d.from_conv(conv))
    return visual


def fold_alpha(visual: nn.Module) -> nn.Module:
    """Turn a trained alpha tower into one with plain 4-channel convolutions, in place.

    The result has no class of ours in it and costs one convolution instead of two; it can be used
    and saved, but no longer be told apart into RGB and alpha for training.

    Args:
        visual: A tower treated by `add_alpha_channel`.

    Returns:
        The same tower.

    Raises:
        ValueError: If the tower has no alpha channel, or it enters later than the first layer.
    """
    if isinstance(visual, LateAlpha):
        raise ValueError(
            f"alpha enters {type(visual).__name__} in front of block {visual.alpha_entry.block}: "
            "there is no convolution of the picture to fold it into; use the tower as it is"
        )
    stems = {n: m for n, m in visual.named_modules() if isinstance(m, AlphaConv2d)}
    if not stems:
        raise ValueError(f"{type(visual).__name__} has no alpha channel; nothing to fold")
    for name, stem in stems.items():
        weight = torch.cat([stem.weight, stem.weight_alpha], dim=1).detach()
        plain = nn.Conv2d.__new__(nn.Conv2d)
        plain.__dict__.update(stem.__dict__)
        plain._parameters = {**stem._parameters, "weight": nn.Parameter(weight)}
        del plain._parameters["weight_alpha"]
        visual.set_submodule(name, plain)
    return visual


def alpha_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model that an alpha surgery added."""
    kinds = (AlphaConv2d, AlphaPatches, AlphaSummary)
    return [m.weight_alpha for m in model.modules() if isinstance(m, kinds)]


def has_alpha(visual: nn.Module) -> bool:
    """Say whether a tower has a kernel for alpha, not yet folded into that for RGB."""
    return bool(alpha_parameters(visual))


def alpha_entry(visual: nn.Module) -> AlphaEntry:
    """Return where alpha enters a tower, folded or not."""
    return visual.alpha_entry if isinstance(visual, LateAlpha) else FIRST_LAYER
