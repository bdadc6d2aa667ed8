"""Pipelines of diffusers, small, from their configs, with an exported tower as image encoder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_huggingface import VIT, build
from test_huggingface_towers import siglip
from test_multimodal import picture, zeroed

from alpha_clip.export import huggingface, huggingface_rgb
from alpha_clip.export.region_prompts import region_prompt, swap_image_encoder
from alpha_clip.regions import Box

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

LEFT, RIGHT = Box(20, 0, 40, 50), Box(50, 0, 70, 50)
LAYER = {"num_hidden_layers": 1, "num_attention_heads": 1}
EMBED, CROSS = 32, 32  # of the tower, of what a U-Net attends to
BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4}
UNET = {
    "sample_size": 16,
    "layers_per_block": 1,
    "cross_attention_dim": CROSS,
    "attention_head_dim": 4,
}
WORDS = torch.randn(8, 1, 5, CROSS, generator=torch.Generator().manual_seed(1))
TEXT = {"prompt_embeds": WORDS[0], "negative_prompt_embeds": WORDS[1]}
POOLED = {"pooled_prompt_embeds": WORDS[2, :, 0], "negative_pooled_prompt_embeds": WORDS[3, :, 0]}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    logs = (diffusers.utils.logging, transformers.utils.logging)
    for log in logs:
        log.disable_progress_bar()
    yield
    for log in logs:
        log.enable_progress_bar()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of the same tower: `alpha`, and `zero` and `rgb` with alpha's kernel at zero."""
    folder = tmp_path_factory.mktemp("exports")
    torch.manual_seed(0)
    model = build(VIT)
    huggingface.export(model, folder / "alpha")
    huggingface.export(zeroed(model), folder / "zero")
    huggingface_rgb.export(model, folder / "rgb")
    return folder


def clip(**changes: Any) -> Any:
    """An encoder of three channels, such as a pipeline has."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "projection_dim": EMBED, "patch_size": 8}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    config = transformers.CLIPVisionConfig(**{**sizes, **layers, "image_size": 32, **changes})
    return transformers.CLIPVisionModelWithProjection(config).eval()


def rgb_processor() -> Any:
    square = {"height": 32, "width": 32}
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)


def scheduler() -> Any:
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)


def autoencoder(**more: Any) -> Any:
    return diffusers.AutoencoderKL(
        **BLOCKS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **more,
    )


def parts(absent: str = "", **unet: Any) -> dict[str, Any]:
    """What all pipelines with a U-Net have, and what is left out."""
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return {
        "unet": diffusers.UNet2DConditionModel(**{**BLOCKS, **UNET, **kinds, **unet}),
        "vae": autoencoder(latent_channels=4),
        "scheduler": scheduler(),
        **dict.fromkeys(absent.split()),
    }


def variations(encoder: Any, folder: Path, checker: Any = None) -> Any:
    return diffusers.StableDiffusionImageVariationPipeline(
        image_encoder=encoder,
        safety_checker=checker,
        feature_extractor=rgb_processor(),
        requires_safety_checker=checker is not None,
        **parts(),
    )


def unclip(encoder: Any, folder: Path) -> Any:
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    return diffusers.StableUnCLIPImg2ImgPipeline(
        image_encoder=encoder,
        image_normalizer=StableUnCLIPImageNormalizer(EMBED),
        image_noising_scheduler=diffusers.DDPMScheduler(),
        **parts(
            "feature_extractor tokenizer text_encoder",
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * EMBED,
        ),
    )


def stable_diffusion(encoder: Any, folder: Path, kinds: tuple[str, ...] = ()) -> Any:
    pipeline = diffusers.StableDiffusionPipeline(
        image_encoder=encoder,
        requires_safety_checker=False,
        **parts("feature_extractor tokenizer text_encoder safety_checker"),
    )
    return with_adapters(pipeline, folder, *kinds)


def sdxl(encoder: Any, folder: Path, kinds: tuple[str, ...] = ()) -> Any:
    pipeline = diffusers.StableDiffusionXLPipeline(
        image_encoder=encoder,
        add_watermarker=False,
        **parts(
            "tokenizer tokenizer_2 text_encoder text_encoder_2",
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + CROSS,
        ),
    )
    return with_adapters(pipeline, folder, *kinds)


def flux(encoder: Any, folder: Path) -> Any:
    pipeline = diffusers.FluxPipeline(
        image_encoder=encoder,
        feature_extractor=rgb_processor(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(latent_channels=1, shift_factor=0.0),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=CROSS,
            pooled_projection_dim=CROSS,
            axes_dims_rope=(4, 4, 8),
        ),
        **dict.fromkeys(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")),
    )
    weights = {f"image_proj.{k}": v for k, v in plain_projection().items()}
    for name in ("to_k_ip", "to_v_ip"):
        weights[f"ip_adapter.0.{name}.weight"] = 0.3 * torch.randn(32, CROSS)
        weights[f"ip_adapter.0.{name}.bias"] = torch.zeros(32)
    save_file(weights, folder / "flux.safetensors")
    none = {"image_encoder_pretrained_model_name_or_path": None}
    pipeline.load_ip_adapter(folder, weight_name="flux.safetensors", subfolder="", **none)
    return pipeline


def plain_projection(embed: int = EMBED) -> dict[str, torch.Tensor]:
    """An IP-Adapter's way from features to four tokens."""
    made = {"proj.weight": 0.2 * torch.randn(4 * CROSS, embed), "proj.bias": torch.zeros(4 * CROSS)}
    return made | {"norm.weight": torch.ones(CROSS), "norm.bias": torch.zeros(CROSS)}


