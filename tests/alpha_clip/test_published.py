"""Against inputs and outputs of the published code, and called as its scripts call it."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

import alpha_clip
from alpha_clip.layouts import to_published
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import add_alpha_channel, fold_alpha

Golden = dict[str, Tensor]


@pytest.fixture(scope="session")
def goldens(repo: Path) -> Path:
    folder = repo.parent / "shared" / "goldens"
    if not folder.exists():
        pytest.skip("needs outputs of the published code in ../shared/goldens")
    return folder


@pytest.fixture(params=["vit", "rn"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def golden(goldens: Path, kind: str) -> Golden:
    return dict(torch.load(goldens / f"{kind}_io.pt", weights_only=True))


@pytest.fixture
def loaded(goldens: Path, kind: str) -> AlphaClip:
    model, _ = alpha_clip.load(
        str(goldens / f"{kind}_openai.pt"), str(goldens / f"{kind}_alpha_visual.pth"), device="cpu"
    )
    return model.requires_grad_(False)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_published_features(loaded: AlphaClip, golden: Golden) -> None:
    image, alpha = golden["image"], golden["alpha"]
    close(loaded.visual(image, alpha), golden["image_features"])
    close(loaded.encode_image(image, alpha), golden["image_features"])
    close(loaded.encode_image(torch.cat([image, alpha], 1)), golden["image_features"])
    close(loaded.encode_text(golden["tokens"]), golden["text_features"])
    per_image, per_text = loaded(image, golden["tokens"], alpha)
    close(per_image, golden["logits_per_image"])
    close(per_text, golden["logits_per_image"].T)


def test_published_features_of_a_folded_tower(loaded: AlphaClip, golden: Golden) -> None:
    fold_alpha(loaded.visual)
    close(loaded.encode_image(golden["image"], golden["alpha"]), golden["image_features"])


def test_published_features_region_by_region(loaded: AlphaClip, golden: Golden) -> None:
    many = loaded.encode_regions(golden["image"], golden["alpha"][:, None], chunk=2)
    close(many[:, 0], golden["image_features"])


def test_a_new_alpha_is_the_base(goldens: Path, kind: str, golden: Golden) -> None:
    model, _ = alpha_clip.load(str(goldens / f"{kind}_openai.pt"), device="cpu")
    with torch.no_grad():
        close(model.visual(golden["image"], golden["alpha"]), golden["base_image_features"])
        close(model.encode_image(golden["image"]), golden["base_image_features"])


def test_create_model_gives_the_same(goldens: Path, kind: str, golden: Golden) -> None:
    model, transform, _ = alpha_clip.create_model(
        pretrained=goldens / f"{kind}_openai.pt", checkpoint=goldens / f"{kind}_alpha_visual.pth"
    )
    assert transform.size == 64
    with torch.no_grad():
        close(model.encode_image(golden["image"], golden["alpha"]), golden["image_features"])
        close(model.encode_text(golden["tokens"]), golden["text_features"])
        close(
            model(golden["image"], golden["tokens"], golden["alpha"])[0],
            golden["logits_per_image"],
        )


def test_only_the_drop_in_rounds_a_base(goldens: Path, kind: str) -> None:
    """The published loader takes the base through float16; fine-tuned weights must not be."""
    file = goldens / f"{kind}_openai.pt"
    stored = torch.load(file, weights_only=True)["visual.conv1.weight"]
    exact: Any = alpha_clip.create_model(pretrained=file)[0].visual
    rounded: Any = alpha_clip.load(str(file), device="cpu")[0].visual
    assert torch.equal(exact.conv1.weight, stored)
    assert torch.equal(rounded.conv1.weight, stored.half().float())


@pytest.mark.parametrize("kind", ["vit"], indirect=True)
def test_published_attention(loaded: AlphaClip, golden: Golden) -> None:
    features, attention = loaded.visual(golden["image"], golden["alpha"], return_attn=True)
    close(features, golden["image_features"])
    close(attention, golden["last_block_attention"])


@pytest.mark.parametrize("kind", ["rn"], indirect=True)
def test_a_resnet_has_no_attention_maps(loaded: AlphaClip, golden: Golden) -> None:
    with pytest.raises(ValueError, match=r"expected a tower of tokens \(a ViT\)"):
        loaded.visual(golden["image"], golden["alpha"], return_attn=True)


@pytest.mark.parametrize("kind", ["vit"], indirect=True)
def test_half_precision_files_give_nearly_the_same(
    goldens: Path, kind: str, golden: Golden, tmp_path: Path
) -> None:
    for part in ("openai.pt", "alpha_visual.pth"):
        state = torch.load(goldens / f"{kind}_{part}", weights_only=True)
        torch.save({k: v.half() for k, v in state.items()}, tmp_path / part)
    model, _ = alpha_clip.load(
        str(tmp_path / "openai.pt"), str(tmp_path / "alpha_visual.pth"), device="cpu"
    )
    assert model.dtype == torch.float32
    with torch.no_grad():
        features = model.visual(golden["image"].half(), golden["alpha"].half())
    cosine = F.cosine_similarity(features, golden["image_features"])
    assert cosine.min() > 0.9999


# From here on: towers of our own, no goldens.

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
VISION: dict[str, Any] = {"image_size": 64, "patch_size": 16, "width": 128, "layers": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An OpenAI state dict with the real vocabulary, and a published alpha tower."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    clip = CLIP(32, VISION, TEXT, quick_gelu=True)
    torch.save(clip.state_dict(), folder / "base.pt")
    visual: Any = add_alpha_channel(CLIP(32, VISION, TEXT, quick_gelu=True).visual)
    nn.init.normal_(visual.conv1.weight_alpha, std=0.1)
    torch.save(to_published(visual), folder / "alpha.pth")
    return str(folder / "base.pt"), str(folder / "alpha.pth")


def photo(width: int = 90, height: int = 70) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_steps_of_a_script_for_the_papers_package(files: tuple[str, str]) -> None:
    """What the paper's README does: a transform for the mask, half inputs, softmax of cosines."""
    model, preprocess = alpha_clip.load(files[0], alpha_vision_ckpt_pth=files[1], device="cpu")
    to_alpha = transforms.Compose(
        [transforms.ToTensor(), transforms.Resize((64, 64)), transforms.Normalize(0.5, 0.26)]
    )
    mask = np.zeros((70, 90), bool)
    mask[10:40, 20:50] = True
    alpha = to_alpha((mask * 255).astype(np.uint8)).half().unsqueeze(dim=0)
    image = preprocess(photo()).unsqueeze(0).half()
    text = alpha_clip.tokenize(["a dressed woman", "a purple dress", "a bouquet"])
    with torch.no_grad():
        image_features = model.visual(image, alpha)
        text_features = model.encode_text(text)
    image_features = image_features / image_features.norm(dim=-1, keepdim=True)
    text_features = text_features / text_features.norm(dim=-1, keepdim=True)
    similarity = (100.0 * image_features @ text_features.T).softmax(dim=-1)
    assert similarity.shape == (1, 3)
    assert float(similarity.sum()) == pytest.approx(1)


