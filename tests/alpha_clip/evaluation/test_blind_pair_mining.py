import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from alpha_clip.cli import main
from alpha_clip.drops import Drops
from alpha_clip.evaluation import blind_pair_mining, pair_search
from alpha_clip.evaluation.blind_pair_mining import BlindPairMining
from alpha_clip.evaluation.columns import join
from alpha_clip.evaluation.journal import fingerprint
from alpha_clip.evaluation.pair_search import disjoint, mine_pairs
from alpha_clip.evaluation.runner import run_benchmark
from alpha_clip.model import AlphaClip

OTHER = "test_vit"
CPU = torch.device("cpu")
Pair = tuple[int, int, float, float]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a tiny ViT, with its classifier, as timm publishes them."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("other") / "weights.safetensors"
    save_file(timm.create_model(OTHER).state_dict(), file)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures in two folders, and what is none or hidden."""
    root = tmp_path / "pictures"
    (root / "below").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for i, ending in enumerate(("jpg", "JPEG", "png", "webp") * 3):
        coarse = np.random.default_rng(i).integers(0, 255, (3, 4, 3), np.uint8)
        image = Image.fromarray(coarse).resize((40 + 10 * i, 90))
        image.save(root / ("below" if i % 2 else "") / f"{i:02d}.{ending}")
    for name in ("notes.txt", ".12.png", ".hidden/13.png"):
        (root / name).write_bytes((root / "02.png").read_bytes())
    return root


def pictures(folder: Path) -> list[Path]:
    """What there is to see, by name."""
    return sorted([*folder.glob("[01]*"), *folder.glob("below/[01]*")], key=str)


@pytest.fixture
def mining(folder: Path, weights: Path) -> Callable[..., BlindPairMining]:
    """Return what makes the benchmark, with thresholds that suit random weights."""

    def make(**more: Any) -> BlindPairMining:
        given: dict[str, Any] = {"clip_above": 0.5, "other_below": 0.5, "other": OTHER}
        given |= {"images": str(folder), "other_pretrained": str(weights), **more}
        return BlindPairMining(**given)

    return make


def by_hand(clip: Any, other: Any, clip_above: float, other_below: float) -> list[Pair]:
    """Every pair of rows, one after the other."""
    rows = range(len(clip))
    all_of_them = ((i, j, clip[i] @ clip[j], other[i] @ other[j]) for i in rows for j in rows)
    found = [p for p in all_of_them if p[0] < p[1] and p[2] > clip_above and p[3] < other_below]
    return sorted(found, key=lambda p: p[3] - p[2])


def random_features(rows: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    columns = {name: rng.normal(size=(rows, dim)) for name, dim in (("clip", 3), ("other", 5))}
    unit = {n: c / np.linalg.norm(c, axis=1, keepdims=True) for n, c in columns.items()}
    return {n: c.astype(np.float32) for n, c in unit.items()}


@pytest.mark.parametrize("similarities", [1, 50, 7**2, 1 << 24])
@pytest.mark.parametrize(
    ("above", "below"), [(0.6, 0.1), (-0.5, 0.9), (-1.0, 1.0), (0.999, -0.999)]
)
def test_pairs_equal_a_search_by_hand(
    monkeypatch: pytest.MonkeyPatch, similarities: int, above: float, below: float
) -> None:
    monkeypatch.setattr(pair_search, "_SIMILARITIES", similarities)
    columns = random_features(41)
    mined = mine_pairs(columns, above, below, CPU)
    expected = by_hand(columns["clip"], columns["other"], above, below)
    assert (len(expected) > 10) == (above < 0.9)
    found = mined.pairs.tolist()
    assert [p[:2] for p in found] == [p[:2] for p in expected]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert mined.number == len(expected)
    members = {i for pair in expected for i in pair[:2]}
    assert mined.paired.tolist() == [i in members for i in range(41)]


@pytest.mark.parametrize("most", [1, 7, 60])
def test_of_too_many_pairs_the_widest_are_kept_and_all_counted(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(pair_search, "_SIMILARITIES", 25)
    monkeypatch.setattr(pair_search, "_KEPT", most)
    columns = random_features(40, seed=2)
    mined = mine_pairs(columns, 0.0, 0.5, CPU)
    expected = by_hand(columns["clip"], columns["other"], 0.0, 0.5)
    assert len(expected) > 200
    assert [p[:2] for p in mined.pairs.tolist()] == [p[:2] for p in expected[:most]]
    assert mined.number == len(expected)
    assert mined.paired.sum() == len({i for pair in expected for i in pair[:2]})


def test_equal_pictures_are_no_pair() -> None:
    """What both models take for the same; of two alike ones, each makes a pair with a third."""
    one, two = np.eye(2, dtype=np.float32)
    columns = {"clip": np.stack([one] * 3), "other": np.stack([one, one, two])}
    mined = mine_pairs(columns, 0.95, 0.6, CPU)
    assert mined.pairs.tolist() == [(0, 2, 1, 0), (1, 2, 1, 0)]
    assert mined.paired.all()
    assert mine_pairs(columns, 1.0, 0.6, CPU).number == 0  # above, not at


def test_features_are_read_block_by_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pair_search, "_SIMILARITIES", 16)
    held = {**random_features(30), "picture": np.arange(30)}
    mapped = join([held], tmp_path)
    assert isinstance(mapped["clip"], np.memmap)
    longest = []
    monkeypatch.setattr(
        pair_search,
        "_tensor",
        lambda part, device: longest.append(len(part)) or torch.from_numpy(np.array(part)),
    )
    found = mine_pairs(mapped, 0.2, 0.5, CPU)
    assert max(longest) == 4
    assert found.pairs.tolist() == mine_pairs(held, 0.2, 0.5, CPU).pairs.tolist() != []


def test_pairs_are_searched_once_for_the_same_columns(
    mining: Callable[..., BlindPairMining], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        blind_pair_mining, "mine_pairs", lambda *a: calls.append(a) or mine_pairs(*a)
    )
    benchmark = mining()
    for rows in (30, 20):
        files = np.array([f"{i}.jpg" for i in range(rows)])  # none is there to be drawn
        columns = {**random_features(rows), "picture": np.arange(rows), "file": files}
        expected = by_hand(columns["clip"], columns["other"], 0.5, 0.5)
        assert benchmark.counts(columns) == {"pictures": rows, "pairs": len(expected)}
        assert len(benchmark.outcomes(columns)["pictures/in a pair"].values) == rows
        benchmark.write(columns, tmp_path / "name.json")
        assert len(read_pairs(tmp_path / "name.pairs.csv")) == len(expected)
    assert [len(call[0]["picture"]) for call in calls] == [30, 20]


def test_no_picture_is_shown_twice() -> None:
    pairs = [(0, 1, 1.0, 0.0), (1, 2, 1.0, 0.1), (0, 3, 1.0, 0.2), (3, 2, 1.0, 0.3), (5, 4, 1, 0.4)]
    assert list(disjoint(pairs, 9)) == [pairs[0], pairs[3], pairs[4]]
    assert list(disjoint(pairs, 2)) == [pairs[0], pairs[3]]
    assert list(disjoint(pairs, 0)) == []


@torch.no_grad()
def features(model: AlphaClip, weights: Path, files: list[Path]) -> tuple[Any, Any]:
    """One picture at a time, as either model's own library would do it."""
    other = timm.create_model(OTHER, checkpoint_path=str(weights)).eval()
    other.reset_classifier(0)
    config = timm.data.resolve_model_data_config(other)
    transform = timm.data.create_transform(**config)
    images = [Image.open(file).convert("RGB") for file in files]
    clip = torch.cat([model.encode_image(model.transform(im)[None, :3]) for im in images])
    theirs = torch.cat([other(transform(im)[None]) for im in images])
    return tuple((f / f.norm(dim=-1, keepdim=True)).numpy() for f in (clip, theirs))


