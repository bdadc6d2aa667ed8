"""Ways of encoding the same images, checked against each other before they are timed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from alpha_clip import AlphaClip, create_model, fold_alpha
from alpha_clip.pooled import pooled_features
from alpha_clip.surgery import AlphaConv2d, alpha_parameters
from benchmarks.published import is_openai, published_tower, same_features

PLAIN, ALPHA, FOLDED, PUBLISHED = "open_clip", "alpha", "alpha, folded", "published"
ENCODE, COMPILED, GRAPHS = "encode_image", "encode_image, compiled", "encode_image, CUDA graphs"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TOLERANCES = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 1e-1}


@dataclass(frozen=True)
class Encoders:
    """Towers that compute the same, but for open_clip's, which has no alpha.

    Attributes:
        name: The architecture.
        precision: `fp32`, `fp16` or `bf16`.
        size: Side of the images, in pixels.
        device: Where they are.
        plain: open_clip's tower.
        alpha: Ours, unfolded; weights are random, alpha's kernel as well.
        model: Ours, folded: its tower alone, or the short way that `encode_image` takes.
        published: The published implementation with the same weights, where it has such a tower;
            in fp16 where ours is in bf16, which it can't do.
    """

    name: str
    precision: str
    size: int
    device: str
    plain: nn.Module
    alpha: nn.Module
    model: AlphaClip
    published: Any

    def images(self, batch: int) -> torch.Tensor:
        """Return noise `[batch, 4, size, size]`."""
        dtype = DTYPES[self.precision]
        return torch.randn(batch, 4, self.size, self.size, device=self.device).to(dtype)

    def ways(self, rgba: torch.Tensor, compiled: bool) -> dict[str, Callable[[], torch.Tensor]]:
        """Return ways of encoding images, open_clip's first.

        What was compiled before is forgotten, so that each batch size gets code of its own.
        """
        rgb, alpha = rgba[:, :3].contiguous(), rgba[:, 3:].contiguous()
        found: dict[str, Callable[[], torch.Tensor]] = {
            PLAIN: partial(self.plain, rgb),
            ALPHA: partial(self.alpha, rgba),
            FOLDED: partial(self.model.visual, rgba),
            ENCODE: partial(self.model.encode_image, rgba),
        }
        if compiled:
            torch.compiler.reset()
            tower = self.model.visual
            found[COMPILED] = partial(torch.compile(pooled_features), tower, rgba)
            if rgba.is_cuda:
                graphs = torch.compile(pooled_features, mode="reduce-overhead")
                found[GRAPHS] = partial(graphs, tower, rgba)
        if self.published is not None:
            dtype = self.published.conv1.weight.dtype
            found[PUBLISHED] = partial(self.published, rgb.to(dtype), alpha.to(dtype))
        return found

    def first_layers(self, rgba: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
        """Return the first layer alone of those that differ in nothing else."""
        towers = {PLAIN: self.plain, ALPHA: self.alpha, FOLDED: self.model.visual}
        layers = {k: next(m for m in t.modules() if _reads_it(m)) for k, t in towers.items()}
        rgb = rgba[:, :3].contiguous()
        return {k: partial(m, rgb if k == PLAIN else rgba) for k, m in layers.items()}

    @torch.inference_mode()
    def check(self) -> None:
        """Make sure that all compute the same features.

        Raises:
            ValueError: If they don't.
        """
        rgba, tolerance = self.images(2), _TOLERANCES[self.precision]
        expected = self.alpha(rgba)
        same_features(self.model.visual(rgba), expected, tolerance)
        same_features(self.model.encode_image(rgba), expected, tolerance)
        if self.published is not None:
            same_features(self.ways(rgba, compiled=False)[PUBLISHED](), expected, tolerance)


def create_encoders(
    name: str, precision: str, device: str, code: ModuleType | None = None
) -> Encoders:
    """Build the towers of an architecture.

    Args:
        name: An open_clip architecture.
        precision: `fp32`, `fp16` or `bf16`.
        device: Where to.
        code: The published code; it has OpenAI's towers.

    Raises:
        ValueError: If the precision is none of these, or two towers compute different features.
    """
    import open_clip

    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}")
    model = create_model(name, precision=precision, device=device)[0]
    for kernel in alpha_parameters(model.visual):
        nn.init.normal_(kernel, std=0.02)  # of a new model it is zero, which shows no mistake
    plain = open_clip.create_model(name, precision=precision, device=device).visual.eval()
    theirs = None
    if code is not None and is_openai(model):
        theirs = published_tower(code, model, half=precision != "fp32")
    alpha = deepcopy(model.visual)
    fold_alpha(model.visual)
    encoders = Encoders(name, precision, model.image_size, device, plain, alpha, model, theirs)
    encoders.check()
    return encoders


def _reads_it(layer: nn.Module) -> bool:
    wide = isinstance(layer, nn.Conv2d) and layer.in_channels in (3, 4)
    return wide or isinstance(layer, AlphaConv2d)
