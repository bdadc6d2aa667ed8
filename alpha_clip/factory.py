"""Building models: any open_clip architecture, with an alpha channel."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alpha_clip.architectures import (
    LOCAL,
    Precision,
    build_by_name,
    build_from_config,
    config_of,
    fetch_tag,
    is_timm,
    resize_input,
)
from alpha_clip.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointConfig,
    load_weights,
    read_config,
    read_weights,
)
from alpha_clip.geometry import Geometry
from alpha_clip.late_alpha import FIRST_LAYER, AlphaEntry
from alpha_clip.layouts import OWN_ALPHA, infer_config
from alpha_clip.model import AlphaClip
from alpha_clip.text import Tokenizer
from alpha_clip.training_checkpoint import read_training_checkpoint
from alpha_clip.transforms import RegionTransform
from alpha_clip.weights import Weights, read_weights_file

_POSITION_IDS = "text.transformer.embeddings.position_ids"


def create_model(
    name: str | None = None,
    pretrained: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: Precision = "fp32",
    device: str | torch.device = "cpu",
    geometry: Geometry | None = None,
    image_size: int | None = None,
    alpha_block: int | AlphaEntry | None = None,
) -> tuple[AlphaClip, RegionTransform, Tokenizer]:
    """Build an Alpha-CLIP with its transform and tokenizer.

    Args:
        name: An open_clip architecture (`open_clip.list_models()`), or `local-dir:FOLDER` with an
            `open_clip_config.json`. May be left out where the weights say it: a folder of ours, or
            both towers in OpenAI's layout, which are then taken for OpenAI's (QuickGELU).
        pretrained: Weights of the CLIP to start from: an open_clip tag, a file (OpenAI's archives
            and state dicts, open_clip's), or `None`.
        checkpoint: Weights with alpha: a folder written by `save_checkpoint`, a `.ckpt` of a
            training run, or a file of the published code's. Those last hold the image tower alone;
            the text tower is `pretrained`'s.
        precision: Type of the weights.
        device: Where to put the model.
        geometry: How the transform makes an image square, see `RegionTransform`; by default as the
            weights expect it.
        image_size: Side of the input in pixels, if it should be another than the architecture's;
            the position embeddings are interpolated.
        alpha_block: In front of which block of the image tower alpha enters, see `AlphaEntry`; by
            default where the checkpoint has it, else at the first layer, as in the paper (0). With
            a late one many regions are cheap: they share the blocks before in `encode_regions`.

    Returns:
        The model in eval mode, `transform(image, region)`, and `tokenizer(texts)`.

    Raises:
        ValueError: If there is no such architecture, tag or file, or the weights do not fit.
    """
    if name is not None and not name.startswith(LOCAL):
        name = name.replace("/", "-")  # OpenAI's spelling
    if checkpoint is not None and _is_own(Path(checkpoint)):
        if pretrained is not None:
            raise ValueError(f"{checkpoint} holds both towers; leave pretrained={pretrained!r} out")
        own = _read_own(Path(checkpoint))
        model = _load_own(*own, str(checkpoint), name, precision, image_size, alpha_block)
    else:
        base, facts = _read_base(name, pretrained)
        alpha = None if checkpoint is None else read_weights_file(checkpoint)
        entry = AlphaEntry.of(alpha_block or 0)
        model = create_from_weights(name, base, alpha, precision, image_size, facts, entry)
        model.base = None if pretrained is None else Path(pretrained).name
    if geometry is not None:
        model.transform = model.transform.replace(geometry=geometry)
    return model.to(device).eval(), model.transform, model.tokenizer


def create_from_weights(
    name: str | None,
    base: Weights | None = None,
    alpha: Weights | None = None,
    precision: Precision = "fp32",
    image_size: int | None = None,
    facts: dict[str, Any] | None = None,
    entry: AlphaEntry = FIRST_LAYER,
) -> AlphaClip:
    """Build a model from weights that were read already; see `create_model`.

    Args:
        name: Architecture, or `None` to infer it from weights in OpenAI's layout.
        base: Weights of both towers.
        alpha: Weights with alpha, of the image tower alone or of both.
        precision: Type of the weights.
        image_size: Side of the input in pixels, or the architecture's own.
        facts: What open_clip knows of the base weights; see `fetch_tag`.
        entry: Where alpha enters.

    Raises:
        ValueError: If the parts do not go together.
    """
    _check_roles(name, base, alpha)
    whole = alpha if alpha and not alpha.visual_only else base
    # OpenAI's weights need it, whatever the architecture's name says.
    quick_gelu = any(w.quick_gelu for w in (base, alpha) if w)
    quick_gelu = quick_gelu or bool(facts and facts.get("quick_gelu"))
    if name is not None:
        model = build_by_name(name, precision, quick_gelu, image_size, facts, entry)
    elif whole is not None:
        config = infer_config(whole.state, whole.origin)
        model = build_from_config("custom", config, precision, image_size, entry)
    else:
        raise ValueError(
            "expected the name of an architecture or a checkpoint with both towers, got neither"
        )
    for weights in (base, alpha):
        if weights is not None:
            # What open_clip lists for an architecture belongs to it, whatever size it has.
            _load(model, weights, resize=image_size is not None or facts is not None)
    if base is not None:
        model.base = Path(base.origin).name
    if image_size is not None and image_size != model.image_size:  # timm
        resize_input(model, image_size)
    return model


def _check_roles(name: str | None, base: Weights | None, alpha: Weights | None) -> None:
    if base is not None and base.visual_only:
        raise ValueError(
            f"{base.origin} holds an image tower alone; pass it as checkpoint, and the CLIP it "
            "belongs to as pretrained"
        )
    if alpha is not None and not alpha.has_alpha:
        raise ValueError(f"{alpha.origin} is a CLIP without alpha; pass it as pretrained")
    if alpha is not None and not alpha.visual_only and base:
        raise ValueError(f"{alpha.origin} holds both towers; leave pretrained out")
    if alpha is not None and alpha.visual_only and not base:
        if name is None:
            raise ValueError(
                f"{alpha.origin} holds an image tower alone; give the CLIP it belongs to, such as "
                "create_model('ViT-L-14', pretrained='openai', checkpoint=...)"
            )
        warnings.warn(
            f"{alpha.origin} holds an image tower alone: the text tower of {name} keeps random "
            "weights; pass pretrained='openai' (or a file) to compare with texts",
            stacklevel=4,
        )


def load_checkpoint(
    directory: str | os.PathLike[str],
    precision: Precision = "fp32",
    device: str | torch.device = "cpu",
) -> AlphaClip:
    """Build the model that `save_checkpoint` wrote, in eval mode.

    Args:
        directory: The folder.
        precision: Type of the weights.
        device: Where to put the model.

    Raises:
        ValueError: If the folder is not a whole checkpoint of ours.
    """
    return create_model(checkpoint=directory, precision=precision, device=device)[0]


def _load_own(
    saved: CheckpointConfig,
    state: dict[str, Tensor],
    origin: str,
    name: str | None,
    precision: Precision,
    image_size: int | None,
    alpha_block: int | AlphaEntry | None,
) -> AlphaClip:
    if name is not None and _layout(config_of(name)) != _layout(saved.model_cfg):
        raise ValueError(f"{origin} holds a {saved.name}, not a {name}; leave the name out")
    entry = saved.entry if alpha_block is None else AlphaEntry.of(alpha_block)
    model = build_from_config(saved.name, saved.model_cfg, precision, image_size, entry)
    if is_timm(model.config) and saved.transform.size != model.image_size:
        resize_input(model, saved.transform.size)
    state = _as_open_clip_loads(model.clip, state, image_size is not None)
    if entry != saved.entry:
        if any(bool(value.any()) for key, value in state.items() if key.endswith(OWN_ALPHA)):
            raise ValueError(
                f"{origin} was trained with alpha at {saved.entry}, which can't be moved to "
                f"{entry}; leave alpha_block out, or start from the CLIP it came from"
            )
        state = _with_zero_alpha(model.clip, state)
    load_weights(model.clip, state, origin)
    model.transform, model.base = saved.transform, saved.base
    if image_size is not None:
        model.transform = saved.transform.replace(size=image_size)
        if is_timm(model.config):
            resize_input(model, image_size)
    return model


def _load(model: AlphaClip, weights: Weights, resize: bool) -> None:
    """Load a file's weights; a tower without alpha gets zeros for it."""
    target: nn.Module = model.visual if weights.visual_only else model.clip
    state = _as_open_clip_loads(model.clip, weights.state, resize)
    if weights.visual_only:
        state = {key.removeprefix("visual."): value for key, value in state.items()}
    if not weights.has_alpha:
        state = _with_zero_alpha(target, state)
    load_weights(target, state, weights.origin)


def _with_zero_alpha(target: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the alpha of a state dict by that which a new tower starts with."""
    own = target.state_dict()
    zeros = {k: torch.zeros_like(own[k]) for k in own if k.endswith(OWN_ALPHA)}
    return {k: v for k, v in state.items() if not k.endswith(OWN_ALPHA)} | zeros


def _as_open_clip_loads(clip: Any, state: dict[str, Tensor], resize: bool) -> dict[str, Tensor]:
    """Do to a foreign state dict what open_clip's own loader does before it is strict.

    Positions are interpolated only where another input size was asked for: that weights of 336 px
    were given for a tower of 224 px is more likely a mistake.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed

    state = dict(convert_state_dict(clip, dict(state)))
    if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for scalar in ("logit_scale", "logit_bias"):  # once of shape [], once of shape [1]
        if scalar in state and getattr(clip, scalar, None) is not None:
            if state[scalar].numel() == 1:
                state[scalar] = state[scalar].reshape(getattr(clip, scalar).shape)
    bias = getattr(clip, "logit_bias", None)
    if bias is not None and "logit_scale" in state:  # a CLIP to be trained as SigLIP is
        state.setdefault("logit_bias", torch.zeros_like(bias))
    if _POSITION_IDS not in clip.state_dict():  # older transformers saved them
        state.pop(_POSITION_IDS, None)
    if resize:
        resize_pos_embed(state, clip)
    return state


def _read_base(
    name: str | None, pretrained: str | os.PathLike[str] | None
) -> tuple[Weights | None, dict[str, Any] | None]:
    """Read the weights that a tag or a path means, with what open_clip knows of a tag."""
    if pretrained is None:
        return None, None
    if Path(pretrained).is_file():
        return read_weights_file(pretrained), None
    if not isinstance(pretrained, str) or Path(pretrained).suffix:
        raise ValueError(
            f"there is no file {pretrained}; expected weights or one of open_clip's tags"
        )
    if name is None:
        raise ValueError(f"name the architecture that the weights {pretrained!r} belong to")
    file, facts = fetch_tag(name, pretrained)
    return read_weights_file(file, trusted=True), facts


def _is_own(checkpoint: Path) -> bool:
    """Whether a path means a folder or a training checkpoint of ours, not a foreign file."""
    if checkpoint.name == WEIGHTS_FILE and (checkpoint.parent / CONFIG_FILE).is_file():
        return True
    is_file = checkpoint.is_file() or (checkpoint.suffix and not checkpoint.exists())
    return checkpoint.suffix == ".ckpt" or not is_file


def _read_own(checkpoint: Path) -> tuple[CheckpointConfig, dict[str, Tensor]]:
    if checkpoint.suffix == ".ckpt":
        if not checkpoint.is_file():
            raise ValueError(f"there is no training checkpoint {checkpoint}")
        return read_training_checkpoint(checkpoint)
    folder = checkpoint.parent if checkpoint.is_file() else checkpoint
    return read_config(folder), read_weights(folder)


def _layout(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out what OpenAI's weights turn on in an architecture that does not name it."""
    return {key: value for key, value in config.items() if key != "quick_gelu"}
