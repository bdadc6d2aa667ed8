"""All of transformers' models with a stock CLIP or SigLIP, small, with an exported tower."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_huggingface import VIT, build
from test_huggingface_towers import siglip
from test_multimodal import GRID, IMAGE, LAYERS, WORDS, llava, picture, zeroed
from torch import nn

from alpha_clip.export import huggingface, huggingface_rgb
from alpha_clip.export.multimodal import swap_vision_tower
from alpha_clip.export.region_processor import RegionProcessor
from alpha_clip.regions import Box

transformers = pytest.importorskip("transformers")
# PaliGemma's own processor makes arrays of tensors, in which NumPy misses an argument.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
TEXT = {**LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
TEXT |= {"vocab_size": 64}
SQUARE = {"size": {"height": 32, "width": 32}}
EDGE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
CLASSES = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
LEFT, RIGHT = Box(0, 0, 30, 50), Box(50, 0, 90, 50)


def vision(tower: str, **more: Any) -> dict[str, Any]:
    heads = 2 if tower == "clip" else 4
    sizes = {"hidden_size": 64, "intermediate_size": 256, "image_size": 32, "patch_size": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": heads, **more}
    return {"model_type": f"{tower}_vision_model", **sizes}


HEADLESS = vision("siglip", vision_use_head=False)


def tokens(*more: str, **named: str) -> Any:
    """A tokenizer of `WORDS` and of special tokens, some of which it has names for."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(dict.fromkeys([*WORDS, *named.values(), *more]))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", **named},
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.add_tokens([*more], special_tokens=True)
    return tokenizer


def llava_next(tower: str, images: str = "LlavaNextImageProcessor") -> tuple[Any, Any]:
    model, processor = llava("llava_next", tower)
    processor.image_processor = getattr(transformers, images)(**EDGE, image_grid_pinpoints=GRID)
    return model, processor


def llava_padded(tower: str) -> tuple[Any, Any]:
    model, processor = llava("llava", tower)
    processor.image_processor = transformers.LlavaImageProcessor(**EDGE, do_pad=True)
    return model, processor


def like_llava(kind: str) -> Callable[[str], tuple[Any, Any]]:
    """LLaVA-NeXT-Video and Granite Vision, which cut pictures as LLaVA-NeXT does."""

    def make(tower: str) -> tuple[Any, Any]:
        full = tower == "siglip"
        select = {"vision_feature_select_strategy": "full" if full else "default"}
        shared = {"image_token_index": IMAGE, "image_grid_pinpoints": GRID, **select}
        processor = {"patch_size": 8, "num_additional_image_tokens": 0 if full else 1, **select}
        processor["image_processor"] = transformers.LlavaNextImageProcessor(
            **EDGE, image_grid_pinpoints=GRID
        )
        if kind == "granite":
            text = {k: v for k, v in TEXT.items() if k != "head_dim"} | {"num_hidden_layers": 5}
            qformer = {"model_type": "blip_2_qformer", "num_hidden_layers": 1}
            config = transformers.Granite4VisionConfig(
                vision_config=vision(tower),
                text_config={"model_type": "granite4_vision_text", **text},
                qformer_config={**qformer, "intermediate_size": 64, "cross_attention_frequency": 1},
                downsample_rate="2/4",
                deepstack_layer_map=[[-2, 0]],
                spatial_target_layers=[1, 2, 3, 4],
                **shared,
            )
            made = transformers.Granite4VisionProcessor(
                tokenizer=tokens(), downsample_rate="2/4", **processor
            )
            return transformers.Granite4VisionForConditionalGeneration(config), made
        config = transformers.LlavaNextVideoConfig(
            vision_config=vision(tower),
            text_config={"model_type": "llama", **TEXT},
            video_token_index=8,
            **shared,
        )
        made = transformers.LlavaNextVideoProcessor(
            tokenizer=tokens(video_token="<video>"),
            video_processor=transformers.LlavaNextVideoVideoProcessor(**EDGE),
            **processor,
        )
        return transformers.LlavaNextVideoForConditionalGeneration(config), made

    return make


