"""BLIP-2 and InstructBLIP, small, from their configs, with the graft of an EVA tower."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from test_huggingface import TEXT, VIT, build
from test_multimodal import IMAGE, LAYERS, WORDS, logits, picture, tokenizer, zeroed
from torch import nn

import alpha_clip
from alpha_clip.export import blip2, huggingface
from alpha_clip.export.multimodal import swap_vision_tower
from alpha_clip.export.region_processor import RegionProcessor
from alpha_clip.model import AlphaClip
from alpha_clip.regions import Box
from alpha_clip.transforms import RegionTransform

transformers = pytest.importorskip("transformers")
EVA = "eva_giant_patch14_224"
QUERIES = 4
QFORMER = {**LAYERS, "num_attention_heads": 2, "encoder_hidden_size": 64, "vocab_size": len(WORDS)}


def eva(name: str = EVA, **trunk: Any) -> AlphaClip:
    """EVA-CLIP's giant tower as open_clip builds it, but small, and with no weight zero or one."""
    clip = open_clip.model.CLIP(32, VIT, TEXT)
    with torch.device("meta"):
        clip.visual = open_clip.timm_model.TimmModel(EVA, 64, 224, pool="token", proj=None)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
    size |= {"mlp_ratio": 4}
    clip.visual.trunk = timm.create_model(
        name, **{**size, "num_classes": 32, "global_pool": "token", **trunk}
    )
    clip.visual.image_size = (32, 32)
    alpha_clip.add_alpha_channel(clip.visual)
    torch.manual_seed(0)
    for parameter in clip.visual.parameters():
        nn.init.normal_(parameter, std=0.2)
    config = {"vision_cfg": {}, "text_cfg": TEXT}
    return AlphaClip(clip.eval(), "small-EVA", config, RegionTransform(32, geometry="squash"))


def consumer(kind: str = "Blip2", depth: int = 2, **vision: Any) -> tuple[Any, Any]:
    """A model with a tower of three channels, and its processor."""
    words = tokenizer()
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": depth}
    tower |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, **vision}
    text = {"model_type": "opt", **LAYERS, "num_attention_heads": 2, "vocab_size": len(WORDS)}
    text |= {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 64}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=tower,
        qformer_config=QFORMER,
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    more = {"qformer_tokenizer": words} if kind == "InstructBlip" else {}
    made = getattr(transformers, f"{kind}Processor")(
        images, words, num_query_tokens=QUERIES, **more
    )
    return model.eval(), made


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the small tower. Read only."""
    folder = tmp_path_factory.mktemp("eva") / "out"
    assert blip2.export(eva(), folder).max_difference <= 1e-5
    return folder


KINDS = ["Blip2", "InstructBlip"]
ASKED = "what is this"


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_looks_where_it_is_told(exported: Path, kind: str) -> None:
    model, processor = consumer(kind)
    assert swap_vision_tower(model, exported) is model
    ask = RegionProcessor(processor, exported)
    regions = [Box(0, 0, 30, 50), Box(50, 0, 90, 50), None]
    inputs = [ask(picture(), region, text=ASKED) for region in regions]
    left, right, whole = (logits(model, given) for given in inputs)
    assert not torch.allclose(left, right, atol=1e-3)
    assert not torch.allclose(left, whole, atol=1e-3)
    answer = model.generate(**inputs[0], min_new_tokens=3, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_with_alpha_at_zero_it_answers_as_before(tmp_path: Path, kind: str) -> None:
    """The model's own weights, given an alpha channel and put back, change nothing."""
    model, processor = consumer(kind)
    blip2.export(zeroed(eva()), tmp_path / "alpha")
    swap_vision_tower(model, tmp_path / "alpha")
    twin, _ = consumer(kind)
    state = dict(model.state_dict())
    stem = next(key for key in state if key.endswith("patch_embedding.weight"))
    state[stem] = state[stem][:, :3]
    twin.load_state_dict(state)
    expected = logits(twin, processor(images=picture(), text=ASKED, return_tensors="pt"))
    ask = RegionProcessor(processor, tmp_path / "alpha")
    for region in (Box(0, 0, 30, 50), None):
        found = logits(model, ask(picture(), region, text=ASKED))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_last_block_is_left_out_and_the_norm_stays(exported: Path) -> None:
    """The tokens are EVA's behind its second block, in the norm that the model was trained with."""
    model, _ = consumer(depth=2)
    norm = {k: v.clone() for k, v in model.vision_model.post_layernorm.state_dict().items()}
    swap_vision_tower(model, exported)
    rgba, trunk = torch.randn(2, 4, 32, 32), eva().visual.trunk
    trunk.blocks = trunk.blocks[:2]
    trunk.norm.load_state_dict(norm)
    with torch.no_grad():
        theirs = model.vision_model(rgba).last_hidden_state
        torch.testing.assert_close(theirs, trunk.forward_features(rgba), atol=1e-5, rtol=1e-5)