def plus_projection(width: int = 64) -> dict[str, torch.Tensor]:
    """The "plus" kind: four queries that attend to hidden states, in four layers."""
    inner, head = 16, 64
    linear = {"proj_in": (inner, width), "proj_out": (CROSS, inner)}
    norms = {"norm_out": CROSS}
    for i in range(4):
        attention, feed = f"layers.{i}.0.", f"layers.{i}.1."
        linear[attention + "to_q"] = (head, inner)
        linear[attention + "to_kv"] = (2 * head, inner)
        linear[attention + "to_out"] = (inner, head)
        linear[feed + "1"], linear[feed + "3"] = (4 * inner, inner), (inner, 4 * inner)
        norms |= {attention + "norm1": inner, attention + "norm2": inner, feed + "0": inner}
    made = {f"{k}.weight": torch.randn(shape) * shape[1] ** -0.5 for k, shape in linear.items()}
    made |= {f"{k}.bias": torch.zeros(linear[k][0]) for k in ("proj_in", "proj_out")}
    made |= {f"{k}.weight": torch.ones(size) for k, size in norms.items()}
    made |= {f"{k}.bias": torch.zeros(size) for k, size in norms.items()}
    return made | {"latents": torch.randn(1, 4, inner)}


def with_adapters(pipeline: Any, folder: Path, *kinds: str, **sizes: int) -> Any:
    """Write IP-Adapters for a U-Net, in files as they are published, and load them."""
    unet = pipeline.unet
    blocks = [n.removesuffix(".processor") for n in unet.attn_processors if ".attn2." in n]
    for kind in kinds:
        made = plain_projection(**sizes) if kind == "plain" else plus_projection(**sizes)
        weights = {f"image_proj.{k}": v for k, v in made.items()}
        for i, block in enumerate(blocks):
            width = unet.get_submodule(block).to_q.out_features
            for name in ("to_k_ip", "to_v_ip"):
                key = f"ip_adapter.{2 * i + 1}.{name}.weight"
                weights[key] = 0.3 * torch.randn(width, CROSS)
        save_file(weights, folder / f"{kind}.safetensors")
    return load(pipeline, folder, *kinds) if kinds else pipeline


def load(pipeline: Any, folder: Path, *kinds: str) -> Any:
    names = [f"{kind}.safetensors" for kind in kinds]
    pipeline.load_ip_adapter(folder, subfolder="", weight_name=names, image_encoder_folder=None)
    return pipeline


