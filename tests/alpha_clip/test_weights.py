import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn

import alpha_clip
from alpha_clip.layouts import infer_config, to_published
from alpha_clip.surgery import add_alpha_channel, alpha_parameters, fold_alpha
from alpha_clip.weights import read_weights_file

VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}
RESNET: dict[str, Any] = {"image_size": 32, "layers": [1, 2, 1, 1], "width": 16, "patch_size": None}
TEXT = {"context_length": 9, "vocab_size": 60, "width": 64, "heads": 1, "layers": 1}
State = dict[str, Tensor]


def clip_of(vision: dict[str, Any]) -> CLIP:
    torch.manual_seed(1)
    return CLIP(32, vision, TEXT, quick_gelu=True).eval()


@pytest.fixture(params=[VISION, RESNET], ids=["ViT", "ResNet"])
def clip(request: pytest.FixtureRequest) -> CLIP:
    return clip_of(request.param)


@pytest.fixture
def published(clip: CLIP) -> State:
    """The tower of `clip` in the published layout, with an alpha kernel that is not zero."""
    visual = add_alpha_channel(clip_of(VISION if hasattr(clip.visual, "proj") else RESNET).visual)
    for parameter in alpha_parameters(visual):
        nn.init.normal_(parameter, std=0.1)
    return to_published(visual)


def rgba(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 32, 32)


def module_tree(state: State) -> nn.Module:
    """A module whose state dict is `state`, to be scripted as OpenAI's archives are."""
    root = nn.Module()
    for key, value in state.items():
        *path, leaf = key.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(leaf, value)
    return root


def save_archive(state: State, file: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; OpenAI's files are not
        torch.jit.save(torch.jit.script(module_tree(state)), file)
    return file


def test_a_published_tower_is_recognised(published: State, tmp_path: Path) -> None:
    torch.save(published, tmp_path / "any.name")
    weights = read_weights_file(tmp_path / "any.name")
    assert weights.visual_only
    assert weights.has_alpha
    assert weights.quick_gelu
    assert torch.equal(weights.state["visual.conv1.weight_alpha"], published["conv1_alpha.weight"])
    assert not any(".attn.in_proj." in key for key in weights.state)


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s},
    "twice": lambda s: {"model": {"state_dict": s}},
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "_orig_mod.module.": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "both": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "beside a tensor": lambda s: {"step": torch.tensor(3), "state_dict": s},
    "visual.": lambda s: {f"visual.{k}": v for k, v in s.items()},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_come_off(wrap: Callable[[State], Any], published: State, tmp_path: Path) -> None:
    torch.save(published, tmp_path / "plain.pth")
    torch.save(wrap(published), tmp_path / "wrapped.pth")
    plain = read_weights_file(tmp_path / "plain.pth").state
    wrapped = read_weights_file(tmp_path / "wrapped.pth").state
    assert plain.keys() == wrapped.keys()
    assert all(torch.equal(plain[k], wrapped[k]) for k in plain)


def test_the_same_model_from_every_kind_of_file(clip: CLIP, tmp_path: Path) -> None:
    """OpenAI's archive and state dict, open_clip's checkpoint and safetensors: same features."""
    state = dict(clip.state_dict())
    extras = {"input_resolution": 32, "context_length": 9, "vocab_size": 60}
    files = [tmp_path / name for name in ("a.pt", "b.pt", "c.safetensors", "d.pt")]
    torch.save(state, files[0])
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, files[1])
    save_file(state, files[2])
    save_archive({**state, **{k: torch.tensor(v) for k, v in extras.items()}}, files[3])
    image, tokens = rgba(), torch.randint(1, 60, (3, 9))
    with torch.no_grad():
        expected = clip.encode_image(image[:, :3]), clip.encode_text(tokens)
    for file in files:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*TorchScript archive")
            model, transform, _ = alpha_clip.create_model(pretrained=file)
        assert transform.size == 32
        assert model.config["quick_gelu"]
        assert model.base == file.name
        with torch.no_grad():
            assert torch.equal(model.encode_image(image), expected[0]), file
            torch.testing.assert_close(model.encode_text(tokens), expected[1], rtol=0, atol=1e-6)


def test_float32_weights_keep_their_precision(clip: CLIP, tmp_path: Path) -> None:
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    loaded = alpha_clip.create_model(pretrained=tmp_path / "clip.pt")[0].clip.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in clip.state_dict().items())


def test_an_archive_is_named_before_it_is_loaded(clip: CLIP, tmp_path: Path) -> None:
    file = save_archive(dict(clip.state_dict()), tmp_path / "archive.pt")
    with pytest.warns(UserWarning, match="TorchScript archive: .* only if you trust"):
        weights = read_weights_file(file)
    assert weights.quick_gelu
    read_weights_file(file, trusted=True)  # warnings are errors here


