"""The published implementation, run from a clone of SunzeY/AlphaCLIP, to be measured beside ours.

Its `alpha_clip/model.py` is loaded by its path; it imports `loralib` (`pip install loralib`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from alpha_clip.layouts import to_published
from alpha_clip.model import AlphaClip


def published_code(clone: Path) -> ModuleType:
    """Load the model code of a clone.

    Raises:
        ValueError: If it is no clone of that repository, or loralib is missing.
    """
    file = clone / "alpha_clip" / "model.py"
    if not file.is_file():
        raise ValueError(
            f"{file} is missing; expected a clone of https://github.com/SunzeY/AlphaCLIP"
        )
    spec = importlib.util.spec_from_file_location("published_alpha_clip", file)
    assert spec is not None
    assert spec.loader is not None  # it is a Python file
    code = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(code)
    except ImportError as error:
        raise ValueError(f"{file} can't be run: {error}; pip install loralib") from error
    return code


def is_openai(model: AlphaClip) -> bool:
    """Say whether the published code has such towers: OpenAI's ViT or ResNet, with QuickGELU."""
    vision = model.config["vision_cfg"]
    others = {"timm_model_name", "attentional_pool"} & vision.keys()
    return bool(model.config.get("quick_gelu")) and not others


def published_tower(code: ModuleType, model: AlphaClip, half: bool = False) -> Any:
    """Build the published image tower with the weights of ours: `tower(rgb, alpha)`.

    Args:
        code: The published code.
        model: Ours; see `is_openai`.
        half: Whether to make it fp16 as the published `load` does on GPUs; norms stay fp32.
    """
    vision, dim = model.config["vision_cfg"], model.config["embed_dim"]
    width, layers = vision.get("width", 64), vision.get("layers", 12)
    if isinstance(layers, list):
        tower = code.ModifiedResNet(layers, dim, width * 32 // 64, model.image_size, width)
    else:
        sizes = (model.image_size, vision["patch_size"], width, layers, width // 64, dim)
        tower = code.VisionTransformer(*sizes, lora_adapt=False, rank=-1)
    tower.load_state_dict({k: v.float() for k, v in to_published(model.visual).items()})
    if half:
        code.convert_weights(tower)
    return tower.to(model.logit_scale.device).eval()


def published_preprocess(size: int) -> tuple[Any, Any]:
    """Return its preparation of a PIL image and of a mask `[H, W]` of 0 and 255, as its README has.

    The image is resized by its shorter side and cropped, the mask squashed: they come apart.
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision import transforms

    on_image = transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
        ]
    )
    on_mask = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Resize((size, size)),
            transforms.Normalize(0.5, 0.26),
        ]
    )
    return on_image, on_mask


def published_clip(code: ModuleType, model: AlphaClip) -> Any:
    """Build the whole published CLIP in the sizes of a ViT of ours, in fp32, as its script trains.

    Its weights are random; the image tower learns, the rest is frozen.
    """
    vision, text = model.config["vision_cfg"], model.config["text_cfg"]
    clip = code.CLIP(
        model.config["embed_dim"],
        *(vision["image_size"], vision["layers"], vision["width"], vision["patch_size"]),
        *(text["context_length"], text["vocab_size"], text["width"]),
        *(text["width"] // 64, text["layers"]),
        lora_adapt=False,
        rank=-1,
    )
    clip.float().train().requires_grad_(False)
    clip.visual.requires_grad_(True)
    return clip.to(model.logit_scale.device)


def same_features(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Make sure that two encoders compute the same.

    Raises:
        ValueError: If the features differ by more, relative to the largest.
    """
    difference = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"the encoders disagree: the largest difference is {difference:.1e} of the largest "
            f"feature, {tolerance:.0e} at most were expected; their times can't be compared"
        )
