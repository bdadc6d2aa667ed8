from pathlib import Path

import pytest
import torch

from alpha_clip.checkpoint_io import AtomicCheckpointIO


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = {"weights": torch.arange(4), "step": 3, "places": [[1, [2, 3]]]}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "new" / "a.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "new" / "a.ckpt")
    assert torch.equal(loaded.pop("weights"), content["weights"])
    assert loaded == {"step": 3, "places": [[1, [2, 3]]]}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.ckpt"]


def test_a_full_disk_keeps_the_old_one(tmp_path: Path, full_disk: None) -> None:
    writer, target = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    writer.save_checkpoint({"step": 1}, target)
    with pytest.raises(OSError, match=r"a.ckpt could not be written .*make room and start"):
        writer.save_checkpoint({"weights": torch.zeros(100_000)}, target)
    assert writer.load_checkpoint(target) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_write_that_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(content: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="PytorchStreamWriter failed"):
        AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Hostile()}, tmp_path / "a.ckpt")
    for asked in (None, False, True):
        with pytest.raises(ValueError, match=r"a.ckpt can't be read as a training checkpoint"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=asked)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html>"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="can't be read as a training checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="it holds a list"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
