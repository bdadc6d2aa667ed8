"""SigLIP's both towers and its tokenizer, as stock transformers has them."""

import json
import logging
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from test_huggingface import VIT, build
from test_huggingface_towers import siglip
from torch import nn

import alpha_clip
from alpha_clip.cli import main
from alpha_clip.export import huggingface, huggingface_siglip
from alpha_clip.export.huggingface_siglip import compare, export
from alpha_clip.export.layouts import siglip_text
from alpha_clip.model import AlphaClip
from alpha_clip.transforms import RegionTransform

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CONTEXT = 16
SIGLIP = {
    "context_length": CONTEXT,
    "vocab_size": 700,
    "width": 32,
    "heads": 2,
    "layers": 2,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
SIGLIP2 = {**SIGLIP, "act_kwargs": {"approximate": "tanh"}}
FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
CORPUS = [
    "a photo of two red cars in a garden 0123456789",
    "the quick brown fox jumps over a lazy dog",
    "grüße aus münchen über ein naïve café",
    "日本語のテキスト、猫の写真。",
    "οδος σας",
] * 9
TEXTS = [
    "a photo of a red car",
    "Grüße aus MÜNCHEN, naïve Café!",
    "日本語のテキスト、猫の写真。",
    "\uff08\uff34\uff37\uff2f\uff09\u3000\uff76\uff9e\uff70\uff83\uff9e\uff9d\uff01",  # other width
    "It's \u201cit\u2019s\u201d: #1 (50%)... don't [stop]",
    "red_car__two_",
    "  two \n\t cars\u00a0 ",
    "",
    " ?! ",
    "red </s> <eos> <pad> <extra_id_7> dog",
    "u\u0308ber A\u030a \ufb01x \x1bcar",
    "ΟΔΟΣ ΣΑΣ Σ",
    "an unseen 🦊 and a long one " + "fox " * 40,
]


def save_tokenizer(folder: Path, backend: Any, kind: str, **named: str) -> str:
    """Save a tokenizer as a folder of the hub has it."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, padding_side="right", **named
    )
    fast.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": kind}))
    return str(folder)


def unigram(folder: Path) -> str:
    """SigLIP's: sentencepiece's unigrams, `</s>` at the end, and for padding, too."""
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    named = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return save_tokenizer(folder, backend, "T5TokenizerFast", **named)


def pairs(folder: Path) -> str:
    """SigLIP 2's, which is Gemma's: byte pairs, bytes for what is unknown, `<eos>`, `<pad>`."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    backend.enable_padding(length=9)  # left over from somebody's call
    backend.enable_truncation(2)
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")}
    return save_tokenizer(folder, backend, "GemmaTokenizerFast", **named)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with a tokenizer as SigLIP's and one as SigLIP 2's. Read only."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {"SigLIP": unigram(folder / "unigram"), "SigLIP 2": pairs(folder / "pairs")}


def both(text: dict[str, Any], kind: Any = CustomTextCLIP, bias: Any = -10, **trunk: Any) -> Any:
    """SigLIP with both towers, but small; `kind` is open_clip's class."""
    tower = siglip(**trunk)
    own = {key: value for key, value in text.items() if key != "clip"}
    clip = kind(64, VIT, own, init_logit_bias=bias, **text.get("clip", {}))
    clip.visual = tower.visual
    for name, parameter in clip.named_parameters():
        if not name.startswith(("visual", "logit")) and "weight" not in name.split("token_")[-1]:
            nn.init.normal_(parameter, std=0.3)  # biases and positions are zero, or nearly
    transform = RegionTransform(32, geometry="squash")
    return AlphaClip(clip.eval(), "small", {"vision_cfg": {}, "text_cfg": own}, transform)


@pytest.fixture(scope="module")
def model(vocabularies: dict[str, str]) -> AlphaClip:
    """SigLIP with the tokenizer of a folder. Read only."""
    torch.manual_seed(0)
    return both({**SIGLIP, "hf_tokenizer_name": vocabularies["SigLIP"]})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: AlphaClip) -> Path:
    """An export of it. Read only."""
    folder = tmp_path_factory.mktemp("siglip") / "out"
    assert export(model, folder).max_difference <= 1e-5
    return folder


