"""The names of the paper's own package, so that scripts written for it run unchanged.

`load`, `available_models` and `tokenize` are called, and the loaded model behaves, as in
SunzeY/AlphaCLIP (alpha_clip/alpha_clip.py, alpha_clip/model.py). What differs is listed at `load`.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from open_clip.model import convert_weights_to_lp
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import download_pretrained_from_url, get_pretrained_url
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from alpha_clip.architectures import Precision
from alpha_clip.attention import encode_with_attention
from alpha_clip.factory import create_from_weights
from alpha_clip.geometry import resize
from alpha_clip.layouts import from_published
from alpha_clip.model import AlphaClip, join_alpha
from alpha_clip.pooled import short_way
from alpha_clip.regions import Region, region_to_alpha
from alpha_clip.transforms import Normalisation
from alpha_clip.weights import read_weights_file

_MODELS = (
    *("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"),
    *("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"),
)


def available_models() -> list[str]:
    """Return the names of OpenAI's models."""
    return list(_MODELS)


def load(
    name: str,
    alpha_vision_ckpt_pth: str | os.PathLike[str] | None = "None",
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | None = None,
    lora_adapt: bool = False,
    rank: int = 16,
) -> tuple[AlphaClip, Preprocess]:
    """Load an OpenAI CLIP with an alpha channel, as the paper's package does.

    For the published numbers, texts are encoded with their padding, and the weights of an image
    tower without a checkpoint go through float16 (OpenAI's are float16 already); `create_model`
    does neither. Unlike in the paper's package, weights must fit exactly, alpha may be left out
    (the whole image), inputs of another type are cast, and LoRA weights are found in the checkpoint
    and merged whatever `lora_adapt` says.

    Args:
        name: One of `available_models()`, or a file in OpenAI's layout.
        alpha_vision_ckpt_pth: Published weights of the image tower; `"None"` or `None` for none.
        device: Where to put the model; a GPU if there is one. There the weights are float16, on
            the CPU float32.
        jit: Must be false: TorchScript archives have no alpha.
        download_root: Where to keep OpenAI's files; `~/.cache/clip` by default.
        lora_adapt: Accepted for scripts.
        rank: Accepted for scripts; the weights say it.

    Returns:
        The model in eval mode, and its preprocessing.

    Raises:
        ValueError: If there is no such model, or the weights do not fit.
    """
    if jit:
        raise ValueError("TorchScript archives have no alpha; pass jit=False, or use torch.compile")
    no_alpha = alpha_vision_ckpt_pth in (None, "None")
    if lora_adapt and no_alpha:
        warnings.warn(
            f"no LoRA layers of rank {rank} are added for training; use peft on model.visual",
            stacklevel=2,
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    base = read_weights_file(*_find(name, download_root))
    alpha = None if no_alpha else read_weights_file(alpha_vision_ckpt_pth)  # type: ignore[arg-type]
    precision: Precision = "fp32" if device.type == "cpu" else "fp16"
    model = create_from_weights(None, base, alpha, precision)
    model.name = _open_clip_name(name) if name in _MODELS else model.name
    _speak_published(model)
    if alpha is None:
        convert_weights_to_lp(model.visual, torch.float16)
    if precision == "fp32":
        model.float()
    return model.to(device).eval(), Preprocess(model.image_size, model.normalisation)


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = True) -> Tensor:
    """Return the token ids of texts, int32 `[texts, context_length]`.

    Args:
        texts: One text or several.
        context_length: Length to pad to.
        truncate: Whether to cut longer texts.

    Raises:
        ValueError: If a text is too long and must not be cut.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokenizer = SimpleTokenizer(context_length=context_length)
    for text in () if truncate else texts:
        length = len(tokenizer.encode(text)) + 2  # the start and the end
        if length > context_length:
            raise ValueError(
                f"{text[:40]!r}... has {length} tokens, more than the context of {context_length}; "
                "shorten it, or pass truncate=True"
            )
    ids: Tensor = tokenizer(texts)
    return ids.int()


def _open_clip_name(name: str) -> str:
    return name.replace("/", "-").replace("@336px", "-336")


def _find(name: str, download_root: str | None) -> tuple[str, bool]:
    """Return the file of a model, and whether its content was verified."""
    if name in _MODELS:
        url = get_pretrained_url(_open_clip_name(name), "openai")
        try:
            return download_pretrained_from_url(url, download_root), True
        except OSError as error:
            raise ValueError(
                f"{name} could not be fetched from {url} ({error}); fetch it by other means and "
                "pass the path of the file instead of the name"
            ) from error
    if os.path.isfile(name):
        return name, False
    raise ValueError(f"{name} is no file and none of {', '.join(_MODELS)}")


class Preprocess(T.Compose):  # type: ignore[misc]
    """OpenAI's preprocessing, and the same geometry for a region.

    `transforms` may be changed, as scripts do: an alpha goes through whatever resizing and centre
    cropping stands there.

    Args:
        size: Side of the result, in pixels.
        normalisation: What the tower expects of its input.
    """

    def __init__(self, size: int, normalisation: Normalisation) -> None:
        super().__init__(
            [
                T.Resize(size, interpolation=InterpolationMode.BICUBIC),
                T.CenterCrop(size),
                _to_rgb,
                T.ToTensor(),
                T.Normalize(normalisation.mean, normalisation.std),
            ]
        )
        self.normalisation = normalisation

    def __call__(self, image: Image.Image, region: Region = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the normalised image `[3, S, S]`, with a region also its alpha `[1, S, S]`.

        Args:
            image: Any PIL image.
            region: What to look at, in the coordinates of `image`.

        Raises:
            TypeError, ValueError: If the region does not fit the image.
            ValueError: If `transforms` moves pixels in a way that can't be repeated for alpha.
        """
        if region is None:
            pixels: Tensor = super().__call__(image)
            return pixels
        alpha = torch.from_numpy(region_to_alpha(region, image.height, image.width))[None]
        moved: Any = image
        for step in self.transforms:
            moved = step(moved)
            if isinstance(step, T.Resize):
                alpha = resize(alpha, T.functional.get_dimensions(moved)[-2:])
            elif isinstance(step, T.CenterCrop):
                alpha = step(alpha)
            elif step is not _to_rgb and not isinstance(step, T.ToTensor | T.Normalize):
                raise ValueError(
                    "expected no steps but Resize, CenterCrop, ToTensor and Normalize, got "
                    f"{step}, which can't be repeated for alpha; use RegionTransform"
                )
        return moved, self.normalisation.alpha(alpha)


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


