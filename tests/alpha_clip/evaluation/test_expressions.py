import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from alpha_clip.evaluation.expressions import read_expressions
from alpha_clip.regions import Box

ANNS = [{"id": 7, "bbox": [10, 20, 30, 40]}, {"id": 8, "bbox": [0.5, 0, 5, 5]}]


def line(**changes: Any) -> dict[str, Any]:
    record = {
        "image_id": 581857,
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "ann_id": 7,
        "anns": ANNS,
        "sentences": [{"raw": "The LEFT cup "}, {"raw": "cup"}],
        "split": "val",
    }
    return {**record, **changes}


def reclip(folder: Path, *records: object) -> str:
    file = folder / "refcoco_val.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def test_reclips_lines_are_gathered_by_picture(tmp_path: Path) -> None:
    other = line(image_id=3, file_name="3.jpg", ann_id=[7, 8], sentences=[{"raw": "both"}])
    more = line(ann_id=8, sentences=[{"raw": "dog"}])
    first, second = read_expressions(reclip(tmp_path, line(), other, more))
    assert first.image_id == 581857
    assert first.files == (
        "COCO_train2014_000000581857_16.jpg",
        "COCO_train2014_000000581857.jpg",
    )
    cup, dog = Box(10, 20, 40, 60), Box(0.5, 0, 5.5, 5)
    assert [box for box, _ in first.objects] == [cup, dog]
    assert [(e.text, e.boxes) for e in first.expressions] == [
        ("the left cup", (cup,)),
        ("cup", (cup,)),
        ("dog", (dog,)),
    ]
    assert second.files == ("3.jpg",)
    assert second.expressions[0].boxes == (cup, dog)


def test_a_split_may_be_chosen(tmp_path: Path) -> None:
    file = reclip(tmp_path, line(), line(image_id=4, split="testA"))
    assert [p.image_id for p in read_expressions(file, "testA")] == [4]
    assert len(read_expressions(file)) == 2
    with pytest.raises(ValueError, match=r"no expressions of split 'test'; it has testA, val"):
        read_expressions(file, "test")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image_id": 1}, "KeyError"),
        ([1, 2], "TypeError"),
        (line(ann_id=9), "KeyError: 9"),
        (line(anns=[{"id": 7, "bbox": [1, 2, 0, 4]}]), r"object 7: \[1, 2, 0, 4\] is no"),
    ],
)
def test_lines_of_another_format_are_refused(tmp_path: Path, record: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_expressions(reclip(tmp_path, record))


def test_a_damaged_line_is_told_by_its_number(tmp_path: Path) -> None:
    file = Path(reclip(tmp_path, line()))
    file.write_text(file.read_text() + "{oops\n")
    with pytest.raises(ValueError, match=r"line 2: .*expected lines of JSON as ReCLIP"):
        read_expressions(str(file))
    with pytest.raises(ValueError, match="can't be read, expected lines of JSON"):
        read_expressions(str(tmp_path / "none.jsonl"))


@pytest.fixture
def refer(tmp_path: Path) -> Path:
    """A folder as of the refer package, with polygons and a crowd."""
    polygon = [[10, 20, 40, 20, 40, 60, 10, 60]]
    instances = {
        "images": [{"id": 5, "file_name": "five.jpg"}, {"id": 6, "file_name": "six.jpg"}],
        "annotations": [
            {**ANNS[0], "image_id": 5, "segmentation": polygon, "iscrowd": 0},
            {**ANNS[1], "image_id": 5, "iscrowd": 1},
            {"id": 9, "image_id": 6, "bbox": [0, 0, 9, 9]},
        ],
        "categories": [],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    return tmp_path


REFS = [
    {"image_id": 5, "ann_id": 7, "split": "val", "sentences": [{"raw": "Cup", "tokens": ["cup"]}]},
    {"image_id": 6, "ann_id": 9, "split": "testA", "sentences": [{"raw": "a"}, {"raw": "b"}]},
]


@pytest.mark.parametrize("ending", [".p", ".json"])
@pytest.mark.parametrize("protocol", [0, 2])
def test_the_refer_package_is_read(refer: Path, ending: str, protocol: int) -> None:
    file = refer / f"refs(unc){ending}"
    plain = pickle.dumps(REFS, protocol)
    file.write_bytes(plain if ending == ".p" else json.dumps(REFS).encode())
    first, second = read_expressions(str(refer))
    assert first.files == ("five.jpg",)
    ((box, mask),) = first.objects  # without the crowd
    assert box == Box(10, 20, 40, 60)
    assert mask == [[10, 20, 40, 20, 40, 60, 10, 60]]
    assert first.expressions[0].text == "cup"
    assert [e.text for e in second.expressions] == ["a", "b"]
    assert [p.image_id for p in read_expressions(str(refer), "val")] == [5]


def test_python_2s_pickles_are_read(refer: Path) -> None:
    # Protocol 0 of Python 2: text is bytes (S'...'), as in the published files.
    pickled = (
        b"(lp0\n(dp1\nS'image_id'\np2\nI5\nsS'ann_id'\np3\nI7\nsS'split'\np4\nS'val'\np5\n"
        b"sS'sentences'\np6\n(lp7\n(dp8\nS'raw'\np9\nS'caf\\xc3\\xa9 cup'\np10\nsasa."
    )
    (refer / "refs(unc).p").write_bytes(pickled)
    assert read_expressions(str(refer))[0].expressions[0].text == "café cup"


class Runs:
    """What must not happen."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/pickled-code-ran",)


def test_pickled_code_is_never_run(refer: Path) -> None:
    (refer / "refs(google).p").write_bytes(pickle.dumps([Runs()]))
    with pytest.raises(ValueError, match=r"posix.system, expected plain values only"):
        read_expressions(str(refer), split_by="google")
    assert not Path("/tmp/pickled-code-ran").exists()


def test_a_file_that_is_not_there_is_named_with_those_that_are(refer: Path) -> None:
    (refer / "refs(unc).p").write_bytes(pickle.dumps(REFS))
    with pytest.raises(ValueError, match=r"refs\(umd\)\.p can't be read .*\['refs\(unc\)\.p'\]"):
        read_expressions(str(refer), split_by="umd")
    (refer / "instances.json").write_text("[]")
    with pytest.raises(ValueError, match=r"another format .*folder of the refer package"):
        read_expressions(str(refer))
