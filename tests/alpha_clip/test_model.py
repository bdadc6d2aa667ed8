from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import alpha_clip
from alpha_clip.model import AlphaClip
from alpha_clip.transforms import RegionTransform


def inputs(model: AlphaClip, batch: int = 2, regions: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    size = model.image_size
    return torch.randn(batch, 3, size, size), torch.randn(batch, regions, 1, size, size)


def test_the_front_door(tiny: tuple[Any, Any, Any]) -> None:
    model, transform, tokenizer = tiny
    image = Image.new("RGB", (80, 60), "red")
    features = model.encode_image(transform(image, alpha_clip.Box(5, 5, 50, 50))[None])
    texts = model.encode_text(tokenizer(["a purple dress", "a bouquet"]))
    assert features.shape == (1, model.config["embed_dim"])
    assert texts.shape == (2, model.config["embed_dim"])


def test_rgba_equals_rgb_with_alpha(model: AlphaClip) -> None:
    rgb, alphas = inputs(model)
    joined = model.encode_image(torch.cat([rgb, alphas[:, 0]], 1))
    assert torch.equal(joined, model.encode_image(rgb, alphas[:, 0]))
    assert not torch.allclose(joined, model.encode_image(rgb, alphas[:, 1]), atol=1e-3)


def test_no_alpha_is_the_whole_image(model: AlphaClip) -> None:
    rgb, _ = inputs(model)
    whole = torch.full_like(rgb[:, :1], (1 - 0.5) / 0.26)
    torch.testing.assert_close(model.encode_image(rgb), model.encode_image(rgb, whole))
    assert not torch.allclose(model.encode_image(rgb), model.encode_image(rgb, 0 * whole))


@pytest.mark.parametrize("chunk", [1, 2, 4, 64])
@pytest.mark.parametrize("normalize", [False, True])
def test_encode_regions_equals_one_by_one(model: AlphaClip, chunk: int, normalize: bool) -> None:
    rgb, alphas = inputs(model)
    together = model.encode_regions(rgb, alphas, normalize, chunk)
    assert together.shape == (2, 3, model.config["embed_dim"])
    for i in range(2):
        for j in range(3):
            alone = model.encode_image(rgb[i : i + 1], alphas[i : i + 1, j], normalize)
            torch.testing.assert_close(together[i, j], alone[0], rtol=1e-5, atol=1e-5)


def test_normalize_gives_length_1(model: AlphaClip) -> None:
    rgb, _ = inputs(model)
    tokens = torch.randint(1, 100, (2, model.config["text_cfg"]["context_length"]))
    for plain, unit in (
        (model.encode_image(rgb), model.encode_image(rgb, normalize=True)),
        (model.encode_text(tokens), model.encode_text(tokens, normalize=True)),
    ):
        torch.testing.assert_close(unit, plain / plain.norm(dim=-1, keepdim=True))


def test_forward_gives_scaled_cosines(tiny: tuple[Any, Any, Any]) -> None:
    model, _, tokenizer = tiny
    rgb, alphas = inputs(model)
    tokens = tokenizer(["a cat", "a dog", "a red thing"])
    per_image, per_text = model(rgb, tokens, alphas[:, 0])
    image, text = model.encode_image(rgb, alphas[:, 0]), model.encode_text(tokens)
    expected = model.logit_scale.exp() * F.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(per_image, expected)
    assert torch.equal(per_text, per_image.T)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 5, 8, 8), (8, 8)])
def test_images_of_another_shape_are_refused(model: AlphaClip, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="RegionTransform, and add the batch axis"):
        model.encode_image(torch.zeros(shape))


@pytest.mark.parametrize(
    ("image", "alpha"),
    [
        ((2, 4, 8, 8), (2, 1, 8, 8)),
        ((2, 3, 8, 8), (1, 1, 8, 8)),
        ((2, 3, 8, 8), (2, 8, 8)),
        ((2, 3, 8, 8), (2, 3, 8, 8)),
        ((2, 3, 8, 8), (2, 1, 8, 9)),
    ],
)
def test_alphas_that_do_not_fit_are_refused(
    model: AlphaClip, image: tuple[int, ...], alpha: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="with a separate alpha, expected RGB"):
        model.encode_image(torch.zeros(image), torch.zeros(alpha))


@pytest.mark.parametrize("alphas", [(2, 3, 8, 8), (2, 3, 3, 8, 8), (1, 3, 1, 8, 8), (3, 1, 8, 8)])
def test_region_alphas_that_do_not_fit_are_refused(
    model: AlphaClip, alphas: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"alphas \[batch, regions, 1, height, width\]"):
        model.encode_regions(torch.zeros(2, 3, 8, 8), torch.zeros(alphas))


def test_region_alphas_of_another_size_are_refused(model: AlphaClip) -> None:
    with pytest.raises(ValueError, match="of the same batch and size"):
        model.encode_regions(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 1, 8, 9))


def test_parts_are_the_models_own(model: AlphaClip) -> None:
    assert model.visual is model.clip.visual
    assert model.logit_scale is model.clip.logit_scale
    assert model.image_size == model.config["vision_cfg"]["image_size"]


