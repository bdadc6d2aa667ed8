"""Checkpoints of BLIP and BLIP-2: told apart, read without unpickling, and made to fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

_KINDS = {"blip": "Blip", "blip-2": "Blip2"}  # model_type -> what its classes begin with
_DAMAGED = (
    *(OSError, RuntimeError, SafetensorError),
    *(ValueError, AttributeError, TypeError, LookupError, ArithmeticError),
)


def read_blip(checkpoint: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Read a model and its processor; nothing is unpickled, and no code of the folder is run.

    Args:
        checkpoint: A folder, or a name on the Hugging Face hub; safetensors only.
        dtype: Of the weights; what the model insists on having in fp32 stays so.

    Returns:
        A `transformers.BlipForConditionalGeneration` with its `BlipProcessor`, or the same of
        BLIP-2, as the config says.

    Raises:
        ValueError: If transformers or the weights are missing, or the weights are damaged, of
            something else, or pickled.
    """
    try:
        import transformers
        from huggingface_hub.errors import StrictDataclassError
    except ImportError as error:
        raise ValueError(
            "BLIP needs transformers 4.57 or newer: pip install 'alpha-clip[export]'"
        ) from error

    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        if config.model_type not in _KINDS:
            raise LookupError(f"a model of type {config.model_type!r}, not one of {[*_KINDS]}")
        kind = _KINDS[config.model_type]
        model, found = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(
            checkpoint, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
        # transformers fills these with random numbers and goes on.
        if absent := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
            raise LookupError(f"{len(absent)} of its weights are missing, such as {absent[0]}")
        processor = getattr(transformers, f"{kind}Processor").from_pretrained(
            checkpoint, trust_remote_code=False
        )
    except (*_DAMAGED, StrictDataclassError) as error:
        raise _no_blip(checkpoint, f"{type(error).__name__}: {error}") from error
    return model, processor


def fit_processor(processor: Any, config: Any) -> None:
    """Make a BLIP-2 processor fit its model: a picture's tokens, and the side to pad on.

    Args:
        processor: A `transformers.Blip2Processor`; it is changed.
        config: The model's config.

    Raises:
        ValueError: If they do not agree on the token that stands for the picture: the model would
            ignore the picture, without a word.
    """
    token, wanted = str(processor.image_token), config.image_token_index
    found = processor.tokenizer.convert_tokens_to_ids(token)
    if wanted is None or found != wanted:
        raise ValueError(
            f"in BLIP-2's config token {wanted} stands for the picture (image_token_index), but "
            f"the tokenizer's {token} is {found}; take a newer copy of the checkpoint"
        )
    processor.num_query_tokens = config.num_query_tokens
    # A decoder goes on where the text ends; an encoder counts from where it begins.
    left = config.use_decoder_only_language_model
    processor.tokenizer.padding_side = "left" if left else "right"


def _no_blip(checkpoint: str, why: str) -> ValueError:
    folder = Path(checkpoint)
    advice = (
        "download it and give the folder, with its config and safetensors, or give a name such as "
        "Salesforce/blip-image-captioning-large where the Hugging Face hub can be reached"
    )
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        advice = (
            "its weights are pickled, and are not read; write them as safetensors with "
            "save_pretrained, on a machine where you trust them"
        )
    return ValueError(
        f"{checkpoint} does not hold BLIP or BLIP-2 for transformers ({why[:300]}); {advice}"
    )