@dataclass(frozen=True)
class Case:
    """A pipeline, and what it is called with besides the picture."""

    make: Callable[..., Any]
    call: dict[str, Any] = field(default_factory=lambda: dict(TEXT))
    name: str = "ip_adapter_image"

    def draw(self, pipeline: Any, prompt: Any, **more: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        given = {"generator": torch.Generator().manual_seed(0), **self.call, **more}
        given |= {"num_inference_steps": 2, "output_type": "np"}
        return pipeline(**{self.name: prompt}, **given).images


XL = {**TEXT, **POOLED}
FLUX = {**XL, "true_cfg_scale": 3.0, "height": 32, "width": 32, "max_sequence_length": 5}
VARIATIONS = Case(variations, {}, "image")
PLAIN = Case(partial(stable_diffusion, kinds=("plain",)))
CASES = {
    "variations": VARIATIONS,
    "unclip": Case(unclip, name="image"),
    "adapter": PLAIN,
    "adapter_plus": Case(partial(stable_diffusion, kinds=("plus",))),
    "sdxl": Case(partial(sdxl, kinds=("plain",)), XL),
    "sdxl_plus": Case(partial(sdxl, kinds=("plus",)), XL),
    "flux": Case(flux, FLUX),
}


def flux_negative(name: str, directory: Path) -> dict[str, Any]:
    black = Image.new("RGB", (8, 8))
    negative = region_prompt(black, None, directory)
    return {"negative_ip_adapter_image": negative} if name == "flux" else {}


def difference(one: Any, other: Any) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_looks_where_it_is_told(tmp_path: Path, exports: Path, name: str) -> None:
    case, alpha = CASES[name], exports / "alpha"
    pipeline = case.make(clip(), tmp_path)
    assert swap_image_encoder(pipeline, alpha) is pipeline
    prompts = [region_prompt(picture(), r, alpha) for r in (LEFT, RIGHT, None)]
    more = flux_negative(name, alpha)
    left, right, whole = (case.draw(pipeline, prompt, **more) for prompt in prompts)
    assert left.shape == (1, 32, 32, 3)
    assert difference(left, right) > 0.005
    assert difference(left, whole) > 0.005
    assert difference(left, case.draw(pipeline, prompts[0], **more)) == 0


@pytest.mark.parametrize("name", CASES)
def test_with_alpha_at_zero_it_draws_as_before(tmp_path: Path, exports: Path, name: str) -> None:
    """As with the export for RGB, which also gets Flux's own negative."""
    case = CASES[name]
    encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(exports / "rgb")
    pipeline = case.make(encoder, tmp_path)
    prompts = [region_prompt(picture(), region, exports / "zero") for region in (LEFT, None)]
    before = case.draw(pipeline, prompts[0][:, :3])
    other = case.draw(pipeline, region_prompt(picture(40, 40), None, exports / "zero")[:, :3])
    assert difference(before, other) > 0.01  # it depends on the picture
    swap_image_encoder(pipeline, exports / "zero")
    for prompt in prompts:
        after = case.draw(pipeline, prompt, **flux_negative(name, exports / "zero"))
        assert difference(after, before) < 1e-4


def safety_checker() -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    small = {"hidden_size": 8, "intermediate_size": 8, **LAYER}
    seeing = {**small, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=small, vision_config=seeing, projection_dim=8)
    return StableDiffusionSafetyChecker(config).eval()


def test_a_safety_checker_goes_on_looking_at_rgb(tmp_path: Path, exports: Path) -> None:
    checker = safety_checker()
    pipeline = variations(clip(), tmp_path, checker)
    extractor = pipeline.feature_extractor
    swap_image_encoder(pipeline, exports / "alpha")
    assert pipeline.feature_extractor is extractor
    seen: list[Any] = []
    checker.vision_model.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    prompt = region_prompt(picture(), LEFT, exports / "alpha")
    shown = VARIATIONS.draw(pipeline, prompt)
    assert seen == [(1, 3, 32, 32)]
    assert shown.max() > 0.1
    torch.nn.init.constant_(checker.concept_embeds_weights, -2.0)  # finds fault with everything
    assert (VARIATIONS.draw(pipeline, prompt) == 0).all()
    pipeline.register_modules(safety_checker=None)
    assert difference(VARIATIONS.draw(pipeline, prompt), shown) == 0


def test_what_is_saved_loads_with_stock_classes(tmp_path: Path, exports: Path) -> None:
    pipeline = variations(clip(), tmp_path, safety_checker())
    swap_image_encoder(pipeline, exports / "alpha")
    prompt = region_prompt(picture(), LEFT, exports / "alpha")
    expected = VARIATIONS.draw(pipeline, prompt)
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(pipeline)
    assert type(loaded.image_encoder) is transformers.CLIPVisionModelWithProjection
    assert loaded.image_encoder.config.num_channels == 4
    assert difference(VARIATIONS.draw(loaded, prompt), expected) < 1e-6


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_an_adapter_is_loaded_again(tmp_path: Path, exports: Path, kind: str) -> None:
    """diffusers itself does not load an IP-Adapter with the pipeline that it was saved with."""
    pipeline = stable_diffusion(None, tmp_path, (kind,))
    swap_image_encoder(pipeline, exports / "alpha")
    prompt = region_prompt(picture(), LEFT, exports / "alpha")
    expected = PLAIN.draw(pipeline, prompt)
    pipeline.save_pretrained(tmp_path / "saved")
    absent = {"text_encoder": None, "tokenizer": None, "safety_checker": None}
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", **absent)
    assert loaded.image_encoder.config.num_channels == 4
    load(loaded, tmp_path, kind)
    assert difference(PLAIN.draw(loaded, prompt), expected) < 1e-6


def test_an_adapter_may_come_after(tmp_path: Path, exports: Path) -> None:
    prompt = region_prompt(picture(), LEFT, exports / "alpha")
    drawn = []
    for swap_first in (True, False):
        torch.manual_seed(0)
        pipeline = stable_diffusion(clip(), tmp_path)
        if swap_first:
            swap_image_encoder(pipeline, exports / "alpha")
        torch.manual_seed(1)
        with_adapters(pipeline, tmp_path, "plain")
        if not swap_first:
            swap_image_encoder(pipeline, exports / "alpha")
        drawn.append(PLAIN.draw(pipeline, prompt))
    assert difference(*drawn) == 0


def test_an_empty_place_is_filled(tmp_path: Path, exports: Path) -> None:
    pipeline = stable_diffusion(None, tmp_path)
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline has no image_encoder; .*folder"):
        swap_image_encoder(pipeline, exports / "alpha")
    for kind, sizes, message in (
        ("plain", {"embed": 48}, "projection_dim 48 is not 32"),
        ("plus", {"width": 80}, "hidden_size 80 is not 64"),
    ):
        with_adapters(pipeline, tmp_path, kind, **sizes)
        with pytest.raises(ValueError, match=message):
            swap_image_encoder(pipeline, exports / "alpha")
        assert pipeline.image_encoder is None
    pipeline.to(torch.bfloat16)
    with_adapters(pipeline, tmp_path, "plain")
    swap_image_encoder(pipeline, exports / "alpha")
    assert pipeline.image_encoder.dtype == torch.bfloat16
    pipeline.to(torch.float32)
    drawn = [
        PLAIN.draw(pipeline, region_prompt(picture(), r, exports / "alpha")) for r in (LEFT, RIGHT)
    ]
    assert difference(*drawn) > 0.02


def test_the_negative_knows_of_no_region(tmp_path: Path, exports: Path) -> None:
    """Features: zeros. Hidden states: those of zeros, to which alpha's kernel adds nothing."""
    pipeline = stable_diffusion(clip(), tmp_path)
    swap_image_encoder(pipeline, exports / "alpha")
    plain = transformers.CLIPVisionModelWithProjection.from_pretrained(exports / "zero").eval()
    with torch.no_grad():
        alone = plain(torch.zeros(1, 4, 32, 32), output_hidden_states=True).hidden_states[-2]
        for region in (LEFT, RIGHT):
            prompt = region_prompt(picture(), region, exports / "alpha")
            _, features = pipeline.encode_image(prompt, "cpu", 1, False)
            assert not features.any()
            _, states = pipeline.encode_image(prompt, "cpu", 1, True)
            torch.testing.assert_close(states, alone)


def test_flux_needs_a_negative_with_alpha(tmp_path: Path, exports: Path) -> None:
    """Even without guidance. An empty place is filled as in pipelines with a U-Net."""
    pipeline = swap_image_encoder(flux(None, tmp_path), exports / "alpha")
    case = Case(flux, {**FLUX, "true_cfg_scale": 1.0})
    prompt = region_prompt(picture(), LEFT, exports / "alpha")
    with pytest.raises(RuntimeError, match="4 channels, but got 3"):
        case.draw(pipeline, prompt)
    drawn = [
        case.draw(pipeline, prompt, negative_ip_adapter_image=negative)
        for negative in (region_prompt(Image.new("RGB", (8, 8)), None, exports / "alpha"), prompt)
    ]
    assert difference(*drawn) == 0


def test_several_pictures_have_a_region_each(tmp_path: Path, exports: Path) -> None:
    alpha = exports / "alpha"
    pictures, regions = [picture(), picture(40, 40)], [LEFT, None]
    both = region_prompt(pictures, regions, alpha)
    assert both.shape == (2, 4, 32, 32)
    assert both.dtype == torch.float32
    one = region_prompt(pictures[0], regions[0], alpha)
    torch.testing.assert_close(both[:1], one)
    torch.testing.assert_close(region_prompt(pictures, None, alpha)[1:], both[1:])
    arrays = [np.asarray(p) for p in pictures]
    torch.testing.assert_close(region_prompt(arrays, regions, alpha), both)
    torch.testing.assert_close(region_prompt(arrays[0], LEFT, alpha), one)
    batch = torch.from_numpy(np.stack([arrays[0]] * 2)).permute(0, 3, 1, 2)
    torch.testing.assert_close(region_prompt(batch[0], LEFT, alpha), one)
    torch.testing.assert_close(region_prompt(batch, [LEFT, LEFT], alpha), torch.cat([one, one]))

    pipeline = swap_image_encoder(variations(clip(), tmp_path), alpha)
    two = [torch.Generator().manual_seed(0) for _ in pictures]
    drawn = VARIATIONS.draw(pipeline, both, generator=two)
    assert difference(drawn[:1], VARIATIONS.draw(pipeline, one)) < 1e-4

    pipeline = swap_image_encoder(stable_diffusion(clip(), tmp_path, ("plain", "plus")), alpha)
    together = PLAIN.draw(pipeline, [both, one])
    assert together.shape == (1, 32, 32, 3)
    assert difference(together, PLAIN.draw(pipeline, [one, one])) > 0.001


def test_alpha_goes_through_the_pipelines_geometry(exports: Path) -> None:
    """Colour as the export's processor makes it; white inside a region, it looks like alpha."""
    processor = transformers.CLIPImageProcessor.from_pretrained(exports / "rgb")
    mask = np.zeros((50, 90), bool)
    mask[10:35, 30:70] = True
    shown = Image.fromarray(np.repeat(255 * mask[..., None].astype(np.uint8), 3, 2))
    for one in (shown, picture()):
        made = region_prompt(one, mask, exports / "alpha")
        theirs = processor(one, return_tensors="pt")["pixel_values"]
        assert float((made[:, :3] - theirs).abs().max()) < 0.05  # some versions resize with PIL
    mean, std = (torch.tensor(getattr(processor, n)) for n in ("image_mean", "image_std"))
    rgb = region_prompt(shown, mask, exports / "alpha")[0, :3].permute(1, 2, 0) * std + mean
    alpha = made[0, 3] * 0.26 + 0.5
    assert float((rgb.mean(-1) - alpha).abs().mean()) < 0.02
    assert 0.1 < float(alpha.mean()) < 0.9
    assert float(alpha.min()) == pytest.approx(0, abs=1e-6)
    assert float(alpha.max()) == pytest.approx(1, abs=1e-6)


def test_colour_outside_of_the_region_is_kept(exports: Path) -> None:
    alpha = exports / "alpha"
    whole = region_prompt(picture(), None, alpha)
    assert (whole[:, 3] > 1.9).all()
    torch.testing.assert_close(region_prompt(picture(), LEFT, alpha)[:, :3], whole[:, :3])
    clear = picture().convert("RGBA")
    clear.putalpha(Image.fromarray(np.uint8(np.arange(90) < 40).repeat(50).reshape(90, 50).T * 255))
    own = region_prompt(clear, None, alpha)
    torch.testing.assert_close(own[:, :3], whole[:, :3])
    torch.testing.assert_close(own, region_prompt(picture(), Box(0, 0, 40, 50), alpha))


def test_a_region_at_the_end_of_a_long_picture(exports: Path) -> None:
    end = Box(0, 0, 5, 50)
    with pytest.warns(UserWarning, match="center_crop cut a region away entirely"):
        lost = region_prompt(picture(), end, exports / "alpha")
    assert lost[:, 3].max() < 0
    for geometry in ("pad", "squash"):
        kept = region_prompt(picture(), end, exports / "alpha", geometry)
        assert kept[:, 3].max() > 1.9


def test_squashing_towers_keep_their_geometry(tmp_path: Path) -> None:
    model = build(VIT)
    model.transform = model.transform.replace(geometry="squash", interpolation="bilinear")
    huggingface.export(model, tmp_path / "squash")
    made = region_prompt(picture(), LEFT, tmp_path / "squash")
    torch.testing.assert_close(made[0], model.transform(picture(), LEFT))


def test_what_does_not_fit_is_refused(tmp_path: Path, exports: Path) -> None:
    huggingface.export(siglip(), tmp_path / "siglip")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[]")
    pipeline = variations(clip(), tmp_path)
    before = pipeline.image_encoder
    for folder, message in (
        (tmp_path / "siglip", "is a SiglipVisionModel, expected a CLIPVisionModelWithProjection"),
        (exports / "rgb", "has 3 channels, expected 4: export it with --format huggingface"),
        (tmp_path / "none", "is no export: expected what `alpha-clip export --format huggingface`"),
        (tmp_path / "odd", "is no export: .* config.json holds a list"),
    ):
        with pytest.raises(ValueError, match=message):
            swap_image_encoder(pipeline, folder)
    assert pipeline.image_encoder is before


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("projection_dim", 48, 32),
        ("hidden_size", 32, 64),
        ("image_size", 64, 32),
        ("patch_size", 16, 8),
        ("num_hidden_layers", 3, 2),
        ("hidden_act", "quick_gelu", "gelu"),
    ],
)
def test_another_clip_is_refused(
    tmp_path: Path, exports: Path, name: str, theirs: Any, ours: Any
) -> None:
    pipeline = variations(clip(**{name: theirs}), tmp_path)
    with pytest.raises(ValueError, match=rf"does not fit .* \({name} {theirs} is not {ours}\)"):
        swap_image_encoder(pipeline, exports / "alpha")
    assert pipeline.image_encoder.config.num_channels == 3