def test_one_pass_of_rgb_and_no_more_than_a_chunk_at_a_time(model: AlphaClip) -> None:
    """The memory is bounded by the chunk, whatever the number of regions."""
    rgb, alphas = inputs(model, batch=1, regions=10)
    seen: list[torch.Size] = []
    hook = model.visual.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    try:
        model.encode_regions(rgb, alphas, chunk=4)
    finally:
        hook.remove()
    size = model.image_size
    assert seen == [(4, 1, size, size), (4, 1, size, size), (2, 1, size, size)]


def test_regions_of_a_folded_tower(tiny_name: str) -> None:
    model = alpha_clip.create_model(tiny_name)[0].requires_grad_(False)
    torch.nn.init.normal_(model.visual.conv1.weight_alpha, std=0.02)
    rgb, alphas = inputs(model)
    expected = model.encode_regions(rgb, alphas)
    alpha_clip.fold_alpha(model.visual)
    torch.testing.assert_close(model.encode_regions(rgb, alphas), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("regions", "chunk"), [(0, 64), (3, 0), (3, -1)])
def test_no_regions_and_no_chunk_are_refused(model: AlphaClip, regions: int, chunk: int) -> None:
    rgb, alphas = inputs(model, regions=3)
    with pytest.raises(ValueError, match="at least one region and a chunk of at least 1"):
        model.encode_regions(rgb, alphas[:, :regions], chunk=chunk)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(model: AlphaClip, bad: float) -> None:
    rgb, alphas = inputs(model)
    broken = alphas.clone()
    broken[0, 1, 0, 3, 4] = bad
    with pytest.raises(ValueError, match="holds NaN or infinity; build it with RegionTransform"):
        model.encode_image(rgb, broken[:, 1])
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        model.encode_regions(rgb, broken)
    model.encode_image(rgb, broken[:, 0])


def test_classify_names_regions(tiny: tuple[Any, Any, Any]) -> None:
    model, transform, tokenizer = tiny
    image = Image.effect_noise((80, 60), 90).convert("RGB")
    regions = [alpha_clip.Box(5, 5, 40, 40), None]
    labels = ["cat", "dog", "a red thing"]
    names = model.classify(image, regions, labels, template="one {}")
    assert names.shape == (2, 3)
    torch.testing.assert_close(names.sum(1), torch.ones(2))
    rgba = torch.stack([transform(image, region) for region in regions])
    logits, _ = model(rgba, tokenizer(["one cat", "one dog", "one a red thing"]))
    torch.testing.assert_close(names, logits.softmax(-1), rtol=1e-4, atol=1e-6)


def test_classify_by_windows(tiny_name: str) -> None:
    model, transform, _ = alpha_clip.create_model(tiny_name, geometry="crop_box")
    image = Image.effect_noise((80, 60), 90).convert("RGB")
    regions = [alpha_clip.Box(5, 5, 20, 20), alpha_clip.Box(50, 30, 70, 50)]
    names = model.classify(image, regions, ["cat", "dog"])
    rgba = torch.stack([transform(image, region) for region in regions])
    tokens = model.tokenizer(["a photo of a cat.", "a photo of a dog."])
    with torch.no_grad():
        torch.testing.assert_close(names, model(rgba, tokens)[0].softmax(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "arguments", [([], ["cat"]), ([None], []), ([None], ["cat"], "a photo of a cat")]
)
def test_nothing_to_classify_is_refused(model: AlphaClip, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="at least one region, one label and a template with"):
        model.classify(Image.new("RGB", (9, 9)), *arguments)


def test_a_siglip_adds_its_bias(tiny_name: str) -> None:
    model = alpha_clip.create_model(tiny_name)[0]
    rgb, _ = inputs(model)
    tokens = model.tokenizer(["cat", "dog"])
    before, _ = model(rgb, tokens)
    model.clip.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    torch.testing.assert_close(model(rgb, tokens)[0], before - 10)


def test_the_rest_of_the_clip_is_there(model: AlphaClip) -> None:
    assert model.token_embedding is model.clip.token_embedding
    with pytest.raises(AttributeError, match="surprise"):
        _ = model.surprise


@pytest.mark.parametrize("size", [(24, 24), (48, 64)])
def test_another_size_is_refused(model: AlphaClip, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"of 48 x 48 px, got \[{size[0]}, {size[1]}\]"):
        model.encode_image(torch.zeros(1, 4, *size))
    with pytest.raises(ValueError, match="takes images of 48 x 48 px"):
        model.encode_regions(torch.zeros(1, 3, *size), torch.zeros(1, 2, 1, *size))


def test_errors_of_the_tower_itself_are_not_hidden(
    model: AlphaClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(rgba: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.visual, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.encode_image(torch.zeros(1, 4, model.image_size, model.image_size))


def test_a_coca_gives_its_pooled_features() -> None:
    """Its tower returns its tokens as well."""
    from open_clip.coca_model import CoCa

    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    vision |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    clip = CoCa(32, text, text, vision).eval()
    alpha_clip.add_alpha_channel(clip.visual)
    coca = AlphaClip(clip, "coca", {"vision_cfg": vision}, RegionTransform(32))
    rgba = torch.randn(2, 4, 32, 32)
    with torch.no_grad():
        found = coca.encode_image(rgba)
        assert torch.equal(found, clip.visual(rgba)[0])
        unit = coca.encode_image(rgba, normalize=True)
    torch.testing.assert_close(unit, F.normalize(found, dim=-1))