def typed(folder: Path, weights: Path, output: Path, tiny_name: str, *more: str) -> list[str]:
    given = {
        "images": folder,
        "clip_above": 0.5,
        "other_below": 0.5,
        "other": OTHER,
        "other_pretrained": weights,
        "batch_size": 5,
    }
    name = "alpha_clip.evaluation.blind_pair_mining.BlindPairMining"
    arguments = [f"--benchmark.{key}={value}" for key, value in given.items()]
    arguments = ["--checkpoint=null", f"--name={tiny_name}", f"--benchmark={name}", *arguments]
    return ["eval", *arguments, f"--output={output}", *more]


def read_pairs(file: Path) -> list[tuple[str, str, float, float]]:
    with file.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["first", "second", "clip", "other"]
    return [(first, second, float(clip), float(other)) for first, second, clip, other in rows]


def test_the_command_mines_a_folder(
    folder: Path, weights: Path, tmp_path: Path, tiny_name: str
) -> None:
    (folder / "03.jpg").write_bytes(b"no picture")
    output = tmp_path / "mined.json"
    torch.manual_seed(0)
    assert main(typed(folder, weights, output, tiny_name, "--max_dropped=0.1")) == 0

    files = [file for file in pictures(folder) if file.name != "03.jpg"]
    names = [file.relative_to(folder).as_posix() for file in files]
    assert len(names) == 12
    torch.manual_seed(0)
    clip, other = features(create_tiny(tiny_name), weights, files)
    expected = by_hand(clip, other, 0.5, 0.5)
    assert 3 < len(expected) < 60
    found = read_pairs(tmp_path / "mined.pairs.csv")
    assert {p[:2] for p in found} == {(names[i], names[j]) for i, j, *_ in expected}
    np.testing.assert_allclose([p[2:] for p in found], [p[2:] for p in expected], atol=1e-4)

    record = json.loads(output.read_text())
    share = len({i for pair in expected for i in pair[:2]}) / 12
    scores = {"pictures": 12, "pairs": len(expected), "pictures/in a pair": share}
    assert record["scores"] == pytest.approx(scores)
    assert record["dropped"] == {"corrupt_image": 1}
    assert "03.jpg" in (tmp_path / "mined.dropped.csv").read_text()
    with Image.open(tmp_path / "mined.pairs.png") as sheet:
        assert sheet.width > 2 * 200
    assert (tmp_path / "mined.csv").exists()
    assert (tmp_path / "mined.png").exists()


