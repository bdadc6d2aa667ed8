import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import alpha_clip
from alpha_clip.embedding import sources, views
from alpha_clip.embedding.embed import embed
from alpha_clip.embedding.store import EmbeddingStore, load_embeddings
from alpha_clip.evaluation.focus_baselines import FOCUS
from alpha_clip.late_alpha import LateAlpha
from alpha_clip.model import AlphaClip
from alpha_clip.regions import Box, RegionSample, decode_jpeg, decode_rle
from alpha_clip.surgery import alpha_parameters

POLYGON = [[10.0, 10.0, 40.0, 10.0, 40.0, 30.0, 10.0, 30.0]]
PAIRS = [("red", "blue"), ("green", "red"), ("blue", "green")]


@pytest.fixture(scope="module")
def checkpoint(model: AlphaClip, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(alpha_clip.save_checkpoint(model, tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def samples(make_sample: Callable[..., RegionSample]) -> list[RegionSample]:
    return [make_sample(str(i), PAIRS[i % 3], width=40 + i) for i in range(7)]


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory,
    samples: list[RegionSample],
    write_shards: Callable[..., Any],
) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, samples[:3], samples[3:5], samples[5:])
    return str(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of noise at two depths, one hidden, and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "deep" / "er").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.JPG", "deep/c.webp", "deep/er/d.jpeg", "é.png"]):
        pixels = np.random.default_rng(i).integers(0, 255, (60, 80 + i, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    Image.new("RGB", (8, 8)).save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def coco(tmp_path: Path, pictures: Path) -> dict[str, Any]:
    """A polygon, an RLE of nothing, a box and a crowd, in two pictures."""
    size = {"width": 80, "height": 60}
    objects = [
        {"image_id": 3, "category_id": 1, "segmentation": POLYGON, "bbox": [10, 10, 30, 20]},
        {"image_id": 3, "category_id": 2, "bbox": [0.5, 0, 30.25, 30]},
        {"image_id": 4, "category_id": 2, "segmentation": POLYGON},
        {"image_id": 4, "category_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 1},
    ]
    return {
        "images": [
            {"id": 3, "file_name": "a.png", **size},
            {"id": 4, "file_name": "deep/c.webp", "width": 82, "height": 60},
        ],
        "annotations": [{"id": 70 + i, **o} for i, o in enumerate(objects)],
        "categories": [{"id": 1, "name": "red cup"}, {"id": 2, "name": "dog"}],
    }


def save(record: object, folder: Path) -> str:
    (folder / "instances.json").write_text(json.dumps(record))
    return str(folder / "instances.json")


@torch.no_grad()
def by_hand(model: AlphaClip, shown: list[tuple[Image.Image, Any]], **changes: Any) -> Any:
    transform = model.transform.replace(**changes)
    rgba = torch.stack([transform(image.convert("RGB"), region) for image, region in shown])
    return model.encode_image(rgba, normalize=True).numpy()


def regions_of(samples: list[RegionSample]) -> list[tuple[Image.Image, Any]]:
    return [(decode_jpeg(s.jpeg), decode_rle(r.rle)) for s in samples for r in s.regions]


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*")) if f.is_file()}


@pytest.mark.parametrize("format", ["parquet", "npy"])
@pytest.mark.parametrize("batch_size", [64, 3])
def test_regions_of_shards(
    model: AlphaClip,
    checkpoint: str,
    shards: str,
    samples: list[RegionSample],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    format: Any,
    batch_size: int,
) -> None:
    out = tmp_path / "out"
    embed(checkpoint, str(out), [shards], format=format, batch_size=batch_size)
    features, rows = load_embeddings(out)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, by_hand(model, regions_of(samples)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    expected = [
        {"id": f"{s.key}/{r.rid}", "image": s.key, "box": list(r.box), "text": r.text}
        for s in samples
        for r in s.regions
    ]
    assert rows == expected
    record = json.loads((out / "embeddings.json").read_text())
    assert (record["model"], record["dim"], record["rows"]) == (model.name, features.shape[1], 14)
    assert (record["normalised"], record["focus"], record["geometry"]) == (
        True,
        "alpha",
        model.transform.geometry,
    )
    assert [part["rows"] for part in record["parts"]] == [6, 4, 4]
    assert record["dropped"] == {}
    assert capsys.readouterr().out == f"{out}: 14 embeddings of {features.shape[1]} numbers\n"
    visible = {f.name for f in out.iterdir() if not f.name.startswith(".")}
    assert len(visible) == (4 if format == "parquet" else 7)


def test_parquet_is_readable_by_others(checkpoint: str, shards: str, tmp_path: Path) -> None:
    embed(checkpoint, str(tmp_path), [shards], max_images=3)
    (file,) = tmp_path.glob("part-*.parquet")
    table = pq.read_table(file)
    record = json.loads((tmp_path / "embeddings.json").read_text())
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), record["dim"])
    assert table.schema.names == ["id", "image", "box", "text", "embedding"]
    about = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    assert about["alpha_clip.model"] == record["model"]
    assert about["alpha_clip.fingerprint"] == record["fingerprint"]
    assert all(len(box) == 4 for box in table.column("box").to_pylist())
    assert len(table) == 6


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_half_precision(
    model: AlphaClip,
    checkpoint: str,
    shards: str,
    samples: list[RegionSample],
    tmp_path: Path,
    format: Any,
) -> None:
    embed(checkpoint, str(tmp_path), [shards], format=format, dtype="float16", max_images=5)
    features, rows = load_embeddings(tmp_path)
    assert features.dtype == np.float16
    assert len(rows) == 10
    np.testing.assert_allclose(features, by_hand(model, regions_of(samples[:5])), atol=1e-3)


def test_pictures_of_a_folder(
    model: AlphaClip, checkpoint: str, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    embed(checkpoint, str(out), images=str(pictures), format="npy", geometry="pad")
    features, rows = load_embeddings(out)
    assert isinstance(features, np.memmap)
    names = ["a.png", "b.JPG", "deep/c.webp", "deep/er/d.jpeg", "é.png"]
    assert [row["id"] for row in rows] == [row["image"] for row in rows] == names
    assert [row["box"] for row in rows] == [[0, 0, 80 + i, 60] for i in range(5)]
    shown = [(Image.open(pictures / name), None) for name in names]
    expected = by_hand(model, shown, geometry="pad")
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert json.loads((out / "embeddings.json").read_text())["focus"] is None


@pytest.mark.parametrize("focus", ["alpha", "crop", "no alpha", "red circle"])
def test_objects_of_coco(
    model: AlphaClip,
    checkpoint: str,
    pictures: Path,
    coco: dict[str, Any],
    tmp_path: Path,
    focus: str,
) -> None:
    file, out = save(coco, tmp_path), tmp_path / "out"
    embed(checkpoint, str(out), images=str(pictures), annotations=file, focus=focus)
    features, rows = load_embeddings(out)
    # The mask of the third spans pixels 10..39 x 10..29.
    boxes = [Box(10, 10, 40, 30), Box(0.5, 0, 30.75, 30), Box(10, 10, 40, 30)]
    images = ["a.png", "a.png", "deep/c.webp"]
    texts = ["red cup", "dog", "dog"]
    assert rows == [
        {"id": str(70 + i), "image": images[i], "box": [b.x1, b.y1, b.x2, b.y2], "text": texts[i]}
        for i, b in enumerate(boxes)
    ]
    shown = []
    for i, box in enumerate(boxes):
        image = Image.open(pictures / images[i]).convert("RGB")
        region = box if i == 1 else POLYGON
        mask = alpha_clip.region_to_alpha(region, 60, image.width) > 0
        shown.append(FOCUS[focus].show(image, mask, box))
    np.testing.assert_allclose(features, by_hand(model, shown), atol=1e-5)


def test_texts_come_from_another_file(
    checkpoint: str, pictures: Path, coco: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "names.json").write_text('["tasse", "Hund"]')
    embed(
        checkpoint,
        str(tmp_path / "out"),
        images=str(pictures),
        annotations=save(coco, tmp_path),
        texts=str(tmp_path / "names.json"),
    )
    assert [r["text"] for r in load_embeddings(tmp_path / "out")[1]] == ["tasse", "Hund", "Hund"]


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_what_was_stopped_goes_on(
    checkpoint: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    embed(checkpoint, str(straight), [shards], format=format)
    write = EmbeddingStore.write
    done: list[str] = []

    def killed(self: Any, name: str, *rest: Any) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(name)
        write(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingStore, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            embed(checkpoint, str(stopped), [shards], format=format)
    with pytest.raises(ValueError, match=r"no embeddings\.json, which is written last; run the"):
        load_embeddings(stopped)
    (stopped / ".part-00001-0.parquet.99.tmp").write_bytes(b"half")  # of a kill

    def noted(self: Any, name: str, *rest: Any) -> None:
        done.append(name)
        write(self, name, *rest)

    monkeypatch.setattr(EmbeddingStore, "write", noted)
    embed(checkpoint, str(stopped), [shards], format=format)
    assert [name.split("-")[0] for name in done] == ["00000", "00001", "00002"]
    assert files_of(stopped) == files_of(straight)
    done.clear()
    embed(checkpoint, str(stopped), [shards], format=format, batch_size=3)
    assert done == []
    gone = sorted(stopped.glob("part-*"))[-1]
    gone.unlink()
    with pytest.raises(ValueError, match=r"is missing or damaged; delete it and run again"):
        load_embeddings(stopped)
    embed(checkpoint, str(stopped), [shards], format=format)
    assert len(done) == 1
    assert files_of(stopped) == files_of(straight)


def test_nothing_half_written_is_visible(
    checkpoint: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, stream: Any, features: Any, rows: Any) -> None:
        stream.write(b"PAR1 and then")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EmbeddingStore, "_write_parquet", broken)
    with pytest.raises(OSError, match="No space left"):
        embed(checkpoint, str(tmp_path / "out"), [shards])
    assert [f.name for f in (tmp_path / "out").iterdir()] == [".parts"]


def test_other_embeddings_are_refused(
    checkpoint: str, shards: str, model: AlphaClip, tiny_name: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    embed(checkpoint, out, [shards], max_images=4)
    with pytest.raises(ValueError, match=r"with weights '\w+', not '\w+': give another folder"):
        embed(None, out, [shards], name=tiny_name, geometry=model.transform.geometry, max_images=4)
    with pytest.raises(ValueError, match=r"focus 'alpha', not 'crop'; dtype 'float32', not 'fl"):
        embed(checkpoint, out, [shards], focus="crop", dtype="float16", max_images=4)
    with pytest.raises(ValueError, match=r"of other data, such as part-00001-.*max_images changed"):
        embed(checkpoint, out, [shards])
    assert len(load_embeddings(out)[1]) == 8
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"dear")
    with pytest.raises(ValueError, match="holds no embeddings; give an empty folder"):
        embed(checkpoint, str(tmp_path / "photos"), [shards])


def test_damaged_pictures_are_counted(
    checkpoint: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "bad.png").write_bytes(b"no picture at all")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"1 pictures or regions, of 6 pictures.*bad\.png"):
        embed(checkpoint, str(out), images=str(pictures))
    assert not (out / "embeddings.json").exists()
    embed(checkpoint, str(out), images=str(pictures), max_dropped=0.5)
    assert "5 embeddings of" in (said := capsys.readouterr().out)
    assert "; 1 dropped" in said
    assert json.loads((out / "embeddings.json").read_text())["dropped"] == {"corrupt_image": 1}
    assert "bad.png" not in {row["id"] for row in load_embeddings(out)[1]}


def test_a_bad_object_is_dropped_alone(
    checkpoint: str, pictures: Path, coco: dict[str, Any], tmp_path: Path
) -> None:
    coco["annotations"][0]["segmentation"] = [[1.0, 2.0]]
    out = str(tmp_path / "out")
    embed(
        checkpoint,
        out,
        images=str(pictures),
        annotations=save(coco, tmp_path),
        max_dropped=0.5,
    )
    assert [row["id"] for row in load_embeddings(out)[1]] == ["71", "72"]


def test_a_part_without_anything(checkpoint: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sources, "_PART", 1)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"bad")
    Image.new("RGB", (20, 20)).save(folder / "b.png")
    for format in ("parquet", "npy"):
        out = tmp_path / format
        embed(checkpoint, str(out), images=str(folder), format=format, max_dropped=0.5)
        features, rows = load_embeddings(out)
        assert (len(features), [row["id"] for row in rows]) == (1, ["b.png"])
    (folder / "b.png").write_bytes(b"bad")
    with pytest.raises(ValueError, match="no picture or region could be embedded"):
        embed(checkpoint, str(tmp_path / "none"), images=str(folder), max_dropped=1)


def test_ids_are_unique(
    checkpoint: str,
    make_sample: Callable[..., RegionSample],
    write_shards: Callable[..., Any],
    pictures: Path,
    coco: dict[str, Any],
    tmp_path: Path,
) -> None:
    one, other, both = (tmp_path / name for name in ("one", "other", "both"))
    write_shards(one, [make_sample("1")])
    write_shards(other, [make_sample("1")])
    write_shards(both, [make_sample("1")], [make_sample("1")])
    embed(checkpoint, str(tmp_path / "a"), [str(one), str(other)])
    ids = [row["id"] for row in load_embeddings(tmp_path / "a")[1]]
    assert ids == [f"{folder}/1/{rid}" for folder in (one, other) for rid in (0, 1)]
    with pytest.raises(ValueError, match=r"names a folder twice"):
        embed(checkpoint, str(tmp_path / "b"), [str(one), f"{one}/"])
    with pytest.raises(ValueError, match=r"two rows of .* have the id '1/0'"):
        embed(checkpoint, str(tmp_path / "c"), [str(both)])
    assert not (tmp_path / "c" / "embeddings.json").exists()
    coco["annotations"][1]["id"] = 70
    with pytest.raises(ValueError, match=r"has 3 objects with 2 different ids; number them"):
        embed(
            checkpoint,
            str(tmp_path / "d"),
            images=str(pictures),
            annotations=save(coco, tmp_path),
        )


def test_bad_settings_stop_before_work(checkpoint: str, shards: str, pictures: Path) -> None:
    for given in ({}, {"data": [shards], "images": str(pictures)}, {"annotations": "x.json"}):
        with pytest.raises(ValueError, match=r"expected data .* or images with annotations"):
            embed(checkpoint, "out", **given)
    with pytest.raises(ValueError, match="expected focus to be one of"):
        embed(checkpoint, "out", [shards], focus="alhpa")
    with pytest.raises(ValueError, match="'crop' points at regions, and whole pictures have none"):
        embed(checkpoint, "out", images=str(pictures), focus="crop")
    with pytest.raises(ValueError, match="batch_size and max_images of at least 1, got 1, 0 and"):
        embed(checkpoint, "out", [shards], batch_size=0)
    assert not Path("out").exists()


def test_damage_and_strangers_are_told(checkpoint: str, shards: str, tmp_path: Path) -> None:
    embed(checkpoint, str(tmp_path), [shards], format="npy")
    file = sorted(tmp_path.glob("*.jsonl"))[0]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"and 5 rows, but embeddings\.json says"):
        load_embeddings(tmp_path)
    (tmp_path / "embeddings.json").write_text("[]")
    with pytest.raises(ValueError, match="is no record of embeddings"):
        load_embeddings(tmp_path)


def test_what_waits_is_bounded_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[int] = []

    class Pool:
        def submit(self, show: Any, entry: int) -> Any:
            submitted.append(entry)
            return type("Done", (), {"result": lambda self: entry, "cancel": lambda self: None})()

    entries = ((i, 3) for i in range(20))
    found = []
    for entry in views.ahead(Pool(), lambda e: e, entries, 10):  # type: ignore[arg-type]
        found.append(entry)
        assert 3 * (len(submitted) - len(found)) <= 10
    assert found == list(range(20))


@pytest.mark.slow
def test_two_devices_write_what_one_does(checkpoint: str, shards: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    embed(checkpoint, str(one), [shards])
    embed(checkpoint, str(two), [shards], devices=2)
    assert [f.name for f in sorted(one.glob("part*"))] == [f.name for f in sorted(two.glob("p*"))]
    features, rows = load_embeddings(one)
    found, also = load_embeddings(two)
    assert rows == also
    np.testing.assert_allclose(found, features, atol=1e-6)


def test_late_alpha_is_not_folded_and_passes_a_picture_once(
    tiny_name: str,
    shards: str,
    samples: list[RegionSample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = alpha_clip.create_model(tiny_name, alpha_block=2)[0]
    for kernel in alpha_parameters(late.visual):
        torch.nn.init.normal_(kernel, std=0.1)
    folder = str(alpha_clip.save_checkpoint(late, tmp_path / "late"))
    images: list[int] = []
    before = LateAlpha.image_tokens

    def counted(self: Any, rgb: torch.Tensor) -> torch.Tensor:
        images.append(len(rgb))
        return before(self, rgb)

    monkeypatch.setattr(LateAlpha, "image_tokens", counted)
    embed(folder, str(tmp_path / "out"), [shards])
    monkeypatch.undo()
    # A batch may end in the middle of a picture, which is then passed again; and one pass asks
    # for the number of dimensions.
    assert sum(images) <= len(samples) + 2
    features, _ = load_embeddings(tmp_path / "out")
    np.testing.assert_allclose(features, by_hand(late, regions_of(samples)), atol=1e-5)