def test_preprocessing_is_openais(files: tuple[str, str]) -> None:
    _, preprocess = alpha_clip.load(files[0], device="cpu")
    expected = open_clip.image_transform(64, is_train=False)(photo())
    torch.testing.assert_close(preprocess(photo()), expected)


def test_scripts_may_change_the_steps_of_preprocessing(files: tuple[str, str]) -> None:
    """The REC script squashes by replacing the first step, and resizes masks with the first two."""
    model, preprocess = alpha_clip.load(files[0], device="cpu")
    size = model.visual.input_resolution
    assert size == 64
    preprocess.transforms[0] = transforms.Resize(
        (size, size), interpolation=transforms.InterpolationMode.BICUBIC
    )
    mask = Image.new("L", (90, 70), 255)
    assert preprocess.transforms[1](preprocess.transforms[0](mask)).size == (64, 64)
    right_half = np.zeros((70, 90), bool)
    right_half[:, 45:] = True
    image, alpha = preprocess(photo(), right_half)
    assert image.shape == (3, 64, 64)
    seen = alpha > 0
    assert seen[..., 33:].all()
    assert not seen[..., :31].any()


@pytest.mark.parametrize("size", [(90, 70), (70, 90), (200, 64), (64, 64)])
def test_a_region_stays_with_its_pixels(files: tuple[str, str], size: tuple[int, int]) -> None:
    _, preprocess = alpha_clip.load(files[0], device="cpu")
    mask = np.zeros(size[::-1], bool)
    mask[size[1] // 4 : -10, size[0] // 3 : -15] = True
    image, alpha = preprocess(Image.fromarray(mask).convert("RGB"), mask)
    assert alpha.shape == (1, 64, 64)
    bright, seen = image[0] > 0, alpha[0] > 0
    assert (bright & seen).sum() / (bright | seen).sum() > 0.93
    assert float(alpha.max()) == pytest.approx((1 - 0.5) / 0.26, abs=1e-5)


def test_a_region_of_one_pixel_stays_visible(files: tuple[str, str]) -> None:
    _, preprocess = alpha_clip.load(files[0], device="cpu")
    mask = np.zeros((900, 700), bool)
    mask[450, 350] = True
    _, alpha = preprocess(photo(700, 900), mask)
    assert float(alpha.max()) == pytest.approx((1 - 0.5) / 0.26, abs=1e-5)


def test_a_step_that_alpha_cannot_repeat_is_refused(files: tuple[str, str]) -> None:
    _, preprocess = alpha_clip.load(files[0], device="cpu")
    preprocess.transforms.insert(0, transforms.RandomCrop(60))
    assert preprocess(photo()).shape == (3, 64, 64)
    with pytest.raises(ValueError, match="which can't be repeated for alpha"):
        preprocess(photo(), np.ones((70, 90), bool))


def test_positions_may_be_replaced(files: tuple[str, str]) -> None:
    """The REC script does so for images that are not square."""
    model, _ = alpha_clip.load(files[0], files[1], device="cpu")
    visual: Any = model.visual
    visual.positional_embedding = nn.Parameter(torch.randn(1 + 4 * 6, 128))
    assert visual(torch.randn(1, 3, 64, 96), torch.ones(1, 1, 64, 96)).shape == (1, 32)


def test_the_tower_takes_published_weights_by_itself(files: tuple[str, str]) -> None:
    model, _ = alpha_clip.load(files[0], device="cpu")
    whole, _ = alpha_clip.load(files[0], files[1], device="cpu")
    state = torch.load(files[1], weights_only=True)
    model.visual.load_state_dict(state)
    own, expected = model.visual.state_dict(), whole.visual.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[k], expected[k]) for k in own)
    model.visual.load_state_dict(own)
    assert "conv1_alpha.weight" in state  # what was given is not changed