def create_tiny(name: str) -> AlphaClip:
    import alpha_clip

    return alpha_clip.create_model(name)[0]


def test_without_a_pair_there_is_no_sheet(
    mining: Callable[..., BlindPairMining], model: AlphaClip, tmp_path: Path
) -> None:
    for above, there in ((0.5, True), (1.0, False)):
        benchmark = mining(clip_above=above)
        columns, _ = run_benchmark(benchmark, lambda _: model, tmp_path / "parts", ["cpu"])
        assert bool(benchmark.outcomes(columns)["pictures/in a pair"].mean()) == there
        benchmark.write(columns, tmp_path / "name.json")
        assert (tmp_path / "name.pairs.png").exists() == there
        assert bool(read_pairs(tmp_path / "name.pairs.csv")) == there


def test_the_sheet_shows_each_picture_once(
    mining: Callable[..., BlindPairMining],
    model: AlphaClip,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = folder / f"{'long ' * 30}name.png"
    (folder / "02.png").rename(long)
    sheets = []
    drawn = blind_pair_mining.contact_sheet
    monkeypatch.setattr(
        blind_pair_mining, "contact_sheet", lambda *a: sheets.append(a[0]) or drawn(*a)
    )
    benchmark = mining(clip_above=-1, other_below=1, shown=4)
    columns, _ = run_benchmark(benchmark, lambda _: model, tmp_path / "parts", ["cpu"])
    benchmark.write(columns, tmp_path / "name.json")
    first = read_pairs(tmp_path / "name.pairs.csv")[0]
    (tiles,) = sheets
    assert len(tiles) == 8
    assert tiles[0].text.endswith(f"CLIP {first[2]:.3f}")
    assert tiles[1].text.endswith(f"other {first[3]:.3f}")
    shown = [tile.text.split()[0] for tile in tiles]
    assert len(set(shown)) == 8
    # What is gone since is left out.
    for name in columns["file"]:
        if name != first[0]:
            (folder / name).unlink()
    benchmark.write(columns, tmp_path / "name.json")
    assert not (tmp_path / "name.pairs.png").exists()
    assert len(read_pairs(tmp_path / "name.pairs.csv")) == 66


def test_a_long_name_keeps_its_end() -> None:
    image = Image.new("RGB", (30, 90), "red")
    tile = blind_pair_mining._tile("a b/" + 50 * "c" + " 7.jpg", image, "CLIP 0.951", "#ffffff")
    name, _, similarity = tile.text.partition(" ")
    assert name.startswith("…")
    assert name.endswith("c_7.jpg")
    assert similarity == "CLIP 0.951"
    pixels = np.asarray(tile.image)
    assert tile.image.size == (200, 200)
    rows, columns = ((pixels == (255, 0, 0)).all(2).any(axis).sum() for axis in (1, 0))
    assert rows / columns == pytest.approx(3, rel=0.05)  # its proportions


def test_an_edited_picture_or_weights_are_scored_again(
    mining: Callable[..., BlindPairMining],
    model: AlphaClip,
    folder: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blind_pair_mining, "_PART", 5)
    before = mining()
    assert list(before.parts().values()) == [5, 5, 2]
    assert before.parts() == mining().parts()
    file = folder / "00.jpg"
    os.utime(file, ns=(0, 1))
    after = mining()
    assert [a == b for a, b in zip(before.parts(), after.parts(), strict=True)].count(False) == 1
    assert fingerprint(before, [model]) != fingerprint(after, [model])
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    first = mining(other_pretrained=str(copy)).parts()
    os.utime(copy, ns=(0, 1))
    assert not first.keys() & mining(other_pretrained=str(copy)).parts().keys()


def test_max_images_takes_the_first(mining: Callable[..., BlindPairMining]) -> None:
    assert mining(max_images=3).parts() == {next(iter(mining(max_images=3).parts())): 3}
    assert sum(mining().parts().values()) == 12


def test_geometry_is_used(mining: Callable[..., BlindPairMining], model: AlphaClip) -> None:
    found = []
    for geometry in ("center_crop", "pad"):
        benchmark = mining(geometry=geometry)
        benchmark.prepare(model)
        (part,) = benchmark.parts()
        found.append(benchmark.score(model, part, Drops(), lambda _: None))
    assert (found[0]["other"] == found[1]["other"]).all()
    assert (found[0]["clip"] != found[1]["clip"]).any(1).sum() == 11  # one of them is square


def test_two_pictures_are_needed(
    mining: Callable[..., BlindPairMining], model: AlphaClip, folder: Path
) -> None:
    with pytest.raises(ValueError, match="takes two pictures, 1 of"):
        mining(max_images=1).run(model)
    for file in pictures(folder):
        file.write_bytes(b"")
    benchmark, drops, seen = mining(), Drops(), []
    benchmark.prepare(model)
    (part,) = benchmark.parts()
    assert benchmark.score(model, part, drops, seen.append) == {}
    assert drops.counts() == {"corrupt_image": 12}
    assert sum(seen) == 12
    with pytest.raises(ValueError, match="takes two pictures, 0 of"):
        benchmark.run(model)


def test_features_that_are_not_finite_are_refused(
    mining: Callable[..., BlindPairMining], model: AlphaClip, tmp_path: Path
) -> None:
    state = timm.create_model(OTHER).state_dict()
    state["cls_token"] = torch.full_like(state["cls_token"], torch.nan)
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="test_vit gives features that are not finite"):
        mining(other_pretrained=str(tmp_path / "nan.pth")).run(model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clip_above": 1.01}, r"lie in -1\.\.1, got clip_above=1.01 and other_below=0.5"),
        ({"other_below": -2}, "other_below=-2"),
        ({"other_below": float("nan")}, "other_below=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_images": 0}, "max_images=0"),
        ({"shown": -1}, "shown=-1"),
        ({"other": "no_such_vit"}, "timm has no model 'no_such_vit'"),
        ({"other_pretrained": "missing.pth"}, r"there is no file missing\.pth"),
        ({"images": "missing"}, "missing has no picture; expected some .jpg, jpeg, png, webp."),
    ],
)
def test_bad_settings_are_refused(
    mining: Callable[..., BlindPairMining], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mining(**given)


def test_a_folder_without_pictures_is_refused(
    mining: Callable[..., BlindPairMining], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    (empty / ".git").mkdir(parents=True)
    (empty / "folder.jpg").mkdir()
    Image.new("RGB", (9, 9)).save(empty / ".git" / "1.png")
    with pytest.raises(ValueError, match="empty has no picture"):
        mining(images=str(empty))


def saved(file: Path, content: Any) -> str:
    torch.save(content, file)
    return str(file)


@pytest.mark.parametrize("trained", ["alone", "with its classifier", "wrapped"])
def test_weights_are_read_from_torch_files(
    mining: Callable[..., BlindPairMining],
    model: AlphaClip,
    weights: Path,
    tmp_path: Path,
    trained: str,
) -> None:
    classes = 7 if trained == "with its classifier" else 0
    source = timm.create_model(OTHER, num_classes=classes).eval()
    state = {"state_dict": source.state_dict()} if trained == "wrapped" else source.state_dict()
    benchmark = mining(other_pretrained=saved(tmp_path / "w.pth", state))
    benchmark.prepare(model)
    pixels = torch.rand(2, 3, 160, 160)
    source.reset_classifier(0)
    assert torch.equal(benchmark._tower(pixels), source(pixels))
    assert not any(p.requires_grad for p in benchmark._tower.parameters())
    assert not benchmark._tower.training


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_weights_that_do_not_fit_are_refused(
    mining: Callable[..., BlindPairMining],
    model: AlphaClip,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched: list[Any] = []
    monkeypatch.setattr(
        timm.models._builder, "load_state_dict_from_hf", lambda *a, **k: fetched.append(a) or {}
    )
    file = tmp_path / "w.pth"
    sound = timm.create_model(OTHER, num_classes=0).state_dict()
    missing = {key: value for key, value in sound.items() if key != "norm.weight"}
    for content in (
        timm.create_model("test_vit3", num_classes=0).state_dict(),
        missing,
        {**sound, "more": torch.zeros(1)},
        {},
        [torch.zeros(3)],
        {**sound, "norm.weight": Evil(tmp_path / "evil")},
    ):
        benchmark = mining(other_pretrained=saved(file, content))
        with pytest.raises(ValueError, match=r"w\.pth gives no weights of timm's test_vit \(.+\)"):
            benchmark.prepare(model)
    assert not (tmp_path / "evil").exists()
    assert not fetched
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(b"{} no weights")
        with pytest.raises(ValueError, match="gives no weights of timm's test_vit"):
            mining(other_pretrained=str(tmp_path / name)).prepare(model)


def test_weights_that_can_not_be_fetched_ask_for_a_file(
    mining: Callable[..., BlindPairMining], model: AlphaClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no network")

    benchmark = mining(other_pretrained=None)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", fail)
    with pytest.raises(ValueError, match=r"the network gives no .*no network.*other_pretrained"):
        benchmark.prepare(model)
    with pytest.raises(ValueError, match="No pretrained weights exist for test_vit4"):
        mining(other="test_vit4", other_pretrained=None).prepare(model)
