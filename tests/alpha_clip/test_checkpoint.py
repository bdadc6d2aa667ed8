import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import alpha_clip
from alpha_clip.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_weights, read_config, read_weights
from alpha_clip.model import AlphaClip
from alpha_clip.transforms import Normalisation


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, model: AlphaClip) -> Path:
    """A checkpoint. Read only."""
    return alpha_clip.save_checkpoint(model, tmp_path_factory.mktemp("checkpoint") / "a" / "b")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_round_trip_is_exact(saved: Path, model: AlphaClip) -> None:
    loaded = alpha_clip.load_checkpoint(saved)
    own, state = model.state_dict(), loaded.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[k], state[k]) for k in own)
    assert (loaded.name, loaded.config) == (model.name, model.config)
    assert loaded.normalisation == model.normalisation
    assert not loaded.training
    rgba = torch.randn(2, 4, model.image_size, model.image_size)
    loaded.requires_grad_(False)  # as the model is: torch picks its kernels by that
    assert torch.equal(loaded.encode_image(rgba), model.encode_image(rgba))


def test_folder_holds_two_files_and_nothing_pickled(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == sorted([CONFIG_FILE, WEIGHTS_FILE])
    assert load_file(saved / WEIGHTS_FILE).keys() >= {"logit_scale", "visual.conv1.weight_alpha"}


def test_config_has_open_clips_schema_and_ours(saved: Path, model: AlphaClip) -> None:
    record = json.loads((saved / CONFIG_FILE).read_text())
    assert set(record) == {"model_cfg", "preprocess_cfg", "alpha_clip"}
    assert record["model_cfg"] == model.config
    assert record["preprocess_cfg"]["size"] == model.image_size
    assert record["alpha_clip"]["alpha_mean"] == 0.5
    assert record["alpha_clip"]["alpha_std"] == 0.26


def test_open_clip_reads_the_config_itself(saved: Path, model: AlphaClip) -> None:
    import open_clip

    assert open_clip.get_model_config(f"local-dir:{saved}") == model.config


def test_its_own_normalisation_is_kept(tmp_path: Path, model: AlphaClip) -> None:
    own = Normalisation((0.5, 0.4, 0.3), (0.2, 0.1, 0.3), alpha_mean=0.1, alpha_std=0.9)
    changed = AlphaClip(
        model.clip, "another-name", model.config, model.transform.replace(normalisation=own)
    )
    alpha_clip.save_checkpoint(changed, tmp_path)
    loaded, transform, _ = alpha_clip.create_model(checkpoint=tmp_path)
    assert loaded.normalisation == transform.normalisation == own
    assert loaded.name == "another-name"


def test_how_its_pictures_are_prepared_is_kept(tmp_path: Path, model: AlphaClip) -> None:
    transform = model.transform.replace(geometry="crop_box", scale=2.0, interpolation="bilinear")
    changed = AlphaClip(model.clip, model.name, model.config, transform, base="laion2b")
    alpha_clip.save_checkpoint(changed, tmp_path)
    loaded = alpha_clip.load_checkpoint(tmp_path)
    assert repr(loaded.transform) == repr(transform)
    assert loaded.base == "laion2b"
    assert alpha_clip.create_model(checkpoint=tmp_path, geometry="pad")[1].geometry == "pad"


def test_a_folder_of_the_first_days_is_read(copied: Path, model: AlphaClip) -> None:
    """Geometry, interpolation and base were not written then."""
    file = copied / CONFIG_FILE
    record = json.loads(file.read_text())
    for key in ("interpolation", "resize_mode"):
        del record["preprocess_cfg"][key]
    for key in ("geometry", "scale", "base"):
        del record["alpha_clip"][key]
    file.write_text(json.dumps(record))
    loaded = alpha_clip.load_checkpoint(copied)
    assert loaded.transform.geometry == "center_crop"
    assert loaded.base is None


def test_saving_again_replaces_it(copied: Path, model: AlphaClip) -> None:
    (copied / WEIGHTS_FILE).write_bytes(b"old")
    alpha_clip.save_checkpoint(model, copied)
    assert alpha_clip.load_checkpoint(copied).name == model.name


def test_the_name_may_be_said_and_must_fit(saved: Path, tiny_name: str) -> None:
    assert alpha_clip.create_model(tiny_name, checkpoint=saved)[0].name == "tiny"
    with pytest.raises(ValueError, match="holds a tiny, not a ViT-B-32; leave the name out"):
        alpha_clip.create_model("ViT-B-32", checkpoint=saved)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="written by save_checkpoint, but it has no"):
            alpha_clip.load_checkpoint(folder)


