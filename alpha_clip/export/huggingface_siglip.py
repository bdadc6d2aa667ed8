"""Export to stock transformers: a whole `SiglipModel`, both towers, SigLIP's and SigLIP 2's.

The checkpoints of SigLIP 2 with a fixed resolution have the same class; those that take any aspect
ratio (NaFlex) are none of open_clip's. The tokenizer is written if this machine has it.
"""

from __future__ import annotations

import json
import logging
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
from alpha_clip.export.layouts.siglip import siglip_tower
from alpha_clip.export.layouts.siglip_text import canonical, convert_text, text_config
from alpha_clip.export.model_card import Card
from alpha_clip.model import AlphaClip

log = logging.getLogger(__name__)
_NO_NOTES = Card()
_TOKENIZER_CONFIG = "tokenizer_config.json"
_USAGE = """
from transformers import AutoTokenizer, CLIPImageProcessor, SiglipModel

model, processor = SiglipModel.from_pretrained("."), CLIPImageProcessor.from_pretrained(".")
{tokenizer}
rgba = np.dstack([np.asarray(image.convert("RGB")), 255 * mask])  # uint8 [H, W, 4]
inputs = processor(rgba, input_data_format="channels_last", return_tensors="pt")
# Every text fills the whole context, and nothing masks its padding: SigLIP was trained so.
whole = dict(padding="max_length", max_length={context}, truncation=True, return_tensors="pt")
ids = tokenizer(["a purple dress", "a bouquet"], **whole).input_ids
chances = model(**inputs, input_ids=ids).logits_per_image.sigmoid()  # each on its own
"""
_WITH_TOKENIZER = """\
# It cleans texts up itself; HTML's entities and wrongly decoded text are for the caller to mend.
tokenizer = AutoTokenizer.from_pretrained(".")"""
_HUBS_TOKENIZER = """\
# The tokenizer is not in this folder. Clean the texts: small letters, no punctuation, _ is a space.
tokenizer = AutoTokenizer.from_pretrained("{name}")"""
_NO_TOKENIZER = "tokenizer = ...  # not in this folder; the model's config names none of the hub's"
_PROBES = ["", "Two  RED_cars.", "Grüße, naïve café!", "日本語、テキスト", "</s> <eos>", "a " * 99]


def export(
    model: AlphaClip,
    directory: str | Path,
    overwrite: bool = False,
    tolerance: float = 1e-5,
    card: Card = _NO_NOTES,
) -> ExportReport:
    """Write a model with both towers for transformers, and compare the two.

    Without its tokenizer on this machine (nothing is fetched) the export has none; the log and the
    model card say so.

    Args:
        model: What to export; timm's SigLIP with SigLIP's text tower.
        directory: Folder to write; it appears whole or not at all.
        overwrite: Whether to replace a folder that is there.
        tolerance: Largest difference between features, relative to the largest feature.
        card: What the model card says beyond what the model tells.

    Returns:
        Where it lies and how much it differs.

    Raises:
        ValueError: If transformers' SigLIP has no such tower, or the features differ.
    """
    with fresh_directory(Path(directory), overwrite) as folder:
        _write_model(model, folder)
        write_processor(model, folder, channels=4)
        missing = _write_tokenizer(model, folder)
        difference = compare(model, folder)
        check_difference(difference, tolerance)
        card.write(folder, model, _usage(model, missing is None), difference)
    if missing is not None:
        log.warning("the export has no tokenizer: %s", missing)
    return ExportReport(str(directory), difference)


@torch.no_grad()
def compare(model: AlphaClip, directory: str | Path) -> float:
    """Load an export with stock transformers; return its largest difference to `model`.

    Relative to the largest feature, or logit, in fp32, over images with random regions and random
    texts.
    """
    from transformers import SiglipModel

    twin: Any = SiglipModel.from_pretrained(directory).eval()
    rgba, config = probe(model), twin.config.text_config
    generator = torch.Generator().manual_seed(0)
    shape = (len(rgba), config.max_position_embeddings)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    tokens[0, 2:] = 1  # a short one
    theirs = twin(input_ids=tokens, pixel_values=rgba)
    images = model.encode_image(rgba, normalize=True)
    texts = model.encode_text(tokens, normalize=True)
    logits = model.logit_scale.exp() * images @ texts.T + model.clip.get_parameter("logit_bias")
    return max(
        largest_difference(images, theirs.image_embeds),
        largest_difference(texts, theirs.text_embeds),
        largest_difference(logits, theirs.logits_per_image),
    )


