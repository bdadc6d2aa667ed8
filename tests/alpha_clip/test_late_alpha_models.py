"""Late alpha from one end to the other: built, saved, trained, sharded, evaluated."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image

import alpha_clip
from alpha_clip import AlphaClip, AlphaEntry, Box
from alpha_clip.evaluation.focus_baselines import FOCUS
from alpha_clip.layouts import to_published
from alpha_clip.module import AlphaClipModule, EncoderConfig
from alpha_clip.optim import OptimConfig, declare_roles
from alpha_clip.surgery import alpha_entry, alpha_parameters
from alpha_clip.throughput import flops_per_region
from alpha_clip.trainable import TrainableConfig


@pytest.fixture
def late(tiny_name: str) -> AlphaClip:
    model, _, _ = alpha_clip.create_model(tiny_name, alpha_block=2)
    for kernel in alpha_parameters(model.visual):
        torch.nn.init.normal_(kernel, std=0.1)
    return model


def views(model: AlphaClip, images: int = 2, regions: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    size = model.image_size
    alphas = torch.randn(images, regions, 1, size, size).sign() * 1.92
    return torch.randn(images, 3, size, size), alphas


@torch.no_grad()
def test_a_new_model_is_the_clip_it_came_from(tiny_name: str) -> None:
    for block in (0, 1, 3, AlphaEntry(0), AlphaEntry(2, repeat=False)):
        torch.manual_seed(4)
        model, transform, _ = alpha_clip.create_model(tiny_name, alpha_block=block)
        torch.manual_seed(4)
        clip = open_clip.create_model(tiny_name, load_weights=False).eval()
        clip.load_state_dict({k: v for k, v in model.clip.state_dict().items() if "alpha" not in k})
        rgba = transform(Image.effect_noise((60, 50), 90).convert("RGB"), Box(5, 5, 30, 30))[None]
        assert torch.equal(model.encode_image(rgba), clip.encode_image(rgba[:, :3]))


@torch.no_grad()
def test_regions_are_what_they_are_one_by_one(late: AlphaClip) -> None:
    rgb, alphas = views(late, 3, 5)
    alone = [late.encode_image(rgb, alpha, normalize=True) for alpha in alphas.unbind(1)]
    for chunk in (None, 1, 4, 100):
        found = late.encode_regions(rgb, alphas, normalize=True, chunk=chunk)
        assert (found - torch.stack(alone, 1)).abs().max() <= 1e-5
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    with pytest.raises(ValueError, match=r"takes images of 48 x 48 px, got \[56, 56\]"):
        late.encode_regions(torch.zeros(1, 3, 56, 56), torch.zeros(1, 2, 1, 56, 56))


@torch.no_grad()
def test_a_folder_keeps_where_alpha_enters(late: AlphaClip, tmp_path: Path) -> None:
    alpha_clip.save_checkpoint(late, tmp_path / "late")
    record = json.loads((tmp_path / "late" / "open_clip_config.json").read_text())
    assert record["alpha_clip"]["alpha_block"] == {"block": 2, "repeat": True, "summary": True}
    twin = alpha_clip.load_checkpoint(tmp_path / "late")
    assert alpha_entry(twin.visual) == AlphaEntry(2)
    rgb, alphas = views(late)
    assert torch.equal(twin.encode_regions(rgb, alphas), late.encode_regions(rgb, alphas))
    same = alpha_clip.create_model(checkpoint=tmp_path / "late", alpha_block=2)[0]
    assert torch.equal(same.encode_image(rgb), late.encode_image(rgb))
    for other in (0, 1, AlphaEntry(2, repeat=False)):
        with pytest.raises(ValueError, match=r"was trained with alpha at .*block=2"):
            alpha_clip.create_model(checkpoint=tmp_path / "late", alpha_block=other)
    # A file of weights says nothing of the place.
    weights = tmp_path / "late" / "model.safetensors"
    moved = weights.rename(tmp_path / "weights.safetensors")
    tiny = f"local-dir:{Path(__file__).parents[2] / 'configs/models/tiny'}"
    again = alpha_clip.create_model(tiny, checkpoint=moved, alpha_block=2)[0]
    assert torch.equal(again.encode_image(rgb), late.encode_image(rgb))
    with pytest.raises(ValueError, match=r"do not fit .*alpha_block"):
        alpha_clip.create_model(tiny, checkpoint=moved)


@torch.no_grad()
def test_a_clip_that_was_never_pointed_may_take_alpha_anywhere(
    tiny_name: str, tmp_path: Path
) -> None:
    base = alpha_clip.create_model(tiny_name)[0]
    alpha_clip.save_checkpoint(base, tmp_path / "base")
    moved = alpha_clip.create_model(checkpoint=tmp_path / "base", alpha_block=1)[0]
    rgb, _ = views(base)
    assert torch.equal(moved.encode_image(rgb), base.encode_image(rgb))
    assert alpha_entry(moved.visual) == AlphaEntry(1)
    file = tmp_path / "clip.pt"
    torch.save({k: v for k, v in base.clip.state_dict().items() if "alpha" not in k}, file)
    loaded = alpha_clip.create_model(tiny_name, pretrained=file, alpha_block=3)[0]
    assert torch.equal(loaded.encode_image(rgb), base.encode_image(rgb))


@pytest.mark.parametrize(
    "wrong",
    [3, "2", {"block": -1}, {"block": 1, "repeat": "yes"}, {"block": 1, "width": 2}, {"block": 99}],
)
def test_a_damaged_place_is_refused(late: AlphaClip, tmp_path: Path, wrong: Any) -> None:
    alpha_clip.save_checkpoint(late, tmp_path)
    file = tmp_path / "open_clip_config.json"
    record = json.loads(file.read_text())
    record["alpha_clip"]["alpha_block"] = wrong
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"alpha_block|not the config of|repeat"):
        alpha_clip.load_checkpoint(tmp_path)


def test_folders_from_before_late_alpha_still_load(tiny_name: str, tmp_path: Path) -> None:
    alpha_clip.save_checkpoint(alpha_clip.create_model(tiny_name)[0], tmp_path)
    file = tmp_path / "open_clip_config.json"
    record = json.loads(file.read_text())
    del record["alpha_clip"]["alpha_block"]
    file.write_text(json.dumps(record))
    assert alpha_entry(alpha_clip.load_checkpoint(tmp_path).visual).is_first_layer


def test_published_weights_have_their_place(
    model: AlphaClip, tiny_name: str, tmp_path: Path
) -> None:
    torch.save(to_published(model.visual), tmp_path / "alpha.pth")
    state = {k: v for k, v in model.clip.state_dict().items() if "alpha" not in k}
    torch.save(state, tmp_path / "clip.pt")
    given = {"pretrained": tmp_path / "clip.pt", "checkpoint": tmp_path / "alpha.pth"}
    assert alpha_clip.create_model(tiny_name, **given)[0].visual.conv1.weight_alpha.any()
    with pytest.raises(ValueError, match=r"do not fit .*conv1.weight_alpha"):
        alpha_clip.create_model(tiny_name, **given, alpha_block=1)


def test_every_part_learns_in_its_group(late: AlphaClip) -> None:
    roles = declare_roles(late)
    alpha = {name: role for name, role in roles.items() if role.part == "alpha"}
    assert len(alpha) == 4  # two blocks, each a convolution and a summary
    decays = {name.split("alpha_patches.")[1]: role.decays for name, role in alpha.items()}
    assert decays == {
        "0.weight_alpha": True,
        "0.summary.weight_alpha": False,
        "1.weight_alpha": True,
        "1.summary.weight_alpha": False,
    }
    TrainableConfig(alpha=False, last_blocks=1).apply(late)
    learns = {name for name, p in late.named_parameters() if p.requires_grad}
    assert learns
    assert not any("alpha" in name for name in learns)


def test_a_checkpoint_of_a_run_keeps_the_place(tiny_name: str, tmp_path: Path) -> None:
    module = AlphaClipModule(EncoderConfig(name=tiny_name, alpha_block=1), optim=OptimConfig())
    assert module.recipe()["alpha_block"] == {"block": 1, "repeat": True, "summary": True}
    assert "alpha_block" not in AlphaClipModule(EncoderConfig(name=tiny_name)).recipe()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    from alpha_clip.training_checkpoint import add_model

    add_model(checkpoint, module.model, module.recipe())
    torch.save(checkpoint, tmp_path / "run.ckpt")
    twin = alpha_clip.create_model(checkpoint=tmp_path / "run.ckpt")[0]
    assert alpha_entry(twin.visual) == AlphaEntry(1)


def test_regions_of_an_image_cost_less_together(tiny_name: str) -> None:
    late = alpha_clip.create_model(tiny_name, alpha_block=2)[0]
    first = alpha_clip.create_model(tiny_name)[0]
    one, many = flops_per_region(late), flops_per_region(late, 8)
    assert many < 0.75 * one
    assert flops_per_region(first, 8) == flops_per_region(first)


@torch.no_grad()
def test_evaluation_passes_an_image_once(late: AlphaClip) -> None:
    rgb, alphas = views(late, 2, 3)
    rgba = torch.cat([rgb.repeat_interleave(3, 0), alphas.flatten(0, 1)], 1)
    rows: list[int] = []
    block = late.visual.transformer.resblocks[0]  # type: ignore[union-attr,index]
    block.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    found = FOCUS["alpha"].encode(late, rgba)
    assert rows == [2]
    expected = late.encode_regions(rgb, alphas, normalize=True).flatten(0, 1)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_classify_and_text_work_as_ever(late: AlphaClip) -> None:
    image = Image.effect_noise((60, 50), 90).convert("RGB")
    regions = [Box(0, 0, 20, 20), Box(30, 20, 60, 50), None]
    probabilities = late.classify(image, regions, ["a cat", "a dog"])
    assert probabilities.shape == (3, 2)
    assert torch.allclose(probabilities.sum(1), torch.ones(3))