@torch.no_grad()
def test_stock_transformers_compares_pictures_with_texts(exported: Path, model: AlphaClip) -> None:
    twin = transformers.SiglipModel.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    inputs = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    rgba = torch.randn(3, 4, 32, 32)
    theirs = twin(pixel_values=rgba, **inputs)  # no mask among them, which would hide the padding
    ours = model(rgba, model.tokenizer(TEXTS))[0]
    torch.testing.assert_close(theirs.logits_per_image, ours, atol=1e-5, rtol=1e-5)
    tokens = model.encode_text(model.tokenizer(TEXTS), normalize=True)
    torch.testing.assert_close(theirs.text_embeds, tokens, atol=1e-5, rtol=1e-5)
    images = model.encode_image(rgba, normalize=True)
    torch.testing.assert_close(theirs.image_embeds, images, atol=1e-5, rtol=1e-5)
    other = torch.cat([rgba[:, :3], -rgba[:, 3:]], 1)
    assert not torch.allclose(twin(pixel_values=other, **inputs)[0], theirs[0], atol=1e-3)


@torch.no_grad()
def test_texts_have_to_fill_the_context(exported: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.model_max_length == CONTEXT
    assert set(tokenizer("a red car")) == {"input_ids"}
    tower = transformers.SiglipTextModel.from_pretrained(exported).eval()
    short = tokenizer("a red car", return_tensors="pt")
    whole = tokenizer("a red car", padding="max_length", return_tensors="pt")
    assert whole.input_ids.shape == (1, CONTEXT)
    different = tower(**short).pooler_output - tower(**whole).pooler_output
    assert different.abs().max() > 1e-2


def test_every_weight_comes_from_ours(exported: Path, model: AlphaClip) -> None:
    twin = transformers.SiglipModel.from_pretrained(exported)
    count = sum(p.numel() for p in model.clip.parameters())
    assert sum(p.numel() for p in twin.parameters()) == count
    state = siglip_text.convert_text(model)
    assert all(torch.equal(twin.state_dict()[k], v) for k, v in state.items())
    assert float(twin.logit_bias.detach()) == -10
    assert {p.name for p in exported.iterdir()} == FILES | TOKENIZER_FILES


@pytest.mark.parametrize(
    ("text", "trunk", "names"),
    [
        (SIGLIP, "gelu", ("gelu", "gelu")),
        (SIGLIP2, "gelu_tanh", ("gelu_pytorch_tanh", "gelu_pytorch_tanh")),
        (SIGLIP, "gelu_tanh", ("gelu", "gelu_pytorch_tanh")),
        ({**SIGLIP, "clip": {"quick_gelu": True}}, "gelu", ("quick_gelu", "gelu")),
    ],
)
def test_each_tower_has_its_activation(
    tmp_path: Path, text: dict[str, Any], trunk: str, names: tuple[str, str]
) -> None:
    assert export(both(text, act_layer=trunk), tmp_path / "out").max_difference <= 1e-5
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    parts = [record[f"{part}_config"] for part in ("text", "vision")]
    assert tuple(part["hidden_act"] for part in parts) == names
    assert [part["layer_norm_eps"] for part in parts] == [1e-6, 1e-6]
    assert all(parts[0][f"{name}_token_id"] is None for name in ("bos", "eos", "pad"))
    assert record["architectures"] == ["SiglipModel"]


def test_siglip_2_has_the_same_class(tmp_path: Path, vocabularies: dict[str, str]) -> None:
    text = {**SIGLIP2, "hf_tokenizer_name": vocabularies["SigLIP 2"], "width": 48, "mlp_ratio": 3.7}
    model = both(text, act_layer="gelu_tanh", patch_size=16)
    assert export(model, tmp_path / "both").max_difference <= 1e-5
    record = json.loads((tmp_path / "both" / "config.json").read_text())
    sizes = {"hidden_size": 48, "intermediate_size": 177, "projection_size": 64}
    assert sizes.items() <= record["text_config"].items()
    assert {p.name for p in (tmp_path / "both").iterdir()} == FILES | TOKENIZER_FILES
    assert huggingface.export(model, tmp_path / "image").max_difference <= 1e-5


def test_a_scale_and_bias_with_an_axis_are_read_too(tmp_path: Path) -> None:
    model = both({**SIGLIP, "clip": {"nonscalar_logit_scale": True}})
    assert model.logit_scale.shape == (1,)
    assert export(model, tmp_path / "out").max_difference <= 1e-5


def test_a_text_tower_that_is_no_module_apart_is_read_too(tmp_path: Path) -> None:
    model = both(SIGLIP, CLIP)
    assert not hasattr(model.clip, "text")
    assert export(model, tmp_path / "out").max_difference <= 1e-5


def test_a_tower_without_a_projection_gets_the_identity(tmp_path: Path) -> None:
    model = both({**SIGLIP, "proj_type": "none", "width": 64})
    assert export(model, tmp_path / "out").max_difference <= 1e-5
    twin = transformers.SiglipModel.from_pretrained(tmp_path / "out")
    assert torch.equal(twin.text_model.head.weight.detach(), torch.eye(64))
    added = sum(p.numel() for p in twin.text_model.head.parameters())
    count = sum(p.numel() for p in model.clip.parameters())
    assert sum(p.numel() for p in twin.parameters()) == count + added


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"no_causal_mask": False}, "it is causal"),
        (
            {"no_causal_mask": False, "pool_type": "argmax", "proj_bias": False},
            "it is causal, .*'arg",
        ),
        ({"pool_type": "first"}, "it pools by 'first', not 'last'"),
        ({"pool_type": "eos"}, "it pools by 'eos'"),
        ({"proj_bias": False}, "its projection has no bias"),
        ({"proj_type": "none"}, "it gives 32 numbers, the image tower 64"),
        ({"ls_init_value": 0.1}, "it has layer scale"),
        ({"embed_cls": True}, "it has a class token"),
        ({"qk_norm": True}, "its blocks are CustomResidualAttentionBlock"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_other_text_towers_are_refused_by_name(
    tmp_path: Path, more: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=f"text tower of small is none that SiglipModel .*{why}"):
        export(both({**SIGLIP, **more}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_only_the_module_tells_is_refused_too(tmp_path: Path) -> None:
    model = both(SIGLIP, bias=None)
    with pytest.raises(ValueError, match="the model has no logit_bias; export its image tower"):
        export(model, tmp_path / "out")
    model = both(SIGLIP)
    model.clip.text.use_pad_mask = True
    with pytest.raises(ValueError, match="it masks the padding"):
        export(model, tmp_path / "out")
    model.clip.text.use_pad_mask = False
    model.clip.text.transformer.resblocks[0].mlp.gelu = nn.ReLU()
    with pytest.raises(ValueError, match="its activation is ReLU"):
        export(model, tmp_path / "out")
    model.clip.text.text_projection = nn.Linear(32, 48)
    with pytest.raises(ValueError, match="it gives 48 numbers, the image tower 64"):
        export(model, tmp_path / "out")
    model.clip.text = nn.Identity()
    with pytest.raises(ValueError, match="it is a Identity"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_image_towers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ViT-plain is no SigLIP tower"):
        export(build(VIT, "ViT-plain"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_differs_is_not_kept(tmp_path: Path, model: AlphaClip) -> None:
    with pytest.raises(ValueError, match="it was not kept"):
        export(model, tmp_path / "out", tolerance=-1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["text.text_projection.bias", "logit_bias", "logit_scale"])
def test_compare_notices_another_model(exported: Path, model: AlphaClip, part: str) -> None:
    assert compare(model, exported) <= 1e-5
    parameter = model.clip.get_parameter(part)
    before = parameter.detach().clone()
    try:
        parameter.data += 0.01
        assert compare(model, exported) > 1e-5
    finally:
        parameter.data.copy_(before)


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, vocabularies: dict[str, str]
) -> dict[str, tuple[AlphaClip, Path]]:
    """An export with either tokenizer, and its model. Read only."""
    found = {}
    for kind, name in vocabularies.items():
        torch.manual_seed(0)
        model, folder = (
            both({**SIGLIP, "hf_tokenizer_name": name}),
            tmp_path_factory.mktemp("saved"),
        )
        export(model, folder)
        found[kind] = (model, folder)
    return found


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["SigLIP", "SigLIP 2"])
def test_the_tokenizer_is_the_models(
    saved: dict[str, tuple[AlphaClip, Path]], kind: str, text: str
) -> None:
    model, folder = saved[kind]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = tokenizer(text, padding="max_length", truncation=True)["input_ids"]
    assert theirs == model.tokenizer(text)[0].tolist()


@pytest.mark.parametrize("text", ["cat &amp; dog", "grÃ¼ÃŸe"])
def test_entities_and_wrongly_decoded_text_stay_as_they_are(
    exported: Path, model: AlphaClip, text: str
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    theirs = tokenizer(text, padding="max_length", truncation=True)["input_ids"]
    assert theirs != model.tokenizer(text)[0].tolist()


def test_an_added_word_is_still_one(tmp_path: Path, vocabularies: dict[str, str]) -> None:
    own = transformers.AutoTokenizer.from_pretrained(vocabularies["SigLIP 2"])
    own.add_tokens(["zebra", "<Zoo>"])
    own.save_pretrained(tmp_path / "own")
    model = both({**SIGLIP, "hf_tokenizer_name": str(tmp_path / "own")})
    export(model, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = model.tokenizer("a Zebra, a <Zoo> zoo")[0].tolist()
    assert own.convert_tokens_to_ids("zebra") in ours
    assert own.backend_tokenizer.padding["length"] == 9  # which the export has none of
    assert theirs("a Zebra, a <Zoo> zoo", padding="max_length")["input_ids"] == ours
    bare = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = bare.encode("a zoo").ids  # which no clean-up of "<Zoo>" may turn into that word
    assert ids == [i for i in model.tokenizer("a zoo")[0].tolist() if i != own.pad_token_id]


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was looked up in the network; nothing is found there."""
    hosts: list[Any] = []

    def look_up(host: Any, *_: Any, **__: Any) -> None:
        hosts.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return hosts


def test_without_its_tokenizer_an_export_says_so(
    tmp_path: Path, looked_up: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = both({**SIGLIP, "hf_tokenizer_name": "nobody/has-this"})
    with caplog.at_level(logging.WARNING, "alpha_clip"):
        assert export(model, tmp_path / "out").max_difference <= 1e-5
    assert looked_up == []
    assert "no tokenizer: nobody/has-this is not on this machine" in caplog.text
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("nobody/has-this")' in card
    assert "small letters, no punctuation" in card
    assert f'padding="max_length", max_length={CONTEXT}' in card


def test_a_tokenizer_in_the_hubs_cache_is_found(
    tmp_path: Path, looked_up: list[Any], vocabularies: dict[str, str]
) -> None:
    home = tmp_path / "models--somebody--siglip"
    (home / "snapshots").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots" / ("0" * 40)).symlink_to(vocabularies["SigLIP"])
    options = {"clean": "canonicalize", "cache_dir": str(tmp_path)}
    text = {**SIGLIP, "hf_tokenizer_name": "somebody/siglip", "tokenizer_kwargs": options}
    export(both(text), tmp_path / "out")
    assert looked_up == []
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES | TOKENIZER_FILES


@pytest.mark.parametrize("case", ["unnamed", "clean-up", "gone", "empty", "slow", "broken"])
def test_a_tokenizer_that_could_not_be_the_same_is_left_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    vocabularies: dict[str, str],
    case: str,
) -> None:
    text: dict[str, Any] = {**SIGLIP, "hf_tokenizer_name": vocabularies["SigLIP"]}
    if case == "unnamed":
        del text["hf_tokenizer_name"]
    elif case == "clean-up":
        text["tokenizer_kwargs"] = {"clean": "lower"}
    elif case in ("gone", "empty"):
        text["hf_tokenizer_name"] = str(tmp_path / case)
        (tmp_path / "empty").mkdir()
    elif case == "slow":
        fast = transformers.PreTrainedTokenizerFast
        monkeypatch.setattr(fast, "is_fast", property(lambda _: False))
    else:
        monkeypatch.setattr(huggingface_siglip, "canonical", lambda record: record)
    with caplog.at_level(logging.WARNING, "alpha_clip"):
        export(both(text), tmp_path / "out")
    why = {
        "unnamed": "the config of small names none of the hub's",
        "clean-up": "gets its texts from clean-up 'lower', not 'canonicalize'",
        "gone": "/gone can't be read: Repo id must",
        "empty": "/empty can't be read: Repo id must",
        "slow": "is none of the tokenizers library's",
        "broken": "gave other ids",
    }
    assert why[case] in caplog.text
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("names none of the hub's" in card) == (case == "unnamed")


def test_the_cards_code_runs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported)
    (code,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    image, mask = Image.new("RGB", (50, 40), "red"), np.zeros((40, 50), np.uint8)
    mask[:20] = 1
    place: dict[str, Any] = {"np": np, "image": image, "mask": mask}
    exec(code, place)  # the export's own, a moment old
    assert place["chances"].shape == (1, 2)
    assert 0 < float(place["chances"].detach().max()) < 1


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the config of SigLIP's tower mean a small one."""
    create = timm.create_model
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    monkeypatch.setattr(timm, "create_model", lambda name, **k: create(name, **{**k, **size}))


@pytest.mark.usefixtures("small_timm")
def test_the_command_writes_it(tmp_path: Path, vocabularies: dict[str, str]) -> None:
    vision = {
        "image_size": 32,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_pool": "map",
        "timm_proj": "none",
    }
    text = {**SIGLIP2, "hf_tokenizer_name": vocabularies["SigLIP 2"]}
    config = {"embed_dim": 64, "init_logit_bias": -10, "custom_text": True}
    config |= {"vision_cfg": vision, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"resize_mode": "squash"}})
    )
    model, _, _ = alpha_clip.create_model(f"local-dir:{tmp_path}")
    alpha_clip.save_checkpoint(model, tmp_path / "model")
    arguments = ["--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert main(["export", "--format", "huggingface_siglip", *arguments]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES | TOKENIZER_FILES
    assert compare(model, tmp_path / "out") <= 1e-5
