"""The alpha channel: a zero-initialised convolution beside a tower's first one, summed with it.

`y = conv_rgb(rgb) + conv_alpha(alpha)` (Alpha-CLIP, arXiv 2312.03818, section 3.2). With the second
kernel at zero the tower still computes exactly what it computed before.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

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

    def forward(self, rgba: Float[Tensor, "batch 4 height width"]) -> Tensor:
        """Convolve RGB and alpha with their own kernels and add the results.

        Args:
            rgba: Normalised RGB, then normalised alpha.

        Raises:
            ValueError: If the input does not have four channels.
        """
        if rgba.shape[-3] != RGBA_CHANNELS:
            raise ValueError(
                "an alpha tower takes 4 channels (RGB + alpha), got an input of shape "
                f"{list(rgba.shape)}; build it with RegionTransform, or call "
                "AlphaClip.encode_image, which looks at the whole image when alpha is missing"
            )
        rgb: Tensor = self._conv_forward(rgba[..., :3, :, :], self.weight, self.bias)
        alpha: Tensor = self._conv_forward(rgba[..., 3:, :, :], self.weight_alpha, None)
        return rgb + alpha

    def alpha_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the surgery added, so that nobody has to match names."""
        yield self.weight_alpha


def find_stems(visual: nn.Module) -> dict[str, nn.Conv2d]:
    """Find the convolutions that read the picture.

    Args:
        visual: An open_clip image tower.

    Returns:
        Name in the tower -> convolution; most towers have one.

    Raises:
        ValueError: If the tower has no RGB convolution to extend, or has an alpha channel already.
    """
    trunk = getattr(visual, "trunk", None)
    names: str | tuple[str, ...] | list[str] = "conv1"
    if trunk is not None:
        first = trunk.pretrained_cfg.get("first_conv")
        if not first:
            raise ValueError(f"{type(trunk).__name__} does not say which layer reads the picture")
        names = [f"trunk.{n}" for n in ([first] if isinstance(first, str) else first)]
    stems: dict[str, nn.Conv2d] = {}
    for name in [names] if isinstance(names, str) else names:
        layer = dict(visual.named_modules()).get(name)
        if isinstance(layer, AlphaConv2d):
            raise ValueError(f"{type(visual).__name__}.{name} has an alpha channel already")
        # A subclass may pad or scale in its own way, which AlphaConv2d would not repeat.
        if type(layer) is not nn.Conv2d or layer.in_channels != 3 or layer.groups != 1:
            raise ValueError(
                f"expected {type(visual).__name__}.{name} to be a Conv2d over 3 channels, got "
                f"{layer}; an alpha channel can't be added to such a stem"
            )
        stems[name] = layer
    return stems


def add_alpha_channel(visual: nn.Module) -> nn.Module:
    """Give an image tower a fourth input channel, in place, without changing what it computes.

    Args:
        visual: An open_clip image tower (`model.visual`).

    Returns:
        The same tower; it now takes `[batch, 4, height, width]`.

    Raises:
        ValueError: If the tower can't take an alpha channel; the message names the layer.
    """
    for name, conv in find_stems(visual).items():
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
        ValueError: If the tower has no alpha channel.
    """
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
    return [p for m in model.modules() if isinstance(m, AlphaConv2d) for p in m.alpha_parameters()]