def test_precision_mode_and_frozen_weights_stay(exported: Path) -> None:
    model, _ = consumer()
    model.to(torch.bfloat16).requires_grad_(False)
    swap_vision_tower(model, exported)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.vision_model.training


def test_stock_classes_refuse_what_is_saved_rather_than_lose_alpha(
    exported: Path, tmp_path: Path
) -> None:
    model, _ = consumer()
    swap_vision_tower(model, exported)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {"name": "eva02_tiny_patch14_224"},
        {"init_values": 0.1},
        {"qkv_bias": False},
        {"use_rot_pos_emb": True},
        {"class_token": False, "global_pool": "avg"},
        {"global_pool": "avg"},
        {"num_reg_tokens": 2},
        {"use_post_norm": True},
        {"swiglu_mlp": True},
        {"qk_norm": True},
        {"use_pre_transformer_norm": True},
    ],
    ids=lambda more: next(reversed(more)),
)
def test_other_trunks_are_refused_by_name(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="small-EVA is no tower that BLIP-2 has"):
        blip2.export(eva(**more), tmp_path / "out")
    with pytest.raises(ValueError, match="small is no tower that BLIP-2 has"):
        blip2.export(build(VIT), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused(exported: Path, tmp_path: Path) -> None:
    huggingface.export(build(VIT), tmp_path / "clip")
    cases = [
        ({}, "clip", "holds a clip_vision_model of 4 channels, expected a blip_2_vision_model"),
        ({}, "none", "is no export for BLIP-2: expected what `alpha-clip export --format blip2`"),
        ({"image_size": 64}, "", "does not fit .*image_size 64 is not 32"),
        ({"depth": 4}, "", "does not fit .*4 blocks are more than its 3"),
        ({"intermediate_size": 128}, "", "does not fit .*intermediate_size 128 is not 256"),
        (
            {"qkv_bias": False},
            "",
            "does not fit .*qkv.bias is .., not .192,",
        ),
    ]
    for vision, folder, message in cases:
        model, _ = consumer(**vision)
        before = {k: v.clone() for k, v in model.vision_model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            swap_vision_tower(model, tmp_path / folder if folder else exported)
        after = model.vision_model.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())


def test_another_clip_is_warned_of(
    exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = consumer()
    swap_vision_tower(model, exported)
    assert "does not seem to come from the same CLIP" in caplog.text
    caplog.clear()
    twin, _ = consumer()
    source = eva()
    stem = source.visual.trunk.patch_embed.proj
    with torch.no_grad():
        stem.weight.copy_(twin.vision_model.embeddings.patch_embedding.weight)
        stem.weight.mul_(1.1).add_(0.01 * torch.randn_like(stem.weight))  # as training does
    blip2.export(source, tmp_path / "alpha")
    swap_vision_tower(twin, tmp_path / "alpha")
    assert caplog.text == ""
