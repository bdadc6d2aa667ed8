"""What benchmarks share: timing, tables, the machine's best, and encoders that compute the same."""

import csv
import math
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from alpha_clip import AlphaClip, create_model
from benchmarks import encode as encode_module
from benchmarks.encode import encode
from benchmarks.encoders import ENCODE, FOLDED, PLAIN, PUBLISHED, create_encoders
from benchmarks.gpu import _parts, _tiny, gpu
from benchmarks.machine import at_matmul_rate, forward_flops, machine, matmul_rate
from benchmarks.published import published_code, published_preprocess, published_tower
from benchmarks.regions import ALONE, SHARED, TINY, regions
from benchmarks.table import report, spread
from benchmarks.timing import Measured, measure
from benchmarks.training_step import OURS, WHOLE_TEXT, training_step


def test_ratios_are_taken_within_a_round() -> None:
    found = Measured("work", {"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 4.0]}, 10, [0.5, 0.5, 1.0])
    assert found.ratio("b", "a") == (2.0, 1.5, 2.0)
    first, second = found.rows()
    assert (first.ratio, first.low, first.high, first.fastest) == (1, 1, 1, 1)
    assert second.milliseconds == 4000
    assert second.fastest == 2.0
    assert second.per_second == pytest.approx(10 / 4)
    assert first.of_floor == 0.25
    assert second.of_floor == 0.25


def test_every_variant_runs_once_a_round_after_the_warm_up() -> None:
    calls: list[str] = []
    ways = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = measure("work", ways, rounds=6, device="cpu", warmup=3)
    assert [sorted(calls[i : i + 2]) for i in range(0, len(calls), 2)] == 9 * [["a", "b"]]
    assert calls[::2] != 9 * ["a"]  # the order changes
    assert {name: len(times) for name, times in found.seconds.items()} == {"a": 6, "b": 6}
    assert found.rows()[0].of_floor is None
    assert found.rows()[0].per_second is None


def test_a_budget_ends_after_five_rounds() -> None:
    assert len(measure("work", {"a": int}, 50, "cpu", budget_s=0).seconds["a"]) == 5
    assert len(measure("work", {"a": int}, 50, "cpu", budget_s=math.inf).seconds["a"]) == 50


def test_a_variant_may_tell_its_own_time_and_the_floor_is_asked_each_round() -> None:
    floors = iter([1.0, 2.0, 3.0])
    found = measure("work", {"a": lambda: 4.0}, 3, "cpu", floor=lambda: next(floors))
    assert found.seconds == {"a": [4.0, 4.0, 4.0]}
    assert found.of_floor("a") == 0.5


def test_a_table_is_printed_written_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Measured("some work", {"one way": [1.0, 1.0], "another": [3.0, 3.0]}, 6)
    report(found.rows(), tmp_path / "new" / "table.csv", "nothing at all")
    shown = capsys.readouterr().out
    assert "some work, another" in shown
    assert "3.000" in shown
    assert "of floor" not in shown  # no such column
    assert machine() in shown
    rows = list(csv.DictReader((tmp_path / "new" / "table.csv").read_text().splitlines()))
    assert [float(row["ratio"]) for row in rows] == [1.0, 3.0]
    assert [float(row["per_second"]) for row in rows] == [6.0, 2.0]
    assert {row["machine"] for row in rows} == {machine()}
    assert (tmp_path / "new" / "table.png").read_bytes().startswith(b"\x89PNG")


def test_spread_names_the_extremes() -> None:
    found = [
        Measured("small", {"a": [1.0, 1.0], "b": [2.0, 2.0]}),
        Measured("large", {"a": [1.0, 1.0], "b": [0.5, 0.5]}),
        Measured("other", {"a": [1.0, 1.0]}),
    ]
    assert spread(found, "b", "a") == "time of b / a: 0.500 (large) to 2.000 (small)\n"
    assert spread(found, "c", "a") == ""


def test_operations_are_counted_and_the_machine_is_asked() -> None:
    layer = nn.Linear(64, 32, bias=False)
    assert forward_flops(layer, torch.randn(8, 64)) == 2 * 8 * 64 * 32
    assert matmul_rate("cpu", torch.float32) > 1e8
    assert 0 < at_matmul_rate(1e6, "cpu", torch.float32)() < 1
    assert torch.__version__.split("+")[0] in machine()


class Stand(nn.Module):
    """Takes the sizes, the weights and the calls of the published ViT."""

    def __init__(self, *sizes: int, lora_adapt: bool, rank: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.model: Any = None

    def load_state_dict(self, weights: Any, strict: bool = True, assign: bool = False) -> Any:
        assert "conv1_alpha.weight" in weights
        assert "transformer.resblocks.0.attn.in_proj.weight" in weights
        self.kernel = nn.Parameter(weights["conv1_alpha.weight"])


def test_the_published_tower_gets_our_sizes_and_weights() -> None:
    model = create_model("ViT-B-32-quickgelu")[0]
    tower = published_tower(SimpleNamespace(VisionTransformer=Stand), model)  # type: ignore[arg-type]
    assert tower.sizes == (224, 32, 768, 12, 12, 512)
    assert torch.equal(tower.kernel, model.visual.conv1.weight_alpha)
    assert not tower.training


def test_a_folder_that_is_no_clone_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a clone of https://github"):
        published_code(tmp_path)
    (tmp_path / "alpha_clip").mkdir()
    (tmp_path / "alpha_clip" / "model.py").write_text("import no_such_module_at_all\n")
    with pytest.raises(ValueError, match="pip install loralib"):
        published_code(tmp_path)
    (tmp_path / "alpha_clip" / "model.py").write_text("class CLIP: pass\n")
    assert published_code(tmp_path).CLIP


def test_the_published_preparation_gives_the_towers_size() -> None:
    import numpy as np
    from PIL import Image

    on_image, on_mask = published_preprocess(32)
    assert on_image(Image.new("RGB", (80, 60))).shape == (3, 32, 32)
    mask = on_mask(np.full((60, 80), 255, np.uint8))
    assert mask.shape == (1, 32, 32)
    assert mask.max() == pytest.approx(0.5 / 0.26)


def test_encoders_that_disagree_are_not_timed() -> None:
    encoders = create_encoders(TINY, "fp32", "cpu")
    ways = encoders.ways(encoders.images(1), compiled=False)
    assert list(ways) == [PLAIN, "alpha", FOLDED, ENCODE]
    nn.init.zeros_(encoders.model.visual.conv1.weight)
    with pytest.raises(ValueError, match="the encoders disagree"):
        encoders.check()
    with pytest.raises(ValueError, match="precision must be one of fp32, fp16, bf16"):
        create_encoders(TINY, "int4", "cpu")


def test_encoding_is_measured_until_the_device_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encode_module, "_GAIN", 1e9)  # any gain is too small: after two sizes
    rows = encode([TINY], rounds=5, budget_s=10, output=tmp_path / "encode.csv")
    cases = list(dict.fromkeys(row.case for row in rows))
    assert [case.rsplit(" ", 1)[1] for case in cases] == ["1", "2"]
    variants = [row.variant for row in rows if row.case == cases[0]]
    assert variants[:4] == [PLAIN, "alpha", FOLDED, ENCODE]
    assert [v for v in variants if v.endswith("(by the first layer)")] == variants[4:]
    assert all(row.of_floor for row in rows if row.variant in variants[:4])
    assert "time of alpha, folded / open_clip" in capsys.readouterr().out
    assert PUBLISHED not in variants
    assert (tmp_path / "encode.png").is_file()


def test_regions_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = regions([TINY], [1, 2], rounds=5, budget_s=0, output=tmp_path / "regions.csv")
    assert [row.case for row in rows[::3]] == ["tiny, 1 region", "tiny, 2 regions"]
    assert {row.variant for row in rows} == {ALONE, "one RGBA batch", SHARED}
    assert "time of encode_regions / one by one" in capsys.readouterr().out


def test_a_training_step_is_measured(tmp_path: Path) -> None:
    rows = training_step(TINY, 2, rounds=5, budget_s=0, output=tmp_path / "step.csv")
    assert [row.variant for row in rows] == [OURS, WHOLE_TEXT]
    assert rows[0].per_second == pytest.approx(4 / rows[0].milliseconds * 1000)


def test_the_gpu_script_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--tiny true --device cpu"):
        gpu()


@pytest.mark.parametrize("parts", [_parts, _tiny], ids=["all", "tiny"])
def test_every_part_takes_what_it_is_given(parts: Any, tmp_path: Path) -> None:
    files = []
    for name, part in parts(Path("clone"), "cuda", tmp_path).items():
        given = signature(part.func).bind(*part.args, **part.keywords).arguments
        files.append(given["output"])
        assert given["device"] == "cuda", name
        if "published" in signature(part.func).parameters:
            assert given["published"] == Path("clone"), name
        assert set(given.get("precisions") or ["bf16"]) <= {"bf16", "fp16"}
    assert len(set(files)) == len(files)


def test_a_part_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken() -> list[Any]:
        raise ValueError("as planned")

    parts = {"first": broken, "second": list}
    monkeypatch.setattr("benchmarks.gpu._tiny", lambda *_: parts)
    with pytest.raises(RuntimeError, match="first failed"):
        gpu(tiny=True, device="cpu", output=tmp_path)
    shown = capsys.readouterr().out
    assert "first failed: ValueError: as planned" in shown
    assert "\nsecond\n" in shown
    parts.pop("first")
    assert gpu(tiny=True, device="cpu", output=tmp_path) == {"second": []}
    assert gpu(minutes=-1, tiny=True, device="cpu", output=tmp_path) == {}
    assert "second: left out" in capsys.readouterr().out


def test_a_model_of_ours_is_told_from_openais() -> None:
    from benchmarks.published import is_openai

    def fake(**config: Any) -> AlphaClip:
        return SimpleNamespace(config=config)  # type: ignore[return-value]

    assert is_openai(fake(quick_gelu=True, vision_cfg={"layers": 12}))
    assert not is_openai(fake(vision_cfg={"layers": 12}))
    assert not is_openai(fake(quick_gelu=True, vision_cfg={"timm_model_name": "x"}))