def llava_onevision(tower: str, **more: Any) -> tuple[Any, Any]:
    full = tower == "siglip"
    config = transformers.LlavaOnevisionConfig(
        vision_config={**(HEADLESS if full else vision(tower)), **more},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_index=IMAGE,
        video_token_index=8,
        image_grid_pinpoints=GRID,
        vision_feature_select_strategy="full" if full else "default",
    )
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(**SQUARE, image_grid_pinpoints=GRID),
        tokens(video_token="<video>"),
        transformers.LlavaOnevisionVideoProcessor(**SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def vip_llava(tower: str) -> tuple[Any, Any]:
    config = transformers.VipLlavaConfig(
        vision_config=vision(tower),
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        vision_feature_layers=[-2, 0, -1],
    )
    _, processor = llava("llava", tower)
    return transformers.VipLlavaForConditionalGeneration(config), processor


def paligemma_config() -> Any:
    return transformers.PaliGemmaConfig(
        vision_config=HEADLESS,
        text_config={"model_type": "gemma", **TEXT, "vocab_size": 2048},
        image_token_index=IMAGE,
        projection_dim=32,
    )


def images_of(length: int) -> Any:
    made = transformers.SiglipImageProcessor(**SQUARE)
    made.image_seq_length = length
    return made


def paligemma(tower: str) -> tuple[Any, Any]:
    processor = transformers.PaliGemmaProcessor(images_of(16), tokens())
    return transformers.PaliGemmaForConditionalGeneration(paligemma_config()), processor


def colpali(tower: str) -> tuple[Any, Any]:
    config = transformers.ColPaliConfig(vlm_config=paligemma_config(), embedding_dim=16)
    processor = transformers.ColPaliProcessor(images_of(16), tokens())
    return transformers.ColPaliForRetrieval(config), processor


def pi0(tower: str) -> tuple[Any, Any]:
    config = transformers.PI0Config(
        vlm_config=paligemma_config(),
        dit_config={"model_type": "gemma", **TEXT},
        chunk_size=3,
        max_state_dim=4,
        max_action_dim=4,
    )
    known = {"state_mean": [0.0] * 4, "state_std": [1.0] * 4, "max_state_dim": 4}
    processor = transformers.PI0Processor(images_of(16), tokens(), chunk_size=3, **known)
    return transformers.PI0ForConditionalGeneration(config), processor


TURNS = (
    "{% for m in messages %}{% for p in m.content %}"
    "{{ '<boi>' if p.type == 'image' else p.text }}{% endfor %}{% endfor %}"
)


def gemma(kind: str) -> Callable[[str], tuple[Any, Any]]:
    """Gemma 3 and what has its processor."""

    def make(tower: str) -> tuple[Any, Any]:
        ids = {"image_token_index": IMAGE, "boi_token_index": 8, "eoi_token_index": 9}
        shared = {"vision_config": HEADLESS, "mm_tokens_per_image": 4, **ids}
        made = {
            "image_processor": transformers.Gemma3ImageProcessor(**SQUARE),
            "tokenizer": tokens(boi_token="<boi>", eoi_token="<eoi>"),
            "image_seq_length": 4,
        }
        if kind == "t5gemma2":
            encoder = {**shared, "text_config": {"model_type": "t5gemma2_text", **TEXT}}
            decoder = transformers.T5Gemma2DecoderConfig(**TEXT)
            config = transformers.T5Gemma2Config(
                encoder=transformers.T5Gemma2EncoderConfig(**encoder),
                decoder=decoder,
                image_token_index=IMAGE,
            )
            model = transformers.T5Gemma2ForConditionalGeneration(config)
            return model, transformers.Gemma3Processor(**made)
        shared["text_config"] = {"model_type": "gemma3_text", **TEXT}
        if kind == "shield":
            config = transformers.ShieldGemma2Config(**shared, yes_token_index=4, no_token_index=5)
            policies = {"policy_definitions": {"one": "what is this"}, "chat_template": TURNS}
            processor = transformers.ShieldGemma2Processor(**made, **policies)
            return transformers.ShieldGemma2ForImageClassification(config), processor
        model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**shared))
        return model, transformers.Gemma3Processor(**made)

    return make


