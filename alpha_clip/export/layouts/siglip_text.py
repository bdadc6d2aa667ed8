"""SigLIP's texts as transformers has them: the text tower, and the tokenizer's own clean-up."""

from __future__ import annotations

import unicodedata
from typing import Any

import torch
from torch import Tensor, nn

from alpha_clip.export.layouts.clip import convert_blocks, text_of
from alpha_clip.model import AlphaClip

# Half and full width, and ligatures: characters that ftfy takes apart before open_clip cleans up.
_WIDE = [*map(chr, range(0xFF01, 0xFFEF)), *"ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"]
_CONTROL = r"[\x00-\x08\x0B\x0E-\x1F\x7F\x{206A}-\x{206F}\x{FEFF}\x{FFF9}-\x{FFFC}]"
# ASCII's, and the quotation marks that ftfy makes ASCII's.
_PUNCTUATION = r"[!-/:-@\[-`{-~\x{02BC}\x{2018}-\x{201F}]"
_LAST_SIGMA = r"(?<=[\p{Lu}\p{Ll}])Σ(?![\p{Lu}\p{Ll}])"  # Python's lower case knows where words end


def text_config(model: AlphaClip) -> dict[str, Any]:
    """Describe the text tower in transformers' words.

    Raises:
        ValueError: If `SiglipModel` can't express it; the message says why.
    """
    text: Any = text_of(model)
    wrong = _differences(model, text)
    if wrong:
        raise ValueError(
            f"the text tower of {model.name} is none that SiglipModel can express: "
            f"{', '.join(wrong)}; export its image tower: --format huggingface"
        )
    block, (weight, _) = text.transformer.resblocks[0], _head(text)
    return {
        "hidden_size": text.token_embedding.embedding_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(text.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "vocab_size": text.token_embedding.num_embeddings,
        "max_position_embeddings": len(text.positional_embedding),
        "projection_size": len(weight),
        "hidden_act": _activation(block.mlp.gelu),
        "layer_norm_eps": text.ln_final.eps,
        # The tower does not use them, and the class's own are those of CLIP's vocabulary.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def convert_text(model: AlphaClip) -> dict[str, Tensor]:
    """Rename and reshape the text tower's weights, the logit scale and bias, for `SiglipModel`.

    Returns:
        Weights, fp32, on the CPU.
    """
    text: Any = text_of(model)
    state, whole = text.state_dict(), model.clip.state_dict()
    weight, bias = _head(text)
    out = {
        "logit_scale": whole["logit_scale"].reshape(1),
        "logit_bias": whole["logit_bias"].reshape(1),
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.head.weight": weight,
        "text_model.head.bias": bias,
        **{f"text_model.final_layer_norm.{p}": state[f"ln_final.{p}"] for p in ("weight", "bias")},
    }
    count = len(text.transformer.resblocks)
    out |= convert_blocks(state, count, "transformer.resblocks", "text_model.encoder.layers")
    return {k: v.detach().float().cpu().contiguous().clone() for k, v in out.items()}


def canonical(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Let a tokenizer clean its texts up, as open_clip does before SigLIP's tokenizer gets them.

    Underscores become spaces, ASCII's punctuation goes, letters become small, white space becomes
    one space. Of what ftfy mends before that, characters of other width, ligatures, curly quotes,
    control characters and Unicode's form are covered; not HTML's entities (`&amp;`), text that was
    decoded wrongly, C1 controls and terminal escapes.

    Args:
        tokenizer: The content of a `tokenizer.json`.

    Returns:
        The same with that as its first steps, without padding and truncation. Added tokens that no
        clean text holds, such as `</s>`, are special, so that `split_special_tokens` leaves them
        to be cleaned up where a text spells them out.
    """
    from open_clip.tokenizer import canonicalize_text

    wide = {c: n for c in _WIDE if (n := unicodedata.normalize("NFKC", c)) != c}
    steps = [
        *(_replace(old, new, "String") for old, new in wide.items()),
        _replace(_CONTROL, ""),
        {"type": "NFC"},
        _replace("_", " "),
        _replace(_PUNCTUATION, ""),
        _replace(_LAST_SIGMA, "ς"),
        {"type": "Lowercase"},
        _replace(r"\s+", " "),
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ]
    own = tokenizer["normalizer"]
    added = [
        token
        if canonicalize_text(token["content"]) == token["content"]
        else {**token, "special": True, "normalized": False}
        for token in tokenizer["added_tokens"]
    ]
    chain = {"type": "Sequence", "normalizers": steps + ([own] if own else [])}
    changes = {"normalizer": chain, "added_tokens": added, "padding": None, "truncation": None}
    return {**tokenizer, **changes}


def _replace(old: str, new: str, kind: str = "Regex") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def _head(text: Any) -> tuple[Tensor, Tensor | None]:
    """Return the projection's weight and bias; the identity where there is none (SO400M's i18n)."""
    head, width = text.text_projection, text.token_embedding.embedding_dim
    if head is None:
        return torch.eye(width), torch.zeros(width)
    return (head.weight, head.bias) if isinstance(head, nn.Linear) else (head.T, None)


def _activation(module: nn.Module) -> str | None:
    """Return transformers' name of an activation."""
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if not isinstance(module, nn.GELU):
        return None
    return "gelu_pytorch_tanh" if module.approximate == "tanh" else "gelu"


def _differences(model: AlphaClip, text: Any) -> list[str]:
    """Name what `SiglipModel` does otherwise."""
    from open_clip.transformer import ResidualAttentionBlock

    blocks: Any = getattr(getattr(text, "transformer", None), "resblocks", None)
    if blocks is None:
        return [f"it is a {type(text).__name__}"]
    if not all(type(block) is ResidualAttentionBlock for block in blocks):
        return [f"its blocks are {', '.join(sorted({type(block).__name__ for block in blocks}))}"]
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    trunk: Any = model.visual.trunk
    (weight, bias), size = _head(text), trunk.embed_dim
    found = {
        "it is causal": text.attn_mask is not None,
        "it masks the padding": getattr(text, "use_pad_mask", False),
        "it has a class token": getattr(text, "cls_emb", None) is not None,
        f"it pools by {pool!r}, not 'last'": pool != "last",
        "its projection has no bias": bias is None,
        f"it gives {len(weight)} numbers, the image tower {size}": len(weight) != size,
        "it has layer scale": not all(isinstance(block.ls_1, nn.Identity) for block in blocks),
        f"its activation is {type(blocks[0].mlp.gelu).__name__}": _activation(blocks[0].mlp.gelu)
        is None,
        "the model has no logit_bias": getattr(model.clip, "logit_bias", None) is None,
    }
    return [what for what, differs in found.items() if differs]
