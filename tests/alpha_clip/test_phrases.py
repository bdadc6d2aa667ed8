from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alpha_clip.batches import phrase_ids
from alpha_clip.cli import main
from alpha_clip.data import RegionDataModule
from alpha_clip.model import AlphaClip
from alpha_clip.phrases import PhraseFeatures, text_tower, write_phrase_features

ALL = ["red thing", "green thing", "blue thing"]


@pytest.fixture
def folder(model: AlphaClip, two_shards: Path, tmp_path: Path) -> Path:
    write_phrase_features(model, [str(two_shards)], str(tmp_path / "text"), batch_size=2)
    return tmp_path / "text"


def test_every_phrase_and_caption_is_there_once(model: AlphaClip, folder: Path) -> None:
    texts = [*ALL, "red thing beside blue thing", "green thing beside red thing"]
    tokens = model.tokenizer(texts)
    found = PhraseFeatures(str(folder))(phrase_ids(tokens))
    expected = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # kept as fp16
    assert found.dtype == torch.float32
    assert len(np.load(folder / "ids.npy")) == 6  # three phrases, three captions


def test_a_phrase_that_is_not_there_stops(model: AlphaClip, folder: Path) -> None:
    ids = phrase_ids(model.tokenizer(["red thing", "a unicorn", "a griffin"]))
    with pytest.raises(ValueError, match="2 of 3 phrases of a batch are not in"):
        PhraseFeatures(str(folder))(ids)


def test_another_text_tower_is_refused(model: AlphaClip, folder: Path, tiny_name: str) -> None:
    import alpha_clip

    features = PhraseFeatures(str(folder))
    features.check(model)
    other, _, _ = alpha_clip.create_model(tiny_name)
    other.load_state_dict(model.state_dict())
    other.visual.conv1.weight.data.add_(1)  # the image tower and the temperature do not matter
    other.logit_scale.data.add_(1)
    features.check(other)
    other.clip.text_projection.data.add_(1)
    assert text_tower(other) != text_tower(model)
    with pytest.raises(ValueError, match="made by another text tower"):
        features.check(other)


def test_a_folder_that_is_there_is_not_written_over(
    model: AlphaClip, two_shards: Path, folder: Path
) -> None:
    with pytest.raises(ValueError, match="is there already"):
        write_phrase_features(model, [str(two_shards)], str(folder))


def _lost(folder: Path) -> None:
    (folder / "ids.npy").unlink()


def _cut(folder: Path) -> None:
    np.save(folder / "ids.npy", np.load(folder / "ids.npy")[:-1])


def _pickled(folder: Path) -> None:
    np.save(folder / "features.npy", np.array([object()], dtype=object))


def _no_json(folder: Path) -> None:
    (folder / "phrases.json").write_text("[")


@pytest.mark.parametrize("damage", [_lost, _cut, _pickled, _no_json])
def test_a_damaged_folder_is_refused(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=f"{folder}"):
        PhraseFeatures(str(folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_bring_the_features(
    model: AlphaClip, two_shards: Path, folder: Path, workers: int
) -> None:
    from tests.alpha_clip.test_data import attach

    data = RegionDataModule(
        [str(two_shards)], batch_size=4, shuffle=3, workers=workers, phrases=str(folder)
    )
    attach(data, model)
    data.setup("fit")
    batch: Any = next(iter(data.train_dataloader()))
    expected = model.encode_text(batch.tokens, normalize=True)
    torch.testing.assert_close(batch.text, expected, rtol=0, atol=1e-3)


def test_a_text_tower_that_trains_is_refused(
    tiny_name: str, two_shards: Path, folder: Path
) -> None:
    import alpha_clip
    from alpha_clip.trainable import TrainableConfig
    from tests.alpha_clip.test_data import attach

    other, _, _ = alpha_clip.create_model(tiny_name)
    TrainableConfig(text=True).apply(other)
    data = RegionDataModule([str(two_shards)], batch_size=4, workers=0, phrases=str(folder))
    attach(data, other)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"frozen text tower, but trainable\.text is on"):
        data.train_dataloader()


def test_the_command_writes_them(
    model: AlphaClip, two_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import alpha_clip

    checkpoint = alpha_clip.save_checkpoint(model, tmp_path / "model")
    output = str(tmp_path / "text")
    arguments = ["--checkpoint", str(checkpoint), "--data", f"[{two_shards}]", "--output", output]
    assert main(["phrases", *arguments]) == 0
    assert f"{output}: 6 phrases" in capsys.readouterr().out
    PhraseFeatures(output).check(model)
