"""SAM's adapter, with a SAM of 256 pixels and no training."""

import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import segment_anything
import torch
from safetensors.torch import save_file
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from segment_anything.utils.amg import calculate_stability_score

from alpha_clip.regions import SampleError
from data_pipeline.segmenters.sam import SamSegmenter

BOXES = np.array([[5.0, 5, 40, 30], [20, 10, 60, 45], [0, 0, 80, 50]])


SIZES = [(50, 80), (300, 40), (40, 300), (64, 64), (257, 255)]


def build_tiny_sam(checkpoint=None):
    """Put SAM together from its own parts, as `segment_anything.build_sam` does."""
    torch.manual_seed(0)
    side, patch, dim = 256, 16, 32
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=side,
            patch_size=patch,
            depth=2,
            embed_dim=32,
            num_heads=2,
            mlp_ratio=2,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=[1],
            window_size=7,
            out_chans=dim,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=dim,
            image_embedding_size=(side // patch, side // patch),
            input_image_size=(side, side),
            mask_in_chans=4,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=1, embedding_dim=dim, mlp_dim=32, num_heads=2),
            transformer_dim=dim,
            iou_head_depth=2,
            iou_head_hidden_dim=16,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )
    with torch.no_grad():
        for block in sam.image_encoder.blocks:  # zeros at first: they would do nothing
            block.attn.rel_pos_h.normal_()
            block.attn.rel_pos_w.normal_()
        for layer in sam.mask_decoder.output_hypernetworks_mlps:
            layer.layers[-1].weight.mul_(30)  # logits beyond ±1, where stability cuts
    return sam.eval()


@pytest.fixture(scope="module")
def predictor():
    """The package's own way, with its own attention."""
    return segment_anything.SamPredictor(build_tiny_sam())


def make(**options):
    made = SamSegmenter("", device="cpu", **options)
    made.use(build_tiny_sam())
    return made


@pytest.fixture(scope="module")
def segmenter():
    return make()


@pytest.fixture
def tiny_registry(monkeypatch):
    """Let `vit_b` mean the tiny SAM: the real one takes a second to build."""
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", build_tiny_sam)


def picture(seed, height=50, width=80):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def assert_same(ones, others):
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert (one.mask != other.mask).mean() < 0.001  # sums in another order
        assert one.iou == pytest.approx(other.iou, abs=1e-5)
        assert one.stability == pytest.approx(other.stability, abs=1e-3)


def test_one_mask_a_box_with_estimates(segmenter):
    predictions = segmenter.segment(picture(0), BOXES)
    assert len(predictions) == len(BOXES)
    for prediction in predictions:
        assert prediction.mask.dtype == bool
        assert prediction.mask.shape == (50, 80)
        assert 0.05 < prediction.mask.mean() < 0.95  # or these tests could not fail
        assert type(prediction.iou) is type(prediction.stability) is float
        assert np.isfinite(prediction.iou)
        assert 0 < prediction.stability < 1


@pytest.mark.parametrize("images", [1, 2, 8])
def test_numbers_are_those_of_sams_own_predictor(predictor, images):
    pictures = [picture(i, *size) for i, size in enumerate(SIZES)]
    boxes = [BOXES[: 1 + i % 3] / (80, 50, 80, 50) * (w, h, w, h) for i, (h, w) in enumerate(SIZES)]
    results = make(images_per_batch=images).segment_batch(pictures, boxes)
    assert [len(r) for r in results] == [len(b) for b in boxes]
    for rgb, wanted, predictions in zip(pictures, boxes, results, strict=True):
        predictor.set_image(rgb)
        for box, prediction in zip(wanted, predictions, strict=True):
            logits, ious, _ = predictor.predict(box=box, multimask_output=False, return_logits=True)
            assert prediction.mask.shape == rgb.shape[:2]
            assert (prediction.mask != (logits[0] > 0)).mean() < 0.001
            assert prediction.iou == pytest.approx(float(ious[0]), abs=1e-5)
            stability = calculate_stability_score(torch.as_tensor(logits), 0.0, 1.0)
            assert prediction.stability == pytest.approx(float(stability[0]), abs=1e-3)


@pytest.mark.parametrize("count", [2, 3, 16])
def test_batches_of_boxes_give_the_same(segmenter, count):
    batched = make(boxes_per_batch=count)
    assert_same(segmenter.segment(picture(2), BOXES), batched.segment(picture(2), BOXES))