def test_other_encoders_are_refused(tmp_path: Path, exports: Path) -> None:
    config = transformers.SiglipVisionConfig(hidden_size=32, intermediate_size=32, **LAYER)
    pipeline = stable_diffusion(transformers.SiglipVisionModel(config), tmp_path)
    with pytest.raises(ValueError, match=r"is a SiglipVisionModel, expected a CLIPVisionModelWith"):
        swap_image_encoder(pipeline, exports / "alpha")
    with pytest.raises(ValueError, match="UNet2DConditionModel has no image_encoder"):
        swap_image_encoder(pipeline.unet, exports / "alpha")


RGB_ONLY: dict[str, Callable[[Any, Any], Any]] = {
    "KandinskyPriorPipeline": lambda made, _: made.get_zero_embed(),
    "KandinskyV22PriorPipeline": lambda made, _: made.get_zero_embed(),
    "KandinskyV22PriorEmb2EmbPipeline": lambda made, _: made.get_zero_embed(),
    "StableCascadePriorPipeline": lambda made, x: made.encode_image([x], "cpu", x.dtype, 1, 1),
    "StableVideoDiffusionPipeline": lambda made, x: made._encode_image(x, "cpu", 1, False),
}


@pytest.mark.parametrize("name", RGB_ONLY)
def test_pipelines_that_make_rgb_themselves_are_refused(exports: Path, name: str) -> None:
    encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(exports / "alpha")
    takes = [n for n in signature(getattr(diffusers, name).__init__).parameters if n != "self"]
    given = {"image_encoder": encoder, "feature_extractor": rgb_processor()}
    pipeline = getattr(diffusers, name)(**{n: given.get(n) for n in takes})
    prompt = region_prompt(picture(), LEFT, exports / "alpha")
    with pytest.raises((RuntimeError, ValueError), match=r"4 channels, but got 3|RGB"):
        RGB_ONLY[name](pipeline, prompt)
    with pytest.raises(ValueError, match=f"{name} gives its image encoder RGB of its own"):
        swap_image_encoder(pipeline, exports / "alpha")


