"""Export to stock transformers: a `CLIPVisionModelWithProjection` with 4 channels.

Loads with plain `from_pretrained`, without any code of ours: the two kernels of the stem become one
patch embedding over four channels, and open_clip's packed attention weights are taken apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alpha_clip.export.base import (
    ExportReport,
    check_difference,
    fresh_directory,
    largest_difference,
    probe,
)
from alpha_clip.export.model_card import Card
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import AlphaConv2d

_NO_NOTES = Card()
_USAGE = """
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

tower = CLIPVisionModelWithProjection.from_pretrained(".")
processor = CLIPImageProcessor.from_pretrained(".")
rgba = np.dstack([np.asarray(image.convert("RGB")), 255 * mask])  # uint8 [H, W, 4]
inputs = processor(rgba, input_data_format="channels_last", return_tensors="pt")
features = tower(**inputs).image_embeds
"""


def export(
    model: AlphaClip,
    directory: str | Path,
    overwrite: bool = False,
    tolerance: float = 1e-5,
    card: Card = _NO_NOTES,
) -> ExportReport:
    """Write a model's image tower for transformers, and compare the two.

    Args:
        model: What to export; a ViT of open_clip's own.
        directory: Folder to write; it appears whole or not at all.
        overwrite: Whether to replace a folder that is there.
        tolerance: Largest difference between features, relative to the largest feature.
        card: What the model card says beyond what the model tells.

    Returns:
        Where it lies and how much it differs.

    Raises:
        ValueError: If transformers has no stock class for the tower, or the features differ.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**_vision_config(model))
    with fresh_directory(Path(directory), overwrite) as folder:
        twin = CLIPVisionModelWithProjection(config)
        own, state = set(twin.state_dict()), convert_state_dict(model.visual)
        own -= {"vision_model.embeddings.position_ids"}  # a buffer that some versions save
        if own != set(state):
            raise ValueError(f"weights without a place in transformers: {own ^ set(state)}")
        twin.load_state_dict({**twin.state_dict(), **state})
        twin.save_pretrained(folder, safe_serialization=True)
        _write_processor(model, folder)
        difference = compare(model, folder)
        check_difference(difference, tolerance)
        card.write(folder, model, _USAGE, difference)
    return ExportReport(str(directory), difference)


@torch.no_grad()
def compare(model: AlphaClip, directory: str | Path) -> float:
    """Load an export with stock transformers and return its largest difference to `model`.

    The difference is relative to the largest feature, in fp32, over random images with random
    regions.
    """
    from transformers import CLIPVisionModelWithProjection

    twin = CLIPVisionModelWithProjection.from_pretrained(directory).eval()
    rgba = probe(model)
    return largest_difference(model.encode_image(rgba), twin(pixel_values=rgba).image_embeds)


def convert_state_dict(visual: nn.Module) -> dict[str, Tensor]:
    """Rename and reshape an alpha ViT's weights for `CLIPVisionModelWithProjection`."""
    stem: AlphaConv2d = visual.get_submodule("conv1")  # type: ignore[assignment]
    state = visual.state_dict()
    out = {
        "vision_model.embeddings.class_embedding": state["class_embedding"],
        "vision_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": torch.cat(
            [stem.weight, stem.weight_alpha], 1
        ),
        "visual_projection.weight": state["proj"].T,
    }
    # transformers spells it so
    norms = {"ln_pre": "vision_model.pre_layrnorm", "ln_post": "vision_model.post_layernorm"}
    for ours, theirs in norms.items():
        out.update({f"{theirs}.{p}": state[f"{ours}.{p}"] for p in ("weight", "bias")})
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    blocks: Any = visual.get_submodule("transformer.resblocks")
    for i in range(len(blocks)):
        ours, theirs = f"transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
        for p in ("weight", "bias"):
            packed = state[f"{ours}.attn.in_proj_{p}"].chunk(3)
            for name, tensor in zip(("q_proj", "k_proj", "v_proj"), packed, strict=True):
                out[f"{theirs}.self_attn.{name}.{p}"] = tensor
            out.update({f"{theirs}.{v}.{p}": state[f"{ours}.{k}.{p}"] for k, v in parts.items()})
    return {k: v.detach().float().contiguous().clone() for k, v in out.items()}


def _vision_config(model: AlphaClip) -> dict[str, Any]:
    """Describe the tower in transformers' words, or refuse it by name."""
    from open_clip.transformer import VisionTransformer

    visual: Any = model.visual
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"transformers' CLIP has no {type(visual).__name__} ({model.name}); export it to "
            "another target"
        )
    block = visual.transformer.resblocks[0]
    plain = isinstance(visual.conv1, AlphaConv2d) and visual.conv1.bias is None
    plain = plain and isinstance(block.attn, nn.MultiheadAttention)
    plain = plain and getattr(visual, "attn_pool", None) is None and visual.pool_type == "tok"
    plain = plain and isinstance(block.ls_1, nn.Identity) and not visual.final_ln_after_pool
    plain = plain and not isinstance(visual.ln_pre, nn.Identity) and visual.proj is not None
    if not plain:
        raise ValueError(
            f"{model.name} is a ViT that transformers' CLIP cannot express (it needs a class "
            "token, ln_pre, a projection, and neither attention pooling nor layer scale)"
        )
    activation = type(block.mlp.gelu).__name__
    return {
        "hidden_size": visual.conv1.out_channels,
        "intermediate_size": block.mlp.c_fc.out_features,
        "projection_dim": int(visual.proj.shape[1]),
        "num_hidden_layers": len(visual.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "num_channels": 4,
        "image_size": model.image_size,
        "patch_size": visual.conv1.kernel_size[0],
        "hidden_act": {"QuickGELU": "quick_gelu", "GELU": "gelu"}[activation],
        "layer_norm_eps": visual.ln_post.eps,
    }


def _write_processor(model: AlphaClip, folder: Path) -> None:
    """Write the processor's config: RGBA arrays in, four normalised channels out."""
    n, size = model.normalisation, model.image_size
    record = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": False,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [*n.mean, n.alpha_mean],
        "image_std": [*n.std, n.alpha_std],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(record, indent=1) + "\n")