def test_attributes_that_scripts_read_and_set(files: tuple[str, str]) -> None:
    model, _ = alpha_clip.load(files[0], device="cpu")
    assert model.context_length == 77
    assert model.token_embedding.weight.shape[0] == model.vocab_size == 49408
    assert model.visual.conv1.weight.dtype == model.dtype
    model.logit_scale = nn.Parameter(torch.ones([]) * 4.6052)
    assert model.logit_scale.item() == pytest.approx(4.6052)
    assert model.state_dict()["clip.logit_scale"].item() == pytest.approx(4.6052)
    wrapped = nn.DataParallel(model.visual)
    model.visual = wrapped
    assert model.visual is wrapped
    assert model.encode_image(torch.randn(2, 3, 64, 64)).shape == (2, 32)
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing


def test_a_loaded_model_can_be_saved_as_ours(files: tuple[str, str], tmp_path: Path) -> None:
    model, _ = alpha_clip.load(files[0], files[1], device="cpu")
    alpha_clip.save_checkpoint(model, tmp_path)
    again = alpha_clip.load_checkpoint(tmp_path)
    rgba = torch.randn(1, 4, 64, 64)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    torch.testing.assert_close(again.encode_image(rgba), model.encode_image(rgba))
    assert again.base == "base.pt"