def aya_vision(tower: str) -> tuple[Any, Any]:
    special = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL"]
    words = tokens(*special, *[f"TILE_{i}" for i in range(1, 5)])
    config = transformers.AyaVisionConfig(
        vision_config=vision(tower),
        text_config={"model_type": "cohere2", **TEXT},
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        vision_feature_select_strategy="full",
    )
    images = transformers.GotOcr2ImageProcessor(**SQUARE, max_patches=4)
    sizes = {"patch_size": 8, "img_size": 32, "downsample_factor": 2}
    processor = transformers.AyaVisionProcessor(images, words, **sizes)
    return transformers.AyaVisionForConditionalGeneration(config), processor


def cohere2_vision(tower: str) -> tuple[Any, Any]:
    config = transformers.Cohere2VisionConfig(
        vision_config=vision(tower),
        text_config={"model_type": "cohere2", **TEXT},
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    named = {"boi_token": "<boi>", "eoi_token": "<eoi>", "img_line_break_token": "<line>"}
    images = transformers.Cohere2VisionImageProcessor(**SQUARE, max_patches=4, patch_size=2)
    processor = transformers.Cohere2VisionProcessor(images, tokens(**named))
    return transformers.Cohere2VisionForConditionalGeneration(config), processor


def internvl(tower: str) -> tuple[Any, Any]:
    kind = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}[tower]
    config = transformers.InternVLConfig(
        vision_config=kind(**{k: v for k, v in vision(tower).items() if k != "model_type"}),
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
    )
    named = {"start_image_token": "<start>", "end_image_token": "<end>", "video_token": "<video>"}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(**SQUARE, max_patches=4),
        tokens(**named, context_image_token="<image>"),
        transformers.InternVLVideoProcessor(**SQUARE),
        image_seq_length=4,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


SAM = {"model_type": "sam_vision_model", "hidden_size": 16, "output_channels": 8, "mlp_dim": 16}
SAM |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
SAM |= {"window_size": 2, "global_attn_indexes": [0, 1], "num_pos_feats": 4}


def deepseek(kind: str, backend: str = "") -> Callable[[str], tuple[Any, Any]]:
    def make(tower: str) -> tuple[Any, Any]:
        name, more, size = f"DeepseekVL{kind}", {}, {}
        if kind == "Hybrid":
            more = {"high_res_vision_config": SAM}
            size = {"high_res_size": {"height": 64, "width": 64}}
        config = getattr(transformers, f"{name}Config")(
            vision_config=vision(tower),
            text_config={"model_type": "llama", **TEXT},
            image_token_id=IMAGE,
            **more,
        )
        images = getattr(transformers, f"{name}ImageProcessor{backend}")(**SQUARE, **size)
        processor = getattr(transformers, f"{name}Processor")(images, tokens(), num_image_tokens=16)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor

    return make