class _PublishedCalls:
    """`visual(image, alpha)` and `visual(image, alpha, return_attn=True)`."""

    input_resolution: int
    whole_image: float
    takes_short_way = True

    def forward(
        self, image: Tensor, alpha: Tensor | None = None, return_attn: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed images.

        Args:
            image: Normalised RGB `[batch, 3, height, width]`, or RGBA.
            alpha: Normalised alpha `[batch, 1, height, width]`; the whole image if left out.
            return_attn: Whether to return the last block's attention, too.

        Returns:
            Embeddings `[batch, dim]`; the attention is `[batch * heads, tokens, tokens]`.

        Raises:
            ValueError: If the shapes do not fit together, or there are no blocks of tokens.
        """
        dtype = self.conv1.weight.dtype  # type: ignore[attr-defined]
        rgba = image.to(dtype)
        if alpha is not None or rgba.shape[1] == 3:
            rgba = join_alpha(rgba, alpha, self.whole_image)
        if not return_attn:
            run = short_way(self) or super().forward  # type: ignore[arg-type,misc]
            features: Tensor = run(rgba)
            return features
        features, attention = encode_with_attention(self, rgba)  # type: ignore[arg-type]
        return features, attention.flatten(0, 1)


class PublishedClip(AlphaClip):
    """An `AlphaClip` that encodes texts as the paper's code does, number for number."""

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Embed texts with their padding; see `AlphaClip.encode_text`."""
        features: Tensor = self.clip.encode_text(tokens)  # type: ignore[operator]
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features


class PublishedViT(_PublishedCalls, VisionTransformer):  # type: ignore[misc]
    """open_clip's ViT, called as the paper's."""


class PublishedResNet(_PublishedCalls, ModifiedResNet):  # type: ignore[misc]
    """open_clip's ModifiedResNet, called as the paper's."""


def _speak_published(model: AlphaClip) -> None:
    """Let a model be called, and its tower be given weights, as in the paper's package."""
    visual: Any = model.visual
    # The same objects with other methods: every parameter and key stays where it is.
    model.__class__ = PublishedClip
    visual.__class__ = PublishedViT if isinstance(visual, VisionTransformer) else PublishedResNet
    visual.input_resolution = model.image_size
    visual.whole_image = model.normalisation.whole_image
    visual.register_load_state_dict_pre_hook(_rename_published)
    for block in model.clip.transformer.resblocks:  # type: ignore[union-attr]
        block.attn.register_forward_pre_hook(_write_out_attention, with_kwargs=True)


def _write_out_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keep torch from its fused kernel, which rounds in another order."""
    return args, {**kwargs, "need_weights": True}


def _rename_published(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Accept the published names in `visual.load_state_dict`."""
    own = {k: state.pop(k) for k in list(state) if k.startswith(prefix)}
    renamed = from_published({k.removeprefix(prefix): v for k, v in own.items()})
    state.update({prefix + k: v for k, v in renamed.items()})
