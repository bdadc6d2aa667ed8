import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor, nn

import alpha_clip
from alpha_clip.export import onnx as target
from alpha_clip.export.onnx import compare, export
from alpha_clip.export.towers import Graph
from alpha_clip.model import AlphaClip
from alpha_clip.surgery import alpha_parameters
from alpha_clip.transforms import RegionTransform

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TIMM = {"timm_model_pretrained": False, "timm_pool": ""}
OTHERS: dict[str, dict[str, Any]] = {
    "ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
    "timm ConvNeXt": {**TIMM, "timm_model_name": "test_convnext", "image_size": 64},
    "timm ViT": {**TIMM, "timm_model_name": "test_vit2", "image_size": 160},
}


def build(vision: dict[str, Any], **more: Any) -> AlphaClip:
    torch.manual_seed(0)
    clip = CLIP(32, vision, TEXT, **more).eval()
    for parameter in alpha_parameters(alpha_clip.add_alpha_channel(clip.visual)):
        nn.init.normal_(parameter, std=0.1)
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}
    return AlphaClip(clip, "small", config, RegionTransform(vision["image_size"]))


def run(file: Path, inputs: Tensor) -> Tensor:
    """What a user does."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (name,) = [i.name for i in session.get_inputs()]
    assert name == {"image": "rgba", "text": "tokens"}[file.stem]
    (features,) = session.run(["features"], {name: inputs.numpy()})
    return torch.from_numpy(features)


@pytest.fixture(scope="module")
def small() -> AlphaClip:
    return build(VIT)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, small: AlphaClip) -> Path:
    """An export of the small ViT. Read only."""
    folder = tmp_path_factory.mktemp("onnx") / "out"
    before = {k: v.clone() for k, v in small.state_dict().items()}
    report = export(small, folder)
    assert report.directory == str(folder)
    assert 0 < report.max_difference <= 1e-4
    after = small.state_dict()
    assert before.keys() == after.keys()  # the model itself is not folded
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    return folder


@pytest.mark.slow
@torch.no_grad()
def test_onnxruntime_computes_the_same_for_any_batch(exported: Path, small: AlphaClip) -> None:
    for batch in (1, 3):
        rgba, tokens = torch.randn(batch, 4, 32, 32), torch.randint(1, 64, (batch, 8))
        ours, theirs = small.encode_image(rgba), run(exported / "image.onnx", rgba)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        texts = run(exported / "text.onnx", tokens)
        torch.testing.assert_close(texts, small.encode_text(tokens), rtol=0, atol=1e-4)
    other = torch.cat([rgba[:, :3], -rgba[:, 3:]], 1)
    assert not torch.allclose(run(exported / "image.onnx", other), theirs, atol=1e-2)


@pytest.mark.slow
def test_the_folder_says_what_the_towers_expect(exported: Path) -> None:
    names = {p.name for p in exported.iterdir()}
    assert names == {"image.onnx", "text.onnx", "preprocess.json", "README.md"}
    record = json.loads((exported / "preprocess.json").read_text())
    assert (record["size"], record["alpha_mean"], record["context_length"]) == (32, 0.5, 8)
    assert 'session("image.onnx")' in (exported / "README.md").read_text()


@pytest.mark.slow
def test_the_graphs_are_valid_and_name_no_files_of_this_machine(exported: Path) -> None:
    for name in ("image.onnx", "text.onnx"):
        graph = onnx.load(exported / name)
        onnx.checker.check_model(graph, full_check=True)
        assert {o.domain: o.version for o in graph.opset_import}[""] >= 18
        assert b"site-packages" not in (exported / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("vision", OTHERS.values(), ids=OTHERS.keys())
def test_other_towers(vision: dict[str, Any], tmp_path: Path) -> None:
    assert export(build(vision), tmp_path / "out").max_difference <= 1e-4


@pytest.mark.slow
def test_openais_activation(tmp_path: Path) -> None:
    assert export(build(VIT, quick_gelu=True), tmp_path / "out").max_difference <= 1e-4


@pytest.mark.slow
def test_weights_too_large_for_a_file_lie_beside_it(
    small: AlphaClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = pytest.importorskip("torch.onnx._internal.exporter._onnx_program")
    monkeypatch.setattr(program, "_LARGE_MODEL_THRESHOLD", 1000)
    export(small, tmp_path / "out")
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert (moved / "image.onnx.data").stat().st_size > 1e5 > (moved / "image.onnx").stat().st_size
    assert compare(small, moved) <= 1e-4


def test_what_onnx_lacks_is_refused_by_name(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    model = build(VIT)
    model.visual.ln_post = Branching()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"can't express image of small \(VisionTransformer\)"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(
    small: AlphaClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "_PACKAGES", ("onnx", "no_such_package"))
    needs = r"needs no_such_package, which is not installed: pip install 'alpha-clip\[onnx\]'"
    for call in (export, compare):
        with pytest.raises(ValueError, match=needs):
            call(small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_export_that_differs_is_not_kept(
    small: AlphaClip, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of another model stand for a wrong export."""

    def copy(graph: Graph, file: Path, model: AlphaClip) -> None:
        file.write_bytes((exported / file.name).read_bytes())

    monkeypatch.setattr(target, "_write", copy)
    assert export(small, tmp_path / "same").max_difference <= 1e-4
    other = deepcopy(small)
    other.visual.get_parameter("conv1.weight_alpha").data.mul_(1.1)
    with pytest.raises(ValueError, match=r"differ by .*, more than 1e-04; it was not kept"):
        export(other, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["same"]


def test_a_folder_with_something_in_it_is_kept(small: AlphaClip, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; pass --overwrite true"):
        export(small, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_compare_notices_another_model(exported: Path, small: AlphaClip) -> None:
    assert compare(small, exported) <= 1e-4
    for name in ("visual.conv1.weight_alpha", "text_projection"):
        other = deepcopy(small)
        other.clip.get_parameter(name).data.mul_(1.01)
        assert compare(other, exported) > 1e-4