def vbert(kind: str) -> Callable[[str], tuple[Any, Any]]:
    """ModernVBERT and UltraVBERT, and the retriever of the former."""

    def make(tower: str) -> tuple[Any, Any]:
        base = kind.removeprefix("Col")
        text = {**LAYERS, "num_attention_heads": 2, "vocab_size": 64, "pad_token_id": 0}
        text |= {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
        config = getattr(transformers, f"{base}Config")(
            vision_config=vision(tower),
            text_config={"model_type": base.lower().replace("vbert", "bert"), **text},
            image_token_id=IMAGE,
            pixel_shuffle_factor=2,
        )
        cells = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
        special = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
        ultra = "UltraVBert" if kind == "UltraVBert" else "Idefics3"
        images = getattr(transformers, f"{ultra}ImageProcessor")(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        )
        words = tokens(*special, *cells)
        if kind == base:
            processor = transformers.Idefics3Processor(images, words, image_seq_len=4)
            return getattr(transformers, f"{kind}ForMaskedLM")(config), processor
        whole = transformers.ColModernVBertConfig(vlm_config=config, embedding_dim=16)
        processor = transformers.ColModernVBertProcessor(images, words, image_seq_len=4)
        return transformers.ColModernVBertForRetrieval(whole), processor

    return make


def dual_encoder(tower: str) -> tuple[Any, Any]:
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.CLIPVisionConfig(**vision(tower)),
        transformers.BertConfig(**LAYERS, num_attention_heads=2, vocab_size=64),
        projection_dim=16,
    )
    model = transformers.VisionTextDualEncoderModel(config=config)
    images = transformers.CLIPImageProcessor(**EDGE)
    return model, transformers.VisionTextDualEncoderProcessor(images, tokens())


@dataclass(frozen=True)
class Case:
    """A model, and what is known of it."""

    make: Callable[[str], tuple[Any, Any]]
    tower: str = "siglip"
    text: str | None = "<image> what is this"
    tiles: int = 1  # that a picture of 90 x 50 becomes
    pads: bool = False
    asked: dict[str, Any] = field(default_factory=dict)  # of the processor
    given: dict[str, Any] = field(default_factory=dict)  # to the model
    generates: bool = True
    loads: bool = True

    def built(self) -> tuple[Any, Any]:
        """The model, with no weight that is zero, and its processor."""
        model, processor = self.make(self.tower)
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model.eval(), processor

    def ask(self, processor: Any, images: Any, *regions: Any, twice: bool = False) -> Any:
        """What a processor makes of pictures, a `RegionProcessor` also of their regions."""
        more: dict[str, Any] = {"regions": regions[0]} if regions else {"return_tensors": "pt"}
        text = f"{self.text} {self.text}" if twice and self.text else self.text
        return processor(images=images, text=text, **more, **self.asked)