def test_bf16_is_close_and_decodes_in_fp32(segmenter, monkeypatch):
    bf16 = make(precision="bf16")
    seen = []
    mlp, decoder = bf16._model.image_encoder.blocks[1].mlp, bf16._model.mask_decoder
    mlp.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    decoder.register_forward_hook(lambda *a: seen.append(a[-1][0].dtype))
    found, wanted = bf16.segment(picture(2), BOXES), segmenter.segment(picture(2), BOXES)
    assert seen == [torch.bfloat16, *[torch.float32] * len(BOXES)]
    for one, other in zip(found, wanted, strict=True):
        assert 0 < (one.mask != other.mask).mean() < 0.1
        assert one.iou == pytest.approx(other.iou, abs=0.05)


@pytest.mark.slow
def test_compiled_encoder_gives_the_same(tmp_path, tiny_registry, segmenter):
    torch.save(build_tiny_sam().state_dict(), tmp_path / "sam.pth")
    compiled = SamSegmenter(
        str(tmp_path / "sam.pth"), "vit_b", device="cpu", compile=True, images_per_batch=3
    )
    compiled.load()
    pictures, boxes = [picture(i) for i in range(5)], [BOXES] * 5  # a batch of 3 and one of 2
    results = compiled.segment_batch(pictures, boxes)
    for rgb, result in zip(pictures, results, strict=True):
        assert_same(result, segmenter.segment(rgb, BOXES))


def test_encoder_that_cannot_be_compiled_stops_before_work(tmp_path, tiny_registry, monkeypatch):
    torch.save(build_tiny_sam().state_dict(), tmp_path / "sam.pth")

    def fail(_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(ImageEncoderViT, "compile", lambda self: setattr(self, "forward", fail))
    with pytest.raises(ValueError, match=r"compiled \(no C\+\+ compiler\); set compile: false"):
        SamSegmenter(str(tmp_path / "sam.pth"), "vit_b", device="cpu", compile=True).load()


def test_read_only_pictures_are_welcome(segmenter):
    rgb = picture(0)
    rgb.setflags(write=False)
    assert len(segmenter.segment(rgb, BOXES)) == len(BOXES)


class Chokes(torch.nn.Module):
    """An encoder that fails on one picture, in whatever batch it is."""

    def __init__(self, encoder, bad, error):
        super().__init__()
        self.encoder, self.bad, self.error = encoder, bad, error
        self.img_size, self.sizes = encoder.img_size, []

    def forward(self, x):
        self.sizes.append(len(x))
        if any(torch.equal(image, self.bad) for image in x):
            raise self.error
        return self.encoder(x)


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("shapes do not fit"), "segmenter_failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "segmenter_out_of_memory"),
    ],
)
def test_picture_that_fails_costs_only_itself(segmenter, place, error, reason):
    pictures, boxes = [picture(i) for i in range(4)], [BOXES + i for i in range(4)]
    alone = [segmenter.segment(rgb, b) for rgb, b in zip(pictures, boxes, strict=True)]
    batched = make(images_per_batch=4)
    sam, pixels = batched._model, torch.as_tensor(batched._resize.apply_image(pictures[place]))
    bad = sam.preprocess(pixels.permute(2, 0, 1))
    sam.image_encoder = encoder = Chokes(sam.image_encoder, bad, error)
    results = batched.segment_batch(pictures, boxes)
    assert encoder.sizes == [4, 1, 1, 1, 1]
    for index, (result, wanted) in enumerate(zip(results, alone, strict=True)):
        if index == place:
            assert isinstance(result, SampleError)
            assert result.reason == reason
            assert str(error) in str(result)
        else:
            assert_same(result, wanted)
    with pytest.raises(SampleError, match=reason):
        batched.segment(pictures[place], boxes[place])
    assert_same(batched.segment(pictures[place - 1], boxes[place - 1]), alone[place - 1])