def test_published_weights_go_onto_their_base(clip: CLIP, published: State, tmp_path: Path) -> None:
    torch.save(clip.state_dict(), tmp_path / "base.pt")
    for name, dtype in (("full.pth", torch.float32), ("half.pth", torch.float16)):
        stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in published.items()}
        torch.save(stored, tmp_path / name)
        model, _, _ = alpha_clip.create_model(
            pretrained=tmp_path / "base.pt", checkpoint=tmp_path / name
        )
        own = model.visual.state_dict()
        assert torch.equal(own["conv1.weight_alpha"], stored["conv1_alpha.weight"].float())
        assert own["conv1.weight"].dtype == torch.float32
        text = clip.state_dict()["token_embedding.weight"]
        assert torch.equal(model.clip.token_embedding.weight, text)


def test_a_whole_published_model_needs_no_base(
    clip: CLIP, published: State, tmp_path: Path
) -> None:
    whole = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    whole |= {f"visual.{k}": v for k, v in published.items()}
    torch.save(whole, tmp_path / "whole.pt")
    for role in ("checkpoint", "pretrained"):
        model = alpha_clip.create_model(**{role: tmp_path / "whole.pt"})[0]
        assert torch.equal(
            model.visual.state_dict()["conv1.weight_alpha"], published["conv1_alpha.weight"]
        )


def test_published_layout_round_trip(clip: CLIP, published: State, tmp_path: Path) -> None:
    torch.save(clip.state_dict(), tmp_path / "base.pt")
    torch.save(published, tmp_path / "alpha.pth")
    model = alpha_clip.create_model(
        pretrained=tmp_path / "base.pt", checkpoint=tmp_path / "alpha.pth"
    )[0]
    again = to_published(model.visual)
    assert again.keys() == published.keys()
    assert all(torch.equal(again[k], published[k]) for k in again)


def test_folded_weights_come_apart_again(clip: CLIP, tmp_path: Path) -> None:
    add_alpha_channel(clip.visual)
    for parameter in alpha_parameters(clip.visual):
        nn.init.normal_(parameter, std=0.1)
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    fold_alpha(clip.visual)
    torch.save(clip.state_dict(), tmp_path / "folded.pt")
    model = alpha_clip.create_model(checkpoint=tmp_path / "folded.pt")[0]
    after = model.clip.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_only_openais_layout_says_what_it_is(clip: CLIP, tmp_path: Path) -> None:
    state = {k: v for k, v in clip.state_dict().items() if k != "ln_final.weight"}
    with pytest.raises(ValueError, match=r"not a whole CLIP .*'ln_final.weight' is missing"):
        infer_config(state, "it")
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="name the architecture"):
        alpha_clip.create_model(pretrained=tmp_path / "part.pt")


def test_another_architecture_is_refused_with_its_keys(
    clip: CLIP, published: State, tmp_path: Path
) -> None:
    torch.save(clip.state_dict(), tmp_path / "base.pt")
    broken = {k: v for k, v in published.items() if k != "conv1.weight"}
    broken |= {"surprise": torch.zeros(1), "conv1_alpha.weight": torch.zeros(8, 1, 5, 5)}
    torch.save(broken, tmp_path / "alpha.pth")
    with pytest.raises(ValueError, match="do not fit") as caught:
        alpha_clip.create_model(pretrained=tmp_path / "base.pt", checkpoint=tmp_path / "alpha.pth")
    for part in ("1 missing: conv1.weight", "1 unexpected: surprise", "of another shape: conv1."):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"do not fit .*of another shape"):
        alpha_clip.create_model("RN50", pretrained=tmp_path / "base.pt")


def test_positions_are_interpolated_only_when_asked(tmp_path: Path) -> None:
    clip = clip_of(VISION)
    torch.save(clip.state_dict(), tmp_path / "base.pt")
    larger = clip_of({**VISION, "image_size": 48})
    published = to_published(add_alpha_channel(larger.visual))
    torch.save(published, tmp_path / "alpha.pth")
    files = {"pretrained": tmp_path / "base.pt", "checkpoint": tmp_path / "alpha.pth"}
    with pytest.raises(ValueError, match=r"positional_embedding \[37, 64\] instead of \[17, 64\]"):
        alpha_clip.create_model(**files)
    model, transform, _ = alpha_clip.create_model(**files, image_size=48)
    assert transform.size == model.image_size == 48
    assert model.encode_image(torch.randn(1, 4, 48, 48)).shape == (1, 32)
    own = alpha_clip.save_checkpoint(model, tmp_path / "own")
    assert alpha_clip.load_checkpoint(own).image_size == 48
    assert alpha_clip.create_model(checkpoint=own, image_size=32)[1].size == 32