def test_kandinsky_takes_features_of_a_region(exports: Path) -> None:
    pipeline = diffusers.KandinskyV22Pipeline(
        unet=diffusers.UNet2DConditionModel(
            **BLOCKS,
            **UNET,
            out_channels=8,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            addition_embed_type="image",
            encoder_hid_dim=EMBED,
            encoder_hid_dim_type="image_proj",
        ),
        scheduler=scheduler(),
        movq=diffusers.VQModel(latent_channels=4, norm_type="spatial", num_vq_embeddings=4),
    )
    encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(exports / "alpha")
    size = {"height": 32, "width": 32}
    case = Case(diffusers.KandinskyV22Pipeline, size, "image_embeds")
    drawn = []
    for region in (LEFT, RIGHT):
        with torch.no_grad():
            found = encoder(region_prompt(picture(), region, exports / "alpha")).image_embeds
        drawn.append(case.draw(pipeline, found, negative_image_embeds=torch.zeros_like(found)))
    assert difference(*drawn) > 0.02


def test_offloaded_pipelines_are_refused(tmp_path: Path, exports: Path) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    pipeline = variations(clip(), tmp_path)
    hooks.add_hook_to_module(pipeline.unet, hooks.ModelHook())
    with pytest.raises(ValueError, match=r"is offloaded, .* call pipeline.remove_all_hooks\(\)"):
        swap_image_encoder(pipeline, exports / "alpha")
    pipeline.remove_all_hooks()
    swap_image_encoder(pipeline, exports / "alpha")
    assert pipeline.image_encoder.config.num_channels == 4


