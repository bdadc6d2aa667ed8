"""Texts: the tokenizer of a model, and encoding without the padding."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# Lengths that matrix kernels like: they take the same path as for the whole context, so that even
# the rounding is the same, and there are few shapes to compile for.
_MULTIPLE = 8


class Tokenizer:
    """Turns texts into ids for a model's text tower.

    Some tokenizers are fetched; that happens when the first text arrives, so that a vision tower
    alone needs no network.

    Args:
        name: Architecture, in open_clip's spelling, or any other name.
        text_cfg: The text part of open_clip's model config.
    """

    def __init__(self, name: str, text_cfg: dict[str, Any]) -> None:
        self.name = name
        self.text_cfg = text_cfg
        self.context_length: int = text_cfg.get("context_length", 77)
        self._encode: Any = None

    def __call__(self, texts: str | list[str]) -> Int[Tensor, "texts context"]:
        """Return ids, cut or padded to the context length.

        Args:
            texts: One text or several.

        Raises:
            TypeError: If these are not texts.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not all(isinstance(text, str) for text in texts):
            kinds = sorted({type(text).__name__ for text in texts})
            raise TypeError(f"expected a text or a list of texts, got a list of {', '.join(kinds)}")
        if self._encode is None:
            self._encode = self._create()
        ids: Tensor = self._encode(texts)
        return ids

    def _create(self) -> Any:
        import open_clip

        known = open_clip.get_model_config(self.name) is not None
        if not known and self.text_cfg.get("hf_tokenizer_name"):
            from open_clip.tokenizer import HFTokenizer

            return HFTokenizer(
                self.text_cfg["hf_tokenizer_name"],
                context_length=self.context_length,
                **self.text_cfg.get("tokenizer_kwargs") or {},
            )
        return open_clip.get_tokenizer(
            self.name if known else "", context_length=self.context_length
        )


def encode_text(clip: Any, tokens: Int[Tensor, "texts context"]) -> Float[Tensor, "texts dim"]:
    """Embed texts; a causal tower is given the batch cut to its longest text (a multiple of 8).

    In a causal tower what follows the end of a text can't change its embedding, so leaving it out
    gives the same features for a fraction of the work. Towers that look both ways (SigLIP), at the
    padding (CoCa) or through another library (Hugging Face) get the whole context.

    Args:
        clip: An open_clip model.
        tokens: Ids as given by its tokenizer.

    Raises:
        TypeError: If the tokens are not whole numbers.
        ValueError: If they are longer than the context, or not two-dimensional.
    """
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"expected token ids from the model's tokenizer, got {kind}")
    tower = clip if hasattr(clip, "token_embedding") else getattr(clip, "text", None)
    context = getattr(tower, "context_length", None) or tokens.shape[-1]
    if tokens.ndim != 2 or tokens.shape[1] > context:
        raise ValueError(
            f"expected token ids of shape [texts, up to {context}], got {list(tokens.shape)}; the "
            "model's tokenizer cuts texts to the context length"
        )
    if not _is_causal(tower) or torch.compiler.is_compiling():
        features: Tensor = clip.encode_text(tokens)
        return features
    end = _ends(tower, tokens)
    length = int(end.max()) + 1
    return _encode_cut(tower, tokens, end, min(length + -length % _MULTIPLE, tokens.shape[1]))


def _pool(tower: Any) -> str | None:
    """Return how a tower pools; a CLIP without a tower apart calls it by another name."""
    pool: str | None = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    return pool


def _is_causal(tower: Any) -> bool:
    return (
        getattr(tower, "attn_mask", None) is not None
        and hasattr(tower, "token_embedding")
        and _pool(tower) in ("argmax", "eos")
        and getattr(tower, "cls_emb", None) is None
        and not getattr(tower, "use_pad_mask", False)
    )


def _ends(tower: Any, tokens: Tensor) -> Tensor:
    """Return where each text ends: the largest id in OpenAI's vocabulary, else the named one."""
    if _pool(tower) == "argmax":
        return tokens.argmax(dim=-1)
    eos: Any = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
    return tokens.eq(eos).int().argmax(dim=-1)


def _encode_cut(tower: Any, tokens: Tensor, end: Tensor, length: int) -> Tensor:
    """Do what open_clip's text tower does, on the first `length` places."""
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens[:, :length]).to(dtype)
    x = x + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    x = tower.ln_final(x[torch.arange(len(x), device=x.device), end])
    projection = tower.text_projection
    if projection is None:
        return x  # type: ignore[no-any-return]
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection  # type: ignore[no-any-return]