def test_available_models_are_openais() -> None:
    names = alpha_clip.available_models()
    assert {"RN50", "RN50x64", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"} <= set(names)
    assert len(names) == 9


def test_names_are_fetched_and_verified_by_open_clip(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def fetch(url: str, cache_dir: str | None) -> str:
        asked.append((url.rsplit("/", 1)[1], cache_dir))
        return files[0]

    monkeypatch.setattr("alpha_clip.published.download_pretrained_from_url", fetch)
    for name in alpha_clip.available_models():
        model, _ = alpha_clip.load(name, device="cpu", download_root=str(tmp_path))
        assert open_clip.get_model_config(model.name) is not None
    assert [name for name, _ in asked] == [
        "RN50.pt", "RN101.pt", "RN50x4.pt", "RN50x16.pt", "RN50x64.pt",
        "ViT-B-32.pt", "ViT-B-16.pt", "ViT-L-14.pt", "ViT-L-14-336px.pt",
    ]  # fmt: skip
    assert {root for _, root in asked} == {str(tmp_path)}


def test_without_a_network_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str, cache_dir: str | None) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("alpha_clip.published.download_pretrained_from_url", offline)
    with pytest.raises(ValueError, match=r"ViT-L-14\.pt \(no route to host\); fetch it by other"):
        alpha_clip.load("ViT-L/14")


def test_bad_arguments_are_refused(files: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="is no file and none of RN50"):
        alpha_clip.load("ViT-Z/14")
    with pytest.raises(ValueError, match="pass jit=False"):
        alpha_clip.load(files[0], jit=True)
    with pytest.raises(ValueError, match="there is no file"):
        alpha_clip.load(files[0], "checkpoints/missing.pth", device="cpu")
    model, _ = alpha_clip.load(files[0], files[1], device="cpu")
    with pytest.raises(ValueError, match=r"of one size, got \[1, 3, 64, 64\] and \[1, 1, 32, 32\]"):
        model.visual(torch.zeros(1, 3, 64, 64), torch.zeros(1, 1, 32, 32))


def test_lora_arguments_are_explained(files: tuple[str, str]) -> None:
    with pytest.warns(UserWarning, match="no LoRA layers of rank 8 are added for training"):
        alpha_clip.load(files[0], device="cpu", lora_adapt=True, rank=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alpha_clip.load(files[0], files[1], device="cpu", lora_adapt=True, rank=8)


def test_tokens_are_openais() -> None:
    tokens = alpha_clip.tokenize(["a Dog &amp; a  cat", "x"])
    assert tokens.dtype == torch.int32
    assert tokens.shape == (2, 77)
    assert torch.equal(tokens.long(), open_clip.tokenize(["a dog & a cat", "x"]))
    assert tokens[0, 0] == 49406
    assert torch.equal(alpha_clip.tokenize("x"), tokens[1:])
    assert alpha_clip.tokenize("x", context_length=5).tolist() == [[49406, 343, 49407, 0, 0]]


def test_long_texts_are_cut_or_refused() -> None:
    text = " ".join(["dog"] * 90)
    tokens = alpha_clip.tokenize(text)
    assert tokens[0, -1] == 49407
    with pytest.raises(ValueError, match=r"has 92 tokens, more than the context of 77; shorten"):
        alpha_clip.tokenize(["short", text], truncate=False)
    fits = " ".join(["dog"] * 75)
    assert torch.equal(alpha_clip.tokenize(fits, truncate=False), alpha_clip.tokenize(fits))


def test_a_loaded_model_is_pickled_by_its_state(files: tuple[str, str]) -> None:
    model, _ = alpha_clip.load(files[0], files[1], device="cpu")
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other, _ = alpha_clip.load(files[0], device="cpu")
    other.load_state_dict(torch.load(buffer, weights_only=True))
    rgba = torch.randn(1, 4, 64, 64)
    assert torch.equal(other.encode_image(rgba), model.encode_image(rgba))