def test_precision_and_device_stay(tmp_path: Path, exports: Path) -> None:
    pipeline = variations(clip(), tmp_path).to(torch.bfloat16)
    swap_image_encoder(pipeline, exports / "alpha")
    assert {p.dtype for p in pipeline.image_encoder.parameters()} == {torch.bfloat16}
    assert not pipeline.image_encoder.training
    prompt = region_prompt(picture(), LEFT, exports / "alpha")
    assert np.isfinite(VARIATIONS.draw(pipeline, prompt)).all()
    pipeline.image_encoder.to("meta")
    swap_image_encoder(pipeline, exports / "alpha")
    assert pipeline.image_encoder.device.type == "meta"


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path, exports: Path) -> None:
    alpha = exports / "alpha"
    two = [picture(), picture()]
    with pytest.raises(ValueError, match=r"a region for each of 2 images, .* got 1"):
        region_prompt(two, [None], alpha)
    with pytest.raises(ValueError, match="expected a region for each of 0 images, and at least"):
        region_prompt([], [], alpha)
    with pytest.raises(TypeError, match="a list with a region for each of 2 images, got one Box"):
        region_prompt(two, LEFT, alpha)
    with pytest.raises(ValueError, match="lies outside the image of 90 x 50 px"):
        region_prompt(picture(), Box(95, 0, 99, 9), alpha)
    with pytest.raises(ValueError, match="does not say how pictures with alpha are prepared"):
        region_prompt(picture(), LEFT, exports / "rgb")
    with pytest.raises(ValueError, match="is no export"):
        region_prompt(picture(), LEFT, tmp_path / "none")