def test_a_config_of_open_clips_own_is_refused(tiny_name: str) -> None:
    with pytest.raises(ValueError, match="not the config of an alpha_clip checkpoint: KeyError"):
        read_config(tiny_name.removeprefix("local-dir:"))


def ours(**change: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda record: {**record, "alpha_clip": {**record["alpha_clip"], **change}}


def preprocess(**change: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda record: {**record, "preprocess_cfg": {**record["preprocess_cfg"], **change}}


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda record: [record],
    "null": lambda record: None,
    "our key is null": lambda record: {**record, "alpha_clip": None},
    "no model": lambda record: {k: v for k, v in record.items() if k != "model_cfg"},
    "model as text": lambda record: {**record, "model_cfg": "ViT"},
    "newer format": ours(format=2),
    "alpha_std as text": ours(alpha_std="wide"),
    "mean null": preprocess(mean=None),
    "std of words": preprocess(std=["a", "b", "c"]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_configs_are_refused(copied: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    file = copied / CONFIG_FILE
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match="is not the config of an alpha_clip checkpoint"):
        alpha_clip.load_checkpoint(copied)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xff"], ids=["empty", "cut", "not UTF-8"])
def test_a_config_that_is_no_json_is_refused(copied: Path, data: bytes) -> None:
    (copied / CONFIG_FILE).write_bytes(data)
    with pytest.raises(ValueError, match="is not the config of an alpha_clip checkpoint"):
        read_config(copied)


def test_a_newer_format_says_so(copied: Path) -> None:
    file = copied / CONFIG_FILE
    file.write_text(json.dumps(ours(format=2)(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match="format 2; this version reads format 1"):
        read_config(copied)


def test_missing_weights_are_refused(copied: Path) -> None:
    (copied / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors; was it saved to the end"):
        alpha_clip.load_checkpoint(copied)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_damaged_weights_are_refused(copied: Path, keep: int) -> None:
    file = copied / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is damaged"):
        read_weights(copied)


def test_a_pickle_is_refused(copied: Path) -> None:
    torch.save({"visual.conv1.weight": torch.zeros(1)}, copied / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="is damaged"):
        alpha_clip.load_checkpoint(copied)


def test_weights_of_another_model_are_refused(copied: Path) -> None:
    file = copied / WEIGHTS_FILE
    state = load_file(file)
    state["surprise"] = state.pop("visual.conv1.weight")
    state["logit_scale"] = torch.zeros(2)
    save_file(state, file)
    with pytest.raises(ValueError, match="do not fit") as caught:
        alpha_clip.load_checkpoint(copied)
    message = str(caught.value)
    assert str(copied) in message
    assert "1 missing: visual.conv1.weight" in message
    assert "1 unexpected: surprise" in message
    assert "1 of another shape: logit_scale [2] instead of []" in message


def test_long_lists_of_keys_are_cut_short() -> None:
    module = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(ValueError, match=r"8 missing: .* and 3 more"):
        load_weights(module, {}, "nothing")


def test_nothing_is_loaded_when_something_does_not_fit() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match="1 missing: bias"):
        load_weights(module, {"weight": torch.zeros(2, 2)}, "half of it")
    assert torch.equal(module.weight, before)
    load_weights(module, {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, "all of it")
    assert torch.equal(module.weight, torch.ones(2, 2))


def test_a_failed_save_leaves_the_old_checkpoint(
    copied: Path, model: AlphaClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(state: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("alpha_clip.checkpoint.save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        alpha_clip.save_checkpoint(model, copied)
    assert alpha_clip.load_checkpoint(copied).name == model.name


def test_a_full_disk_keeps_the_checkpoint_that_is_there(
    copied: Path, model: AlphaClip, full_disk: None
) -> None:
    before = {file.name: file.read_bytes() for file in copied.iterdir()}
    with pytest.raises(OSError, match=r"copy could not be written .*: make room"):
        alpha_clip.save_checkpoint(model, copied)
    assert {file.name: file.read_bytes() for file in copied.iterdir()} == before