def test_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ValueError, match=r"pip install 'alpha-clip\[data\]'"):
        SamSegmenter("sam.pth").load()


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_loads_a_checkpoint(tmp_path, tiny_registry, save):
    path = tmp_path / "sam.weights"
    weights = build_tiny_sam().state_dict()
    with torch.no_grad():
        weights = {name: value + 0.01 for name, value in weights.items()}
    save(weights, path)
    loaded = SamSegmenter(str(path), "vit_b", device="cpu")
    loaded.load()
    model = loaded._model
    assert not model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_first_picture_loads_what_load_did_not(tmp_path, tiny_registry):
    path = tmp_path / "sam.pth"
    torch.save(build_tiny_sam().state_dict(), path)
    lazy = SamSegmenter(str(path), "vit_b", device="cpu")
    assert len(lazy.segment(picture(0), BOXES)) == len(BOXES)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["missing", "a folder"])
def test_missing_checkpoint_says_where_to_get_one(tmp_path, make):
    make(tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"sam\.pth' does not exist; download it"):
        SamSegmenter(str(tmp_path / "sam.pth")).load()


GARBAGE = {
    "empty": b"",
    "a page": b"<!DOCTYPE html><html>Not Found</html>",
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
    "a zip's beginning": b"PK\x03\x04" + bytes(200),
    "pops from nothing": b"0.",
    "unknown memo": b"h\x24.",
    "zeros": bytes(100),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_no_checkpoint(tmp_path, name):
    path = tmp_path / "sam.pth"
    path.write_bytes(GARBAGE[name])
    with pytest.raises(ValueError, match=r"sam\.pth does not hold weights of SAM \("):
        SamSegmenter(str(path)).load()


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.zeros(3), {"weight": torch.zeros(3)}, {}, "words", None],
    ids=["list", "tensor", "other names", "nothing in it", "text", "None"],
)
def test_tensors_of_something_else_are_no_checkpoint(tmp_path, tiny_registry, content):
    path = tmp_path / "sam.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"sam\.pth does not hold weights of SAM \("):
        SamSegmenter(str(path), "vit_b").load()


def test_weights_of_another_size_are_refused(tmp_path, tiny_registry):
    weights = build_tiny_sam().state_dict()
    weights["image_encoder.pos_embed"] = torch.zeros(1, 4, 4, 32)
    torch.save(weights, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"(?s)as vit_b, .*pos_embed"):
        SamSegmenter(str(tmp_path / "sam.pth"), "vit_b").load()


PATCHES = "image_encoder.patch_embed.proj.weight"


@pytest.mark.parametrize("width", [768, 1024, 1280])
def test_size_is_seen_in_the_weights(tmp_path, monkeypatch, width):
    """A tiny SAM with the patch embedding of a real one tells which was asked for."""
    name = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}[width]
    asked = []
    for known in ("vit_b", "vit_l", "vit_h"):
        monkeypatch.setitem(
            segment_anything.sam_model_registry,
            known,
            lambda known=known: asked.append(known) or build_tiny_sam(),
        )
    path = tmp_path / "sam.pth"
    torch.save({PATCHES: torch.zeros(width, 3, 1, 1)}, path)
    for stated in ("auto", name):
        with pytest.raises(ValueError, match=f"as {name}, "):  # all else is missing
            SamSegmenter(str(path), stated).load()
    assert asked == [name, name]
    other = "vit_h" if name != "vit_h" else "vit_b"
    with pytest.raises(ValueError, match=f"holds weights of SAM {name}, but model_type is {other}"):
        SamSegmenter(str(path), other).load()
    assert asked == [name, name]


def test_size_that_is_unknown_is_refused(tmp_path):
    torch.save(build_tiny_sam().state_dict(), tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"the encoder's width is 32, not one of .*vit_b"):
        SamSegmenter(str(tmp_path / "sam.pth")).load()


class Exploit:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_the_trap_of_the_next_test_works(tmp_path):
    pickle.loads(pickle.dumps(Exploit(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("how", ["pickle", "torch", "torch dict"])
def test_pickled_code_is_never_run(tmp_path, how):
    trap, path = tmp_path / "trap", tmp_path / "sam.pth"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Exploit(trap), protocol=2))  # torch warns of others
    else:
        torch.save(Exploit(trap) if how == "torch" else {"weight": Exploit(trap)}, path)
    with pytest.raises(ValueError, match="does not hold weights"):
        SamSegmenter(str(path)).load()
    assert not trap.exists()


def test_settings_can_be_sent_to_a_worker_and_weights_stay_behind():
    settings = SamSegmenter("sam.pth", "vit_l", device="cpu", boxes_per_batch=4)
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert len(pickle.dumps(settings)) < 1000