ONE = torch.ones(1, 3, 4)
CASES = {
    "llava_next-clip": Case(llava_next, "clip", tiles=5, pads=True),
    "llava_next-siglip": Case(llava_next, tiles=5, pads=True),
    "llava_next_video-clip": Case(like_llava("video"), "clip", tiles=5, pads=True),
    "llava_next_video-siglip": Case(like_llava("video"), tiles=5, pads=True),
    "llava_onevision-clip": Case(llava_onevision, "clip", tiles=5, pads=True),
    "llava_onevision-siglip": Case(llava_onevision, tiles=5, pads=True),
    "granite4_vision-clip": Case(like_llava("granite"), "clip", tiles=5, pads=True),
    "granite4_vision-siglip": Case(like_llava("granite"), tiles=5, pads=True),
    "vipllava": Case(vip_llava, "clip"),
    "paligemma": Case(paligemma),
    "gemma3": Case(gemma("gemma3"), text="<boi> what is this"),
    "gemma3-pan_and_scan": Case(
        gemma("gemma3"),
        text="<boi> what is this",
        tiles=3,
        asked={"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16},
    ),
    "t5gemma2": Case(
        gemma("t5gemma2"),
        text="<boi> what is this",
        given={"decoder_input_ids": torch.tensor([[1, 4]])},
    ),
    "aya_vision": Case(aya_vision, tiles=3),
    "cohere2_vision": Case(cohere2_vision, tiles=5),
    "internvl-clip": Case(internvl, "clip", tiles=3, loads=False),
    "internvl-siglip": Case(internvl, tiles=3, loads=False),
    "deepseek_vl": Case(deepseek(""), pads=True),
    "deepseek_vl_hybrid": Case(deepseek("Hybrid"), pads=True),
    "modernvbert": Case(vbert("ModernVBert"), tiles=5, generates=False),
    "ultravbert": Case(vbert("UltraVBert"), tiles=5, generates=False),
    "colmodernvbert": Case(vbert("ColModernVBert"), tiles=5, generates=False),
    "colpali": Case(colpali, text=None, generates=False),
    "shieldgemma2": Case(gemma("shield"), text=None, generates=False),
    "pi0": Case(
        pi0,
        text="what is this",
        asked={"state": [[0.1, 0.2, 0.3, 0.4]]},
        given={"noise": ONE, "timestep": ONE[0, 0, :1] / 2},
        generates=False,
    ),
    "vision_text_dual_encoder": Case(dual_encoder, "clip", "what is this", generates=False),
}
# Other image processors of models that are tested above or in test_multimodal.
PROCESSORS = {
    "llava-padded": Case(llava_padded, "clip", pads=True),
    "llava_next-pil": Case(
        lambda tower: llava_next(tower, "LlavaNextImageProcessorPil"), "clip", tiles=5, pads=True
    ),
    "deepseek_vl-pil": Case(deepseek("", "Pil"), pads=True),
    "deepseek_vl_hybrid-pil": Case(deepseek("Hybrid", "Pil"), pads=True),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of both towers, and the same with an alpha that does nothing. Read only."""
    folder = tmp_path_factory.mktemp("exports")
    for name, make in (("clip", lambda: build(VIT)), ("siglip", siglip)):
        huggingface.export(make(), folder / name)
        idle = zeroed(make())
        huggingface.export(idle, folder / f"{name}-idle")
        huggingface_rgb.export(idle, folder / f"{name}-rgb")
    return folder


@torch.no_grad()
def answers(case: Case, model: Any, inputs: Any) -> torch.Tensor:
    found = model(**inputs, **case.given)
    names = ("logits", "embeddings", "logits_per_image")
    return next(found[name] for name in names if name in found)


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.allclose(one, other, atol=1e-3)


def tiles(inputs: Any) -> torch.Tensor:
    """Return the tiles of all pictures, without those that fill up a batch."""
    flat = inputs["pixel_values"].flatten(0, -4)
    return flat[flat.flatten(1).any(1)]


@each
def test_a_model_looks_where_it_is_told(case: Case, exports: Path) -> None:
    model, processor = case.built()
    assert swap_vision_tower(model, exports / case.tower) is model
    ask = RegionProcessor(processor, exports / case.tower)
    inputs = [case.ask(ask, picture(), region) for region in (LEFT, RIGHT, None)]
    left, right, whole = (answers(case, model, given) for given in inputs)
    assert left.isfinite().all()
    assert differ(left, right)
    assert differ(left, whole)
    assert differ(right, whole)
    if case.generates:
        length = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        answer = model.generate(**inputs[0], **length)
        start = 1 if case.given else inputs[0]["input_ids"].shape[1]
        assert answer.shape == (1, start + 3)


@each
def test_with_alpha_at_zero_it_answers_as_before(case: Case, exports: Path) -> None:
    model, processor = case.built()
    kind = getattr(transformers, CLASSES[case.tower])
    path = next(name for name, module in model.named_modules() if isinstance(module, kind))
    holder, _, name = path.rpartition(".")
    rgb = kind.from_pretrained(exports / f"{case.tower}-rgb").eval()
    setattr(model.get_submodule(holder), name, rgb)
    before = answers(case, model, case.ask(processor, [picture()]))
    swap_vision_tower(model, exports / f"{case.tower}-idle")
    ask = RegionProcessor(processor, exports / case.tower)
    for region in (LEFT, None):
        after = answers(case, model, case.ask(ask, picture(), region))
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.loads], ids=[n for n, c in CASES.items() if c.loads]
)
def test_what_is_saved_loads_with_stock_classes(case: Case, exports: Path, tmp_path: Path) -> None:
    model, processor = case.built()
    swap_vision_tower(model, exports / case.tower)
    ask = RegionProcessor(processor, exports / case.tower)
    inputs = case.ask(ask, picture(), LEFT)
    expected = answers(case, model, inputs)
    model.save_pretrained(tmp_path)
    loaded, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    torch.testing.assert_close(answers(case, loaded.eval(), inputs), expected)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_internvl_keeps_another_tower_in_memory_only(
    tower: str, exports: Path, tmp_path: Path
) -> None:
    """Its config reads each `vision_config` as InternViT's: what is saved is no such model."""
    model, _ = CASES[f"internvl-{tower}"].built()
    model.save_pretrained(tmp_path)
    config = transformers.InternVLConfig.from_pretrained(tmp_path)
    assert type(config.vision_config) is transformers.InternVLVisionConfig


@pytest.mark.parametrize("case", [*CASES.values(), *PROCESSORS.values()], ids=[*CASES, *PROCESSORS])
def test_alpha_goes_through_the_pictures_geometry(case: Case, exports: Path) -> None:
    """A picture that is white inside the region and black outside looks like its alpha."""
    _, processor = case.built()
    mask = np.zeros((50, 90), bool)
    mask[10:35, 20:70] = True
    whole = np.ones_like(mask)
    ask = RegionProcessor(processor, exports / case.tower)
    statistics = (getattr(processor.image_processor, n) for n in ("image_mean", "image_std"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)

    def shown(marked: np.ndarray) -> Image.Image:
        return Image.fromarray(np.repeat(255 * marked[..., None].astype(np.uint8), 3, 2))

    def seen(marked: np.ndarray) -> torch.Tensor:
        return tiles(case.ask(processor, [shown(marked)])) * std + mean

    def alpha(region: Any) -> torch.Tensor:
        return tiles(case.ask(ask, shown(mask), region))[:, 3] * 0.26 + 0.5

    white, black, grey = seen(whole), seen(~whole), alpha(mask)
    assert grey.shape == (case.tiles, 32, 32)
    inside = (white - black > 0.99).all(1)
    padded = (white == black).all(1)
    assert padded.any() == case.pads
    # Bicubic and bilinear differ at the edges alone.
    assert (seen(mask).mean(1).clip(0, 1) - grey)[inside].abs().mean() < 0.03
    assert 0.05 < grey.mean() < 0.95
    assert ((grey > -1e-6) & (grey < 1 + 1e-6)).all()
    everything = alpha(whole)
    torch.testing.assert_close(everything[inside], torch.ones(int(inside.sum())))
    assert (everything[padded].abs() < 1e-6).all()
    torch.testing.assert_close(alpha(None), torch.ones_like(grey))


@each
def test_two_pictures_have_a_region_each(case: Case, exports: Path) -> None:
    model, processor = case.built()
    swap_vision_tower(model, exports / case.tower)
    ask = RegionProcessor(processor, exports / case.tower)
    pictures = [picture(), picture(40, 48)]
    alone = [tiles(case.ask(ask, p, r)) for p, r in zip(pictures, [LEFT, None], strict=True)]
    assert (alone[1][:, 3] > 1.9).all()
    together = case.ask(ask, pictures, [LEFT, None], twice=True)
    torch.testing.assert_close(tiles(together), torch.cat(alone))
    turned = case.ask(ask, pictures[::-1], [None, LEFT], twice=True)
    torch.testing.assert_close(tiles(turned), torch.cat(alone[::-1]))
    other = case.ask(ask, pictures, [RIGHT, None], twice=True)
    assert differ(answers(case, model, together), answers(case, model, other))


def test_tiles_that_fill_up_a_batch_stay_zero(exports: Path) -> None:
    """ModernVBERT leaves out what is zero throughout; a shorter sample answers as it does alone."""
    case = CASES["modernvbert"]
    model, processor = case.built()
    swap_vision_tower(model, exports / case.tower)
    ask = RegionProcessor(processor, exports / case.tower)
    pictures, regions = [[picture()], [picture(64, 20)]], [[LEFT], [None]]
    inputs = ask(pictures, regions, text=[case.text] * 2, padding=True)
    assert inputs["pixel_values"].shape == (2, 5, 4, 32, 32)
    assert not inputs["pixel_values"][1, 3:].any()
    found = answers(case, model, inputs)
    for i in range(2):
        expected = answers(case, model, case.ask(ask, pictures[i][0], regions[i][0]))
        torch.testing.assert_close(found[i, : expected.shape[1]], expected[0], atol=1e-5, rtol=1e-5)


def test_a_tile_of_nothing_but_padding_is_its_pictures(exports: Path) -> None:
    _, processor = CASES["llava_next-clip"].built()
    processor.image_processor.image_grid_pinpoints = [[96, 32]]
    ask = RegionProcessor(processor, exports / "clip")
    pictures, text = [picture(90, 20), picture(30, 80)], "this <image> is <image>"
    for regions in ([LEFT, None], [None, LEFT]):
        found = ask(pictures, regions, text=text)["pixel_values"]
        assert found.shape == (2, 4, 4, 32, 32)
        for i, region in enumerate(regions):
            alpha = found[i, :, 3] * 0.26 + 0.5
            padding = [1, 3] if i == 0 else []  # above and below what is wide
            expected = 1.0 if region is None else 0.0
            torch.testing.assert_close(
                alpha[padding], torch.full_like(alpha[padding], expected), atol=1e-6, rtol=0
            )
            assert (alpha > 1 - 1e-6).all() == (region is None)


def test_pictures_may_be_nested(exports: Path) -> None:
    case = CASES["gemma3"]
    _, processor = case.built()
    ask = RegionProcessor(processor, exports / case.tower)
    a, b, c = picture(), picture(40, 48), picture(30, 60)
    texts = [f"{case.text} {case.text}", case.text]
    inputs = ask([[a, b], [c]], [[LEFT, None], [Box(0, 0, 9, 9)]], text=texts, padding=True)
    given = ((a, LEFT), (b, None), (c, Box(0, 0, 9, 9)))
    torch.testing.assert_close(
        tiles(inputs), torch.cat([tiles(case.ask(ask, *pair)) for pair in given])
    )
    whole = ask([[a, b], [c]], text=texts, padding=True)
    assert (tiles(whole)[:, 3] > 1.9).all()
    for regions, message in (
        ([[LEFT], [None, None]], "a region for each of 2 images, got 1"),
        ([[LEFT, None]], "a region for each of 2 images, got 1"),
        ([[LEFT, None], []], "a region for each of 1 images, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ask([[a, b], [c]], regions, text=texts, padding=True)


def test_several_pictures_of_a_text_are_not_cut_by_llava_onevision(exports: Path) -> None:
    """It pads each to a square instead, in a colour that is no region."""
    case = CASES["llava_onevision-siglip"]
    model, processor = case.built()
    swap_vision_tower(model, exports / case.tower)
    ask = RegionProcessor(processor, exports / case.tower)
    whole = Box(0, 0, 90, 50)
    inputs = ask([[picture()] * 3], [[LEFT, whole, None]], text="<image> <image> this <image>")
    assert inputs["pixel_values"].shape == (3, 1, 4, 32, 32)
    left, everywhere, nothing_said = inputs["pixel_values"][:, 0, 3] * 0.26 + 0.5
    for alpha in (left, everywhere):  # 32 / 90 * 20 rows above, and below
        assert (alpha[[*range(6), *range(26, 32)]].abs() < 1e-6).all()
    assert (everywhere[9:23] > 0.99).all()
    assert (left[9:23, :9] > 0.99).all()
    assert (left[:, 12:].abs() < 1e-6).all()
    assert (nothing_said > 0.99).all()
    assert answers(case, model, inputs).isfinite().all()


def test_the_processors_own_arguments_hold_for_alpha(exports: Path) -> None:
    case = CASES["aya_vision"]
    _, processor = case.built()
    ask = RegionProcessor(processor, exports / case.tower)
    plain = {"crop_to_patches": False}
    for more in (plain, {"images_kwargs": plain}, {"images_kwargs": plain, "padding": True}):
        inputs = ask(picture(), LEFT, text=case.text, **more)
        assert inputs["pixel_values"].shape == (1, 4, 32, 32)
    more = {"do_normalize": True, "resample": Image.Resampling.NEAREST}
    raw = ask(picture(), LEFT, text=case.text, **more)
    assert differ(raw["pixel_values"][:, :3], case.ask(ask, picture(), LEFT)["pixel_values"][:, :3])
    torch.testing.assert_close(
        raw["pixel_values"][:, 3], case.ask(ask, picture(), LEFT)["pixel_values"][:, 3]
    )
    with pytest.raises(ValueError, match="expected pictures alone, got videos"):
        ask(picture(), LEFT, text=case.text, videos=[picture()])


def test_the_models_depth_and_head_decide(exports: Path) -> None:
    """LLaVA-OneVision has no last layer of SigLIP's and no head, in its config either."""
    model, _ = llava_onevision("siglip", num_hidden_layers=1)
    swap_vision_tower(model, exports / "siglip")
    tower = model.model.vision_tower
    whole = transformers.SiglipVisionModel.from_pretrained(exports / "siglip").eval()
    rgba = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        states = whole(rgba, output_hidden_states=True).hidden_states
        found = tower(rgba, output_hidden_states=True).hidden_states
    assert len(found) == 2
    torch.testing.assert_close(found[-1], states[1])
    assert not hasattr(tower, "head")
    for config in (model.config, model.model.config):
        assert config.vision_config is tower.config
        assert config.vision_config.num_hidden_layers == 1
        assert config.vision_config.vision_use_head is False
    model, _ = CASES["deepseek_vl"].built()
    swap_vision_tower(model, exports / "siglip")
    assert torch.equal(model.model.vision_model.head.probe, whole.head.probe)
    model, _ = llava_onevision("siglip", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"does not fit .*\(num_hidden_layers 3 is not 2\)"):
        swap_vision_tower(model, exports / "siglip")


SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2}
QWEN = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
OTHERS = {
    "Idefics3": (SMALL, "llama", "vision_model is Idefics3VisionTransformer"),
    "SmolVLM": (SMALL, "llama", "vision_model is SmolVLMVisionTransformer"),
    "Qwen2VL": (QWEN, "qwen2_vl_text", "visual is Qwen2VisionTransformerPretrainedModel"),
    "InternVL": (SMALL, "qwen2", "vision_tower is InternVLVisionModel"),
    "Mistral3": (
        {"model_type": "pixtral", **SMALL},
        "mistral",
        "vision_tower is PixtralVisionModel",
    ),
    "Lfm2Vl": (
        {"model_type": "siglip2_vision_model", **SMALL},
        "lfm2",
        "vision_tower is Siglip2VisionModel",
    ),
    "Aria": (
        {"model_type": "idefics3_vision", **SMALL},
        "aria_text",
        "vision_tower is Idefics3VisionTransformer",
    ),
    "VideoLlava": (
        {"model_type": "clip_vision_model", **SMALL},
        "llama",
        "has 2 towers (video_tower, image_tower), expected one",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_towers_are_refused_by_name(name: str, exports: Path) -> None:
    tower, text, message = OTHERS[name]
    kinds = (
        getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForConditionalGeneration")
    )
    config, model = kinds
    with torch.device("meta"):
        made = model(config(vision_config=tower, text_config={"model_type": text, **TEXT}))
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(message)}"):
        swap_vision_tower(made, exports / "clip")
