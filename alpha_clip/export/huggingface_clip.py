"""Export to stock transformers: a whole `CLIPModel`, both towers, with its tokenizer.

For what compares pictures with texts: zero-shot pipelines, retrieval, guidance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from alpha_clip.export.base import (
    ExportReport,
    check_difference,
    fresh_directory,
    largest_difference,
    probe,
)
from alpha_clip.export.huggingface import write_processor
from alpha_clip.export.layouts.clip import clip_tower, convert_text, text_config
from alpha_clip.export.model_card import Card
from alpha_clip.model import AlphaClip

_NO_NOTES = Card()
_USAGE = """
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

model = CLIPModel.from_pretrained(".")
processor, tokenizer = CLIPImageProcessor.from_pretrained("."), CLIPTokenizer.from_pretrained(".")
rgba = np.dstack([np.asarray(image.convert("RGB")), 255 * mask])  # uint8 [H, W, 4]
inputs = processor(rgba, input_data_format="channels_last", return_tensors="pt")
texts = tokenizer(["a purple dress", "a bouquet"], padding=True, return_tensors="pt")
chances = model(**inputs, **texts).logits_per_image.softmax(-1)
"""


def export(
    model: AlphaClip,
    directory: str | Path,
    overwrite: bool = False,
    tolerance: float = 1e-5,
    card: Card = _NO_NOTES,
) -> ExportReport:
    """Write a model with both towers for transformers, and compare the two.

    Args:
        model: What to export; open_clip's own ViT with CLIP's text tower.
        directory: Folder to write; it appears whole or not at all.
        overwrite: Whether to replace a folder that is there.
        tolerance: Largest difference between features, relative to the largest feature.
        card: What the model card says beyond what the model tells.

    Returns:
        Where it lies and how much it differs.

    Raises:
        ValueError: If transformers' CLIP has no such tower, or the features differ.
    """
    from transformers import CLIPConfig, CLIPModel

    tower, text = clip_tower(model), text_config(model)
    config = CLIPConfig(
        text_config=text, vision_config=tower.config, projection_dim=tower.config["projection_dim"]
    )
    with fresh_directory(Path(directory), overwrite) as folder:
        twin = CLIPModel(config)
        state = {**tower.state, **convert_text(model)}
        buffers = {key for key in twin.state_dict() if key.endswith("position_ids")}
        if set(twin.state_dict()) - buffers != set(state):
            wrong = (set(twin.state_dict()) - buffers) ^ set(state)
            raise ValueError(f"weights without a place in transformers: {wrong}")
        twin.load_state_dict({**twin.state_dict(), **state})
        twin.save_pretrained(folder, safe_serialization=True)
        write_processor(model, folder, channels=4)
        _write_tokenizer(model, folder, text["vocab_size"])
        difference = compare(model, folder)
        check_difference(difference, tolerance)
        card.write(folder, model, _USAGE, difference)
    return ExportReport(str(directory), difference)


@torch.no_grad()
def compare(model: AlphaClip, directory: str | Path) -> float:
    """Load an export with stock transformers; return its largest difference to `model`.

    Relative to the largest feature, in fp32, over images with random regions and random texts.
    """
    from transformers import CLIPModel

    twin: Any = CLIPModel.from_pretrained(directory).eval()
    rgba, config = probe(model), twin.config.text_config
    generator = torch.Generator().manual_seed(0)
    shape = (len(rgba), config.max_position_embeddings)
    tokens = torch.randint(1, config.vocab_size - 2, shape, generator=generator)
    tokens[:, -1] = config.eos_token_id
    tokens[0, 2:] = 0  # a short one
    tokens[0, 2] = config.eos_token_id
    theirs = twin(input_ids=tokens, pixel_values=rgba)
    images, texts = (
        model.encode_image(rgba, normalize=True),
        model.encode_text(tokens, normalize=True),
    )
    return max(
        largest_difference(images, theirs.image_embeds),
        largest_difference(texts, theirs.text_embeds),
        largest_difference(model.logit_scale.exp() * images @ texts.T, theirs.logits_per_image),
    )


def _write_tokenizer(model: AlphaClip, folder: Path, vocabulary: int) -> None:
    """Write open_clip's own byte-pair tokenizer as transformers has it, if that is the model's."""
    from open_clip.tokenizer import SimpleTokenizer

    own = SimpleTokenizer()
    if len(own.encoder) != vocabulary:
        return
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    encoder = {names.get(word, word): number for word, number in own.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in own.bpe_ranks), ""]
    record = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": model.context_length,
        "bos_token": names["<start_of_text>"],
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), names["<end_of_text>"]),
    }
    (folder / "vocab.json").write_text(json.dumps(encoder, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(record, indent=1) + "\n")
