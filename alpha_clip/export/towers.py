"""A model's towers as graphs of their own: what goes in and out, with random inputs to compare by.

With alpha at the first layer the image tower is one graph. With late alpha it is two: the trunk,
once an image, and the head, once a region.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from alpha_clip.attention import find_blocks
from alpha_clip.export.base import largest_difference, probe
from alpha_clip.late_alpha import LateAlpha
from alpha_clip.model import AlphaClip
from alpha_clip.pooled import pooled_features
from alpha_clip.surgery import AlphaConv2d, fold_alpha
from alpha_clip.token_tower import features_in

PREPROCESS_FILE = "preprocess.json"
Run = Callable[..., Tensor]


class ImageTower(nn.Module):
    """An image tower alone: RGBA in, features out.

    Args:
        visual: An image tower; its alpha may be folded or not.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, rgba: Tensor) -> Tensor:
        """Embed images `[batch, 4, size, size]`."""
        return pooled_features(self.visual, rgba)


class ImageTrunk(nn.Module):
    """What comes before late alpha: RGB in, tokens out.

    Args:
        visual: A tower with late alpha.
    """

    def __init__(self, visual: LateAlpha) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, rgb: Tensor) -> Tensor:
        """Return the tokens `[images, tokens, width]` of images `[images, 3, size, size]`."""
        return self.visual.image_tokens(rgb)


class RegionHead(nn.Module):
    """What comes after late alpha: tokens and alphas in, features out.

    Args:
        visual: A tower with late alpha.
    """

    def __init__(self, visual: LateAlpha) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, tokens: Tensor, alpha: Tensor, image: Tensor) -> Tensor:
        """Embed regions.

        Args:
            tokens: Of all images, as the trunk gives them.
            alpha: Of all regions, `[regions, 1, size, size]`.
            image: Number of each region's image, `[regions]`.
        """
        return features_in(self.visual.region_features(tokens[image], alpha))


class TextTower(nn.Module):
    """A text tower alone: token ids in, features out.

    Args:
        clip: The open_clip model that it belongs to.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed texts, ids `[batch, context]`."""
        features: Tensor = self.clip.encode_text(tokens)  # type: ignore[operator]
        return features


@dataclass(frozen=True)
class Graph:
    """A tower, or a part of one, to be written as a graph.

    Attributes:
        tower: The module.
        inputs: Name -> an input to trace it with.
        axes: Name of each input -> what its first axis counts; it may have any length.
        output: Name of what comes out.
    """

    tower: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, str]
    output: str = "features"

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """The axes, as `torch.export` takes them."""
        counted = {name: torch.export.Dim(name) for name in set(self.axes.values())}
        return tuple({0: counted[self.axes[name]]} for name in self.inputs)


def plain_tower(model: AlphaClip) -> ImageTower:
    """Copy the image tower, in eval mode and with alpha folded if it can be."""
    visual: Any = deepcopy(model.visual).eval().requires_grad_(False)
    if any(isinstance(m, AlphaConv2d) for m in visual.modules()):
        fold_alpha(visual)
    return ImageTower(visual).eval()


def _halves(visual: LateAlpha) -> tuple[ImageTrunk, RegionHead]:
    """Copy a tower into its two halves, each without the other's blocks."""
    trunk, head = ImageTrunk(visual), RegionHead(deepcopy(visual))
    for half, before in ((trunk, True), (head, False)):
        blocks = find_blocks(half.visual)[1]  # type: ignore[arg-type]
        for number in range(len(blocks)):
            if (number < visual.alpha_entry.block) != before:
                blocks[number] = nn.Identity()
    trunk.visual.alpha_patches = nn.ModuleList()
    return trunk.eval(), head.eval()


def _text_tower(model: AlphaClip) -> TextTower:
    clip: Any = copy(model.clip)  # without what the text tower's file should not hold
    clip._modules = {k: v for k, v in clip._modules.items() if k not in ("visual", "text_decoder")}
    return TextTower(deepcopy(clip).requires_grad_(False)).eval()


