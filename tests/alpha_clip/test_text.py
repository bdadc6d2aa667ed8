from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor

import alpha_clip
from alpha_clip.text import Tokenizer, encode_text

VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
TEXT: dict[str, Any] = {
    "context_length": 16, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2
}  # fmt: skip


def texts(lengths: list[int], context: int = 16, end: int = 98) -> Tensor:
    """Ids as OpenAI's tokenizer gives them: the end has the largest id, then zeros."""
    tokens = torch.zeros(len(lengths), context, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.randint(1, 98, (length - 1,))
        row[length - 1] = end
    return tokens


CAUSAL: dict[str, Any] = {
    "CLIP": lambda: CLIP(24, VISION, TEXT),
    "text tower apart": lambda: CustomTextCLIP(24, VISION, TEXT),
    "end by id": lambda: CustomTextCLIP(24, VISION, {**TEXT, "pool_type": "eos", "eos_id": 98}),
    "linear projection": lambda: CLIP(24, VISION, {**TEXT, "proj_bias": True}),
}
OTHERS: dict[str, Any] = {
    "both ways (SigLIP)": lambda: CustomTextCLIP(
        24, VISION, {**TEXT, "no_causal_mask": True, "pool_type": "last"}
    ),
    "class token (CoCa)": lambda: CoCa(
        24,
        {**TEXT, "width": 24, "context_length": 16, "heads": 2, "layers": 1},
        {**TEXT, "embed_cls": True, "output_tokens": True},
        {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    ),
}


@pytest.mark.parametrize("build", [*CAUSAL.values(), *OTHERS.values()], ids=[*CAUSAL, *OTHERS])
@pytest.mark.parametrize("lengths", [[2, 5, 3], [16, 4], [1], [7, 7]])
def test_features_are_open_clips_own(build: Any, lengths: list[int]) -> None:
    clip = build().eval()
    tokens = texts(lengths)
    with torch.no_grad():
        cut = F.normalize(encode_text(clip, tokens), dim=-1)
        whole = F.normalize(clip.encode_text(tokens), dim=-1)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("build", CAUSAL.values(), ids=CAUSAL.keys())
def test_only_the_longest_text_is_computed(build: Any) -> None:
    clip = build().eval()
    tower = clip if hasattr(clip, "transformer") else clip.text
    seen: list[int] = []
    tower.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for lengths in ([2, 5, 3], [8, 2], [9], [16]):
        encode_text(clip, texts(lengths))
    assert seen == [8, 8, 16, 16]


def test_gradients_are_the_same() -> None:
    clip, tokens = CAUSAL["CLIP"]().eval(), texts([4, 6])
    weight = clip.token_embedding.weight
    (cut,) = torch.autograd.grad(encode_text(clip, tokens).square().sum(), weight)
    (whole,) = torch.autograd.grad(clip.encode_text(tokens).square().sum(), weight)
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_a_compiled_model_gets_the_whole_context() -> None:
    clip, tokens = CAUSAL["CLIP"]().eval(), texts([4, 6])
    compiled = torch.compile(lambda t: encode_text(clip, t), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), clip.encode_text(tokens))


@pytest.mark.parametrize("shape", [(2, 17), (9,), (1, 2, 3)])
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \[texts, up to 16\]"):
        encode_text(CAUSAL["CLIP"](), torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("tokens", [["a dog"], torch.zeros(1, 16)])
def test_what_is_no_token_ids_is_refused(tokens: Any) -> None:
    with pytest.raises(TypeError, match="expected token ids from the model's tokenizer"):
        encode_text(CAUSAL["CLIP"](), tokens)


def test_tokenizer_takes_one_text_or_several() -> None:
    tokenizer = Tokenizer("mine", {"context_length": 12})
    assert tokenizer("a dog").shape == (1, 12)
    assert torch.equal(tokenizer(["a dog", "a"])[:1], tokenizer("a dog"))
    with pytest.raises(TypeError, match="got a list of int, str"):
        tokenizer(["a", 3])  # type: ignore[list-item]


def test_a_tower_whose_tokenizer_must_be_fetched_is_built_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("open_clip.tokenizer.HFTokenizer.__init__", offline)
    _, _, tokenizer = alpha_clip.create_model("ViT-B-16-SigLIP")
    with pytest.raises(OSError, match="no network"):
        tokenizer("a dog")
