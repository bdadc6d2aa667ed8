from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import alpha_clip
from alpha_clip.model import AlphaClip


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
    with pytest.raises(ValueError, match=r"shape \[batch, regions, 1, height, width\]"):
        model.encode_regions(torch.zeros(2, 3, 8, 8), torch.zeros(alphas))


def test_region_alphas_of_another_size_are_refused(model: AlphaClip) -> None:
    with pytest.raises(ValueError, match="of one size"):
        model.encode_regions(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 1, 8, 9))


def test_parts_are_the_models_own(model: AlphaClip) -> None:
    assert model.visual is model.clip.visual
    assert model.logit_scale is model.clip.logit_scale
    assert model.image_size == model.config["vision_cfg"]["image_size"]