def graphs(model: AlphaClip) -> dict[str, Graph]:
    """Return what an export has to write: copies in fp32, on the CPU, by name.

    Returns:
        `image`, or `trunk` and `head` where alpha enters late, and `text`.
    """
    rgba, tokens = probes(model)
    tower, text = plain_tower(model).cpu().float(), _text_tower(model).cpu().float()
    found = {"text": Graph(text, {"tokens": tokens}, {"tokens": "batch"})}
    if not isinstance(tower.visual, LateAlpha):
        return {"image": Graph(tower, {"rgba": rgba}, {"rgba": "batch"}), **found}
    (trunk, head), rgb = _halves(tower.visual), rgba[:3, :3]
    with torch.no_grad():
        image_tokens = trunk(rgb)
    inputs = {
        "image_tokens": image_tokens,
        "alpha": rgba[:, 3:],
        "image": torch.tensor([0, 2, 1, 0]),
    }
    axes = {"image_tokens": "images", "alpha": "regions", "image": "regions"}
    before = Graph(trunk, {"rgb": rgb}, {"rgb": "images"}, "image_tokens")
    return {"trunk": before, "head": Graph(head, inputs, axes), **found}


def graph_names(model: AlphaClip) -> list[str]:
    """Return the names of what `graphs` gives, without making it."""
    late = isinstance(model.visual, LateAlpha)
    return ["trunk", "head", "text"] if late else ["image", "text"]


def probes(model: AlphaClip) -> tuple[Tensor, Int[Tensor, "4 context"]]:
    """Return random images with random regions, and random texts of several lengths."""
    config, generator = model.config["text_cfg"], torch.Generator().manual_seed(0)
    vocabulary, context = config.get("vocab_size", 49408), config.get("context_length", 77)
    tokens = torch.randint(1, vocabulary - 1, (4, context), generator=generator)
    for row, length in enumerate((context, context - 1, context // 2, 2)):
        tokens[row, length - 1] = vocabulary - 1  # most tokenizers' end of text
        tokens[row, length:] = 0
    return probe(model), tokens


def compare_graphs(model: AlphaClip, runs: Mapping[str, Run]) -> float:
    """Return the largest difference of graphs' features to the model's, in fp32.

    Args:
        model: What was exported.
        runs: What runs each graph, by the names of `graphs`.
    """
    if "image" in runs:
        return compare_runs(model, runs["image"], runs["text"])

    def image(rgba: Tensor) -> Tensor:
        """Point at two regions of each image, the second ones in another order."""
        turned = torch.arange(len(rgba)).flip(0)
        both = torch.cat([turned.flip(0), turned])
        features = runs["head"](runs["trunk"](rgba[:, :3]), rgba[both, 3:], both)
        return features[len(rgba) :].flip(0)

    return compare_runs(model, image, runs["text"])


@torch.no_grad()
def compare_runs(model: AlphaClip, image: Run, text: Run, whole_image: bool = False) -> float:
    """Return the largest difference of two towers' features to the model's, in fp32.

    Args:
        model: What was exported.
        image: The image tower that came of it.
        text: The text tower that came of it.
        whole_image: Whether to point at the whole image instead of at random regions.
    """
    twin = deepcopy(model).cpu().float().eval()
    rgba, tokens = probes(model)
    if whole_image:
        rgba[:, 3:] = model.normalisation.whole_image
    pairs = [(twin.encode_image(rgba), image, rgba)]
    pairs.append((twin.encode_text(tokens), text, tokens))
    return max(
        largest_difference(ours[:batch], theirs(inputs[:batch]))
        for ours, theirs, inputs in pairs
        for batch in (1, 4)
    )


def write_preprocessing(model: AlphaClip, folder: Path) -> None:
    """Write `preprocess.json`: what both towers expect, for code that has no RegionTransform."""
    n, t = model.normalisation, model.transform
    record = {
        "size": t.size,
        "mean": list(n.mean),
        "std": list(n.std),
        "alpha_mean": n.alpha_mean,
        "alpha_std": n.alpha_std,
        "geometry": t.geometry,
        "interpolation": t.interpolation,
        "context_length": model.config["text_cfg"].get("context_length", 77),
    }
    (folder / PREPROCESS_FILE).write_text(json.dumps(record, indent=1) + "\n")
