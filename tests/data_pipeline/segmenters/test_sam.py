"""SAM's adapter, with a SAM of 256 pixels and no training."""

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import segment_anything
import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

from data_pipeline.segmenters.sam import SamSegmenter

BOXES = np.array([[5.0, 5, 40, 30], [20, 10, 60, 45], [0, 0, 80, 50]])


def build_tiny_sam(checkpoint=None):
    """Put SAM together from its own parts, as `segment_anything.build_sam` does."""
    torch.manual_seed(0)
    side, patch, dim = 256, 16, 32
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=side,
            patch_size=patch,
            depth=1,
            embed_dim=32,
            num_heads=2,
            mlp_ratio=2,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=[0],
            window_size=0,
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


@pytest.fixture(scope="module")
def sam():
    return build_tiny_sam()


@pytest.fixture
def segmenter(sam):
    made = SamSegmenter("", device="cpu")
    made.use(sam)
    return made


@pytest.fixture
def tiny_registry(monkeypatch):
    """Let `vit_b` mean the tiny SAM: the real one takes a second to build."""
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", build_tiny_sam)


def picture(seed, height=50, width=80):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_one_mask_a_box_with_an_estimate(segmenter):
    predictions = segmenter.segment(picture(0), BOXES)
    assert len(predictions) == len(BOXES)
    for prediction in predictions:
        assert prediction.mask.dtype == bool
        assert prediction.mask.shape == (50, 80)
        assert np.isfinite(prediction.iou)
        assert type(prediction.iou) is float


@pytest.mark.parametrize("size", [(50, 80), (300, 40), (40, 300)])
def test_masks_have_the_size_of_the_picture(segmenter, size):
    (prediction,) = segmenter.segment(picture(0, *size), np.array([[1.0, 1, 30, 30]]))
    assert prediction.mask.shape == size


def test_masks_are_those_of_sams_own_predictor(segmenter, sam):
    predictor = segment_anything.SamPredictor(sam)
    predictor.set_image(picture(1))
    for box, prediction in zip(BOXES, segmenter.segment(picture(1), BOXES), strict=True):
        masks, ious, _ = predictor.predict(box=box, multimask_output=False)
        np.testing.assert_array_equal(prediction.mask, masks[0])
        assert prediction.iou == pytest.approx(float(ious[0]), abs=1e-5)


@pytest.mark.parametrize("count", [2, 3, 16])
def test_batches_of_boxes_give_the_same(sam, segmenter, count):
    batched = SamSegmenter("", device="cpu", boxes_per_batch=count)
    batched.use(sam)
    one_by_one = segmenter.segment(picture(2), BOXES)
    for one, other in zip(one_by_one, batched.segment(picture(2), BOXES), strict=True):
        assert (one.mask != other.mask).mean() < 0.001  # sums in another order
        assert one.iou == pytest.approx(other.iou, abs=1e-4)


def test_read_only_pictures_are_welcome(segmenter):
    rgb = picture(0)
    rgb.setflags(write=False)
    assert len(segmenter.segment(rgb, BOXES)) == len(BOXES)


def test_picture_that_cannot_be_encoded_never_gets_the_masks_of_another(
    sam, segmenter, monkeypatch
):
    before = segmenter.segment(picture(0), BOXES)

    def fail(_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(sam.image_encoder, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            segmenter.segment(picture(1), BOXES)
        # Nothing of the first picture is left to decode from.
        predictor = segmenter._predictor
        assert predictor.features is None
        with pytest.raises(RuntimeError, match="image must be set"):
            predictor.predict(box=BOXES[0])
    after = segmenter.segment(picture(0), BOXES)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.mask, other.mask)


def test_loads_a_checkpoint(tmp_path, tiny_registry):
    path = tmp_path / "sam.pth"
    weights = build_tiny_sam().state_dict()
    with torch.no_grad():
        weights = {name: value + 0.01 for name, value in weights.items()}
    torch.save(weights, path)
    loaded = SamSegmenter(str(path), "vit_b", device="cpu")
    loaded.load()
    model = loaded._predictor.model
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
    with pytest.raises(ValueError, match=r"sam\.pth does not hold weights of SAM vit_h"):
        SamSegmenter(str(path)).load()


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.zeros(3), {"weight": torch.zeros(3)}, {}, "words", None],
    ids=["list", "tensor", "other names", "nothing in it", "text", "None"],
)
def test_tensors_of_something_else_are_no_checkpoint(tmp_path, tiny_registry, content):
    path = tmp_path / "sam.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"sam\.pth does not hold weights of SAM vit_b"):
        SamSegmenter(str(path), "vit_b").load()


def test_weights_of_another_size_are_refused(tmp_path, tiny_registry):
    weights = build_tiny_sam().state_dict()
    weights["image_encoder.pos_embed"] = torch.zeros(1, 4, 4, 32)
    torch.save(weights, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"pos_embed"):
        SamSegmenter(str(tmp_path / "sam.pth"), "vit_b").load()


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