def _write_model(model: AlphaClip, folder: Path) -> None:
    """Write both towers with transformers' own `save_pretrained`.

    Raises:
        ValueError: If a tower is none of SigLIP's, or its weights do not fit the class.
    """
    from transformers import SiglipConfig, SiglipModel

    tower = siglip_tower(model)
    config = SiglipConfig(text_config=text_config(model), vision_config=tower.config)
    with torch.device("meta"):  # random weights for the towers would take longest of all
        twin = SiglipModel(config)
    state = {f"vision_model.{key}": value for key, value in tower.state.items()}
    state |= convert_text(model)
    own = set(twin.state_dict())
    if own != set(state):
        raise ValueError(f"weights without a place in transformers: {own ^ set(state)}")
    twin.load_state_dict(state, assign=True)
    twin.save_pretrained(folder, safe_serialization=True)


def _write_tokenizer(model: AlphaClip, folder: Path) -> str | None:
    """Write the model's tokenizer if this machine has it, so that it cleans texts up by itself.

    Returns:
        `None`, or why there is none.
    """
    from transformers import AutoTokenizer

    config, context = model.config["text_cfg"], model.tokenizer.context_length
    name, options = config.get("hf_tokenizer_name"), config.get("tokenizer_kwargs") or {}
    if not name:
        return f"the config of {model.name} names none of the hub's"
    if options.get("clean") != "canonicalize":
        return f"{name} gets its texts from clean-up {options.get('clean')!r}, not 'canonicalize'"
    try:
        own = _find_tokenizer(name, context, options)
    except (OSError, ValueError, ImportError) as error:
        return f"{name} can't be read: {str(error).splitlines()[0]}"
    if own is None:
        return f"{name} is not on this machine; model.tokenizer('') fetches it"
    if not getattr(own.tokenizer, "is_fast", False):
        return f"{name} is none of the tokenizers library's"
    files = [folder / "tokenizer.json", folder / _TOKENIZER_CONFIG]
    backend = canonical(json.loads(own.tokenizer.backend_tokenizer.to_str()))
    files[0].write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
    files[1].write_text(json.dumps(_tokenizer_config(own.tokenizer, context), indent=1) + "\n")
    twin = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    whole = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    if torch.equal(twin(_PROBES, **whole).input_ids, own(_PROBES)):
        return None
    for file in files:
        file.unlink()
    return f"saved, {name} gave other ids"


def _find_tokenizer(name: str, context: int, options: dict[str, Any]) -> Any | None:
    """Return open_clip's tokenizer from a folder or from the hub's cache; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from open_clip.tokenizer import HFTokenizer

    folder = Path(name)
    if not (folder / _TOKENIZER_CONFIG).is_file():
        # Asked for by its name, transformers would look the hub up even where it may not fetch.
        cached = try_to_load_from_cache(name, _TOKENIZER_CONFIG, options.get("cache_dir"))
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    return HFTokenizer(str(folder), context_length=context, local_files_only=True, **options)


def _tokenizer_config(tokenizer: Any, context: int) -> dict[str, Any]:
    named = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # others build their own normalizer
        "model_max_length": context,
        "model_input_names": ["input_ids"],  # no mask: the tower looks at the padding
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        **named,
    }


def _usage(model: AlphaClip, with_tokenizer: bool) -> str:
    """Return the code for the model card."""
    name = model.config["text_cfg"].get("hf_tokenizer_name")
    missing = _HUBS_TOKENIZER.format(name=name) if name else _NO_TOKENIZER
    line = _WITH_TOKENIZER if with_tokenizer else missing
    return _USAGE.format(tokenizer=line, context=model.tokenizer.context_length)
