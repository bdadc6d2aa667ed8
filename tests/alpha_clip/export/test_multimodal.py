"""LLaVA and LLaVA-NeXT, small, from their configs, with an exported tower in place of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_huggingface import VIT, build
from test_huggingface_towers import siglip

from alpha_clip.export import huggingface, huggingface_rgb
from alpha_clip.export.multimodal import swap_vision_tower
from alpha_clip.export.region_processor import RegionProcessor
from alpha_clip.model import AlphaClip
from alpha_clip.regions import Box

transformers = pytest.importorskip("transformers")
IMAGE = 7  # the token that stands for a picture
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "<image>"]
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA = {**LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(WORDS)}
GRID = [[32, 64], [64, 32], [64, 64]]


def zeroed(model: AlphaClip) -> AlphaClip:
    """The same with an alpha that does nothing yet."""
    for name, parameter in model.visual.named_parameters():
        if name.endswith("weight_alpha"):
            torch.nn.init.zeros_(parameter)
    return model


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def llava(kind: str, tower: str = "clip") -> tuple[Any, Any]:
    """A model with a tower of three channels, and its processor."""
    vision = {
        "model_type": f"{tower}_vision_model",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2 if tower == "clip" else 4,
        "intermediate_size": 256,
        "image_size": 32,
        "patch_size": 8,
    }
    select = "default" if tower == "clip" else "full"
    common = {
        "vision_config": vision,
        "text_config": {"model_type": "llama", **LLAMA},
        "image_token_index": IMAGE,
        "vision_feature_select_strategy": select,
    }
    extra = 1 if tower == "clip" else 0
    shared = {"tokenizer": tokenizer(), "patch_size": 8, "num_additional_image_tokens": extra}
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    torch.manual_seed(0)
    if kind == "llava":
        config = transformers.LlavaConfig(**common)
        model = transformers.LlavaForConditionalGeneration(config)
        images = transformers.CLIPImageProcessor(**size)
        processor = transformers.LlavaProcessor(
            images, vision_feature_select_strategy=select, **shared
        )
    else:
        config = transformers.LlavaNextConfig(**common, image_grid_pinpoints=GRID)
        model = transformers.LlavaNextForConditionalGeneration(config)
        images = transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=GRID)
        processor = transformers.LlavaNextProcessor(
            images, vision_feature_select_strategy=select, **shared
        )
    return model.eval(), processor


def picture(width: int = 90, height: int = 50) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


TOWERS = {"clip": lambda: build(VIT), "siglip": siglip}
CASES = [("llava", "clip"), ("llava", "siglip"), ("llava_next", "clip")]


@pytest.mark.parametrize(("kind", "tower"), CASES)
def test_a_model_looks_where_it_is_told(tmp_path: Path, kind: str, tower: str) -> None:
    huggingface.export(TOWERS[tower](), tmp_path / "alpha")
    model, processor = llava(kind, tower)
    assert swap_vision_tower(model, tmp_path / "alpha") is model
    ask = RegionProcessor(processor, tmp_path / "alpha")
    regions = [Box(0, 0, 30, 50), Box(50, 0, 90, 50), None]
    several = [ask(picture(), region, text="what is this <image>") for region in regions]
    left, right, whole = (logits(model, inputs) for inputs in several)
    assert not torch.allclose(left, right, atol=1e-3)
    assert not torch.allclose(left, whole, atol=1e-3)
    answer = model.generate(**several[0], max_new_tokens=3, do_sample=False)
    assert answer.shape[1] == several[0]["input_ids"].shape[1] + 3


@pytest.mark.parametrize(("kind", "tower"), CASES)
def test_with_alpha_at_zero_it_answers_as_before(tmp_path: Path, kind: str, tower: str) -> None:
    exported = zeroed(TOWERS[tower]())
    huggingface.export(exported, tmp_path / "alpha")
    huggingface_rgb.export(exported, tmp_path / "rgb")
    model, processor = llava(kind, tower)
    name = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}[tower]
    model.model.vision_tower = getattr(transformers, name).from_pretrained(tmp_path / "rgb").eval()
    before = logits(
        model, processor(images=picture(), text="what is this <image>", return_tensors="pt")
    )
    swap_vision_tower(model, tmp_path / "alpha")
    ask = RegionProcessor(processor, tmp_path / "alpha")
    for region in (Box(0, 0, 30, 50), None):
        after = logits(model, ask(picture(), region, text="what is this <image>"))
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_what_is_saved_loads_with_stock_classes(tmp_path: Path) -> None:
    huggingface.export(build(VIT), tmp_path / "alpha")
    model, processor = llava("llava")
    swap_vision_tower(model, tmp_path / "alpha")
    inputs = RegionProcessor(processor, tmp_path / "alpha")(
        picture(), Box(0, 0, 30, 50), text="what is this <image>"
    )
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "whole")
    kind = transformers.LlavaForConditionalGeneration
    loaded, found = kind.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(found.values())
    torch.testing.assert_close(logits(loaded.eval(), inputs), expected)


def test_alpha_goes_through_the_pictures_geometry(tmp_path: Path) -> None:
    """A picture that is white inside the region and black outside looks like its alpha."""
    huggingface.export(build(VIT), tmp_path / "alpha")
    mask = np.zeros((50, 90), bool)
    mask[10:35, 20:70] = True
    shown = Image.fromarray(np.repeat(255 * mask[..., None].astype(np.uint8), 3, 2))
    for kind, tiles in (("llava", 1), ("llava_next", 5)):
        _, processor = llava(kind)
        inputs = RegionProcessor(processor, tmp_path / "alpha")(
            shown, mask, text="what is this <image>"
        )
        pixels = inputs["pixel_values"].reshape(-1, 4, 32, 32)
        assert len(pixels) == tiles
        mean, std = (
            np.array(getattr(processor.image_processor, n)) for n in ("image_mean", "image_std")
        )
        rgb = pixels[:, :3].numpy() * std[:, None, None] + mean[:, None, None]
        alpha = pixels[:, 3].numpy() * 0.26 + 0.5
        # Bicubic and bilinear differ at the edges alone.
        assert np.abs(rgb.mean(1).clip(0, 1) - alpha).mean() < 0.02
        assert 0.05 < alpha.mean() < 0.95
        assert (alpha > -1e-6).all()
        assert (alpha < 1 + 1e-6).all()


def test_several_pictures_have_a_region_each(tmp_path: Path) -> None:
    huggingface.export(build(VIT), tmp_path / "alpha")
    model, processor = llava("llava")
    swap_vision_tower(model, tmp_path / "alpha")
    ask = RegionProcessor(processor, tmp_path / "alpha")
    text = ["what is this <image>", "is this <image> this"]
    regions = [Box(0, 0, 30, 50), None]
    together = ask([picture(), picture(40, 40)], regions, text=text, padding=True)
    alone = ask(picture(), regions[0], text=text[0])
    torch.testing.assert_close(together["pixel_values"][:1], alone["pixel_values"])
    assert (together["pixel_values"][1, 3] > 1.9).all()
    with pytest.raises(ValueError, match="expected a region for each of 2 images, got 1"):
        ask([picture(), picture()], [None], text=text)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    huggingface.export(build(VIT), tmp_path / "clip")
    huggingface.export(siglip(), tmp_path / "siglip")
    huggingface.export(build({**VIT, "patch_size": 16, "layers": 3}), tmp_path / "other")
    huggingface_rgb.export(build(VIT), tmp_path / "rgb")
    model, processor = llava("llava")
    before = model.model.vision_tower
    for folder, message in (
        ("siglip", "a clip_vision_model, the export in .* a siglip_vision_model"),
        ("other", r"does not fit .*\(patch_size 8 is not 16\)"),
        ("rgb", "has 3 channels, expected 4"),
        ("none", "is no export: expected what `alpha-clip export --format huggingface` writes"),
    ):
        with pytest.raises(ValueError, match=message):
            swap_vision_tower(model, tmp_path / folder)
    assert model.model.vision_tower is before
    with pytest.raises(ValueError, match="LlamaModel has no vision_tower"):
        swap_vision_tower(model.model.language_model, tmp_path / "clip")
    for folder in ("rgb", "none"):
        with pytest.raises(ValueError, match="does not say how alpha is normalised"):
            RegionProcessor(processor, tmp_path / folder)


def test_precision_and_mode_stay(tmp_path: Path) -> None:
    huggingface.export(build(VIT), tmp_path / "alpha")
    model, _ = llava("llava")
    model.to(torch.bfloat16)
    swap_vision_tower(model, tmp_path / "alpha")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.model.vision_tower.training


def test_another_clip_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exported = build(VIT)
    huggingface.export(exported, tmp_path / "alpha")
    model, _ = llava("llava")
    swap_vision_tower(model, tmp_path / "alpha")
    assert "does not seem to come from the same CLIP" in caplog.text
    caplog.clear()
    swap_vision_tower(model, tmp_path / "alpha")  # its own
    assert caplog.text == ""