def test_roles_are_checked(clip: CLIP, published: State, tmp_path: Path) -> None:
    base, alpha = tmp_path / "base.pt", tmp_path / "alpha.pth"
    torch.save(clip.state_dict(), base)
    torch.save(published, alpha)
    for arguments, message in (
        ({"pretrained": alpha}, "image tower alone; pass it as checkpoint"),
        ({"checkpoint": base}, "a CLIP without alpha; pass it as pretrained"),
        ({"checkpoint": alpha}, "holds an image tower alone; give the CLIP"),
    ):
        with pytest.raises(ValueError, match=message):
            alpha_clip.create_model(**arguments)
    whole = {f"visual.{k}": v for k, v in published.items()}
    whole |= {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    torch.save(whole, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="holds both towers; leave pretrained out"):
        alpha_clip.create_model(pretrained=base, checkpoint=tmp_path / "whole.pt")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/alpha-clip-hostile-pickle-ran"),)


def test_a_hostile_pickle_does_not_run(tmp_path: Path) -> None:
    marker = Path("/tmp/alpha-clip-hostile-pickle-ran")
    marker.unlink(missing_ok=True)
    torch.save({"conv1_alpha.weight": torch.zeros(1), "x": Hostile()}, tmp_path / "zip.pth")
    (tmp_path / "legacy.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))
    for file in ("zip.pth", "legacy.pth"):
        with pytest.raises(ValueError, match="refused, because unpickling it could run code"):
            read_weights_file(tmp_path / file)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pth", "safetensors", "archive"])
@pytest.mark.parametrize("keep", [0, 3, 0.3, 0.9, 0.999])
@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
def test_cut_files_are_refused(kind: str, keep: float, tmp_path: Path) -> None:
    file, state = tmp_path / f"cut.{kind}", dict(clip_of(VISION).state_dict())
    if kind == "pth":
        torch.save(state, file)
    elif kind == "safetensors":
        save_file(state, file)
    else:
        save_archive(state, file)
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"damaged or cut short|refused, because unpickling"):
        read_weights_file(file)


@pytest.mark.parametrize("kind", ["zip", "legacy", "noise"])
@pytest.mark.filterwarnings("ignore")
def test_no_damage_raises_anything_else(kind: str, tmp_path: Path) -> None:
    """Bytes cut off and changed at random: read as something, or refused with a ValueError."""
    rng, file = random.Random(0), tmp_path / "damaged.pt"
    state = {"conv1_alpha.weight": torch.randn(8, 1, 4, 4), "conv1.weight": torch.randn(8, 3, 4, 4)}
    torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes() if kind != "noise" else rng.randbytes(150)
    refused = 0
    for _ in range(250):
        data = bytearray(whole if kind != "noise" else rng.randbytes(150))
        if rng.random() < 0.4:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(0, 6) if data else 0):
            data[rng.randrange(min(len(data), 900))] = rng.randrange(256)
        file.write_bytes(data)
        try:
            read_weights_file(file)
        except ValueError:
            refused += 1
    assert refused > 100


STRANGE: dict[str, tuple[Any, str]] = {
    "a list": ([torch.zeros(1)], "holds a list, expected a state dict"),
    "empty": ({}, "expected a state dict"),
    "numbers": ({"a": torch.zeros(1), "b": 3}, "b hold no tensors"),
    "another model": ({"fc.weight": torch.zeros(1)}, "neither a published Alpha-CLIP tower"),
    "lora without its other half": (
        {"conv1_alpha.weight": torch.zeros(1), "a.lora_A": torch.zeros(2, 3)},
        "LoRA weights of a",
    ),
}


@pytest.mark.parametrize(("content", "message"), STRANGE.values(), ids=STRANGE.keys())
def test_strange_content_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "strange.pt")
    with pytest.raises(ValueError, match=message):
        read_weights_file(tmp_path / "strange.pt")


def test_a_web_page_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>Please log in</html>")
    with pytest.raises(ValueError, match=r"is no checkpoint \(it begins with b'<!DOCTYPE"):
        read_weights_file(tmp_path / "page.pth")
    with pytest.raises(ValueError, match="there is no file"):
        read_weights_file(tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="expected weights or one of open_clip's tags"):
        alpha_clip.create_model("ViT-B-16", pretrained=tmp_path / "missing.pth")
