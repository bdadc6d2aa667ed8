"""SAM 2's adapter, with a SAM 2 of 128 pixels and no training."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
import transformers
from transformers import Sam2Config, Sam2Model, Sam2Processor, Sam2VideoConfig, Sam2VideoModel

from alpha_clip.regions import SampleError
from data_pipeline.segmenters.promptable import stability_score
from data_pipeline.segmenters.sam2 import Sam2Segmenter

BOXES = np.array([[5.0, 5, 40, 30], [20, 10, 60, 45], [0, 0, 80, 50]])
SIZES = [(50, 80), (300, 40), (3, 90), (128, 128)]
NAMES = ("Sam2ImageProcessor", "Sam2ImageProcessorFast")  # in transformers 5, and 4.57
ImageProcessor = next(getattr(transformers, name) for name in NAMES if hasattr(transformers, name))

BACKBONE = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 8,
    "num_attention_heads": 1,
    "image_size": [128, 128],
    "window_positional_embedding_background_size": [2, 2],
    "blocks_per_stage": [1, 2, 1, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 1, 2, 2],
    "window_size_per_stage": [8, 4, 4, 2],
    "global_attention_blocks": [2],
}
CONFIG = {
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": BACKBONE,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": 32,
    },
    "prompt_encoder_config": {
        "hidden_size": 32,
        "image_size": 128,
        "patch_size": 16,
        "mask_input_channels": 4,
    },
    "mask_decoder_config": {
        "hidden_size": 32,
        "mlp_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
}
MEMORY = {
    "image_size": 128,
    "memory_attention_hidden_size": 32,
    "memory_attention_num_layers": 1,
    "memory_attention_feed_forward_hidden_size": 32,
    "memory_attention_rope_feat_sizes": [8, 8],
    "memory_encoder_hidden_size": 32,
    "memory_encoder_output_channels": 16,
    "memory_fuser_num_layers": 1,
    "memory_fuser_embed_dim": 32,
    "memory_fuser_intermediate_dim": 32,
    "mask_downsampler_embed_dim": 32,
}


def stir(model):
    """Fresh weights are so small that every picture would get the same."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        for mlp in model.mask_decoder.output_hypernetworks_mlps:
            mlp.proj_out.weight.mul_(30)  # logits beyond ±1, where stability cuts
    return model.eval()


def build_processor():
    size, mask_size = ({"height": side, "width": side} for side in (128, 32))
    return Sam2Processor(ImageProcessor(size=size, mask_size=mask_size))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SAM 2 as `save_pretrained` leaves it."""
    path = tmp_path_factory.mktemp("sam2")
    stir(Sam2Model(Sam2Config(**CONFIG))).save_pretrained(path)
    build_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def segmenter(folder):
    loaded = Sam2Segmenter(str(folder), device="cpu")
    loaded.load()
    return loaded


@pytest.fixture
def copy(folder, tmp_path):
    """The same folder, to be damaged."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def picture(seed, height=50, width=80):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def boxes_of(index):
    height, width = SIZES[index]
    return BOXES[: 1 + index % 3] / (80, 50, 80, 50) * (width, height, width, height)


def assert_same(ones, others):
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert (one.mask != other.mask).mean() < 0.001  # sums in another order
        assert one.iou == pytest.approx(other.iou, abs=1e-5)
        assert one.stability == pytest.approx(other.stability, abs=1e-3)


@pytest.mark.parametrize("images", [1, 3])
def test_numbers_are_those_of_the_stock_model(folder, images):
    model, processor = Sam2Model.from_pretrained(folder), Sam2Processor.from_pretrained(folder)
    pictures = [picture(i, *size) for i, size in enumerate(SIZES)]
    boxes = [boxes_of(i) for i in range(len(SIZES))]
    segmenter = Sam2Segmenter(str(folder), device="cpu", images_per_batch=images)
    for rgb, wanted, result in zip(
        pictures, boxes, segmenter.segment_batch(pictures, boxes), strict=True
    ):
        inputs = processor(
            images=rgb,
            input_boxes=[wanted.tolist()],
            input_data_format="channels_last",
            return_tensors="pt",
        )
        with torch.no_grad():
            out = model(**inputs, multimask_output=False)
        (logits,) = processor.post_process_masks(
            out.pred_masks, inputs["original_sizes"], binarize=False
        )
        stability = stability_score(logits[:, 0])
        assert len(result) == len(wanted)
        for index, prediction in enumerate(result):
            assert prediction.mask.shape == rgb.shape[:2]
            assert (prediction.mask != (logits[index, 0] > 0).numpy()).mean() < 0.001
            assert prediction.iou == pytest.approx(out.iou_scores[0, index, 0].item(), abs=1e-5)
            assert prediction.stability == pytest.approx(stability[index].item(), abs=1e-3)


def test_one_mask_a_box_with_estimates(segmenter):
    predictions = segmenter.segment(picture(0), BOXES)
    assert len(predictions) == len(BOXES)
    for prediction in predictions:
        assert prediction.mask.dtype == bool
        assert 0.02 < prediction.mask.mean() < 0.98  # or these tests could not fail
        assert type(prediction.iou) is type(prediction.stability) is float
        assert 0 < prediction.iou < 1
        assert 0 < prediction.stability < 1
    other = segmenter.segment(picture(1), BOXES)
    assert (predictions[0].mask != other[0].mask).mean() > 0.01


def test_batches_of_boxes_give_the_same(folder, segmenter):
    batched = Sam2Segmenter(str(folder), device="cpu", boxes_per_batch=2)
    assert_same(batched.segment(picture(2), BOXES), segmenter.segment(picture(2), BOXES))


def test_bf16_is_close_and_decodes_in_fp32(folder, segmenter):
    bf16 = Sam2Segmenter(str(folder), device="cpu", precision="bf16")
    bf16.load()
    seen = []
    blocks, decoder = bf16._model.vision_encoder.backbone.blocks, bf16._model.mask_decoder
    blocks[0].mlp.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    decoder.register_forward_hook(lambda *a: seen.append(a[-1][0].dtype))
    found, wanted = bf16.segment(picture(2), BOXES), segmenter.segment(picture(2), BOXES)
    assert seen == [torch.bfloat16, *[torch.float32] * len(BOXES)]
    for one, other in zip(found, wanted, strict=True):
        assert (one.mask != other.mask).mean() < 0.1
        assert one.iou == pytest.approx(other.iou, abs=0.05)


def test_read_only_pictures_are_welcome(segmenter):
    rgb = picture(0)
    rgb.setflags(write=False)
    assert_same(segmenter.segment(rgb, BOXES), segmenter.segment(picture(0), BOXES))


def test_picture_that_fails_costs_only_itself(folder, segmenter, monkeypatch):
    pictures = [picture(i) for i in range(3)]
    alone = [segmenter.segment(rgb, BOXES) for rgb in pictures]
    batched = Sam2Segmenter(str(folder), device="cpu", images_per_batch=3)
    batched.load()
    prepare, embed = batched._processor.image_processor, batched._model.get_image_embeddings
    bad = prepare(pictures[1], return_tensors="pt")["pixel_values"][0]
    batches = []

    def choke(pixels):
        batches.append(len(pixels))
        if any(torch.equal(image, bad) for image in pixels):
            raise RuntimeError("shapes do not fit")
        return embed(pixels)

    monkeypatch.setattr(batched._model, "get_image_embeddings", choke)
    results = batched.segment_batch(pictures, [BOXES] * 3)
    assert batches == [3, 1, 1, 1]
    assert isinstance(results[1], SampleError)
    assert results[1].reason == "segmenter_failed"
    assert_same(results[0], alone[0])
    assert_same(results[2], alone[2])


def test_checkpoints_of_the_video_model_load(tmp_path, folder, segmenter):
    """The hub's are such: SAM 2 with a memory, which pictures do not need."""
    video = Sam2VideoModel(Sam2VideoConfig(**CONFIG, **MEMORY))
    video.load_state_dict(Sam2Model.from_pretrained(folder).state_dict(), strict=False)
    video.save_pretrained(tmp_path)
    build_processor().save_pretrained(tmp_path)
    loaded = Sam2Segmenter(str(tmp_path), device="cpu")
    assert_same(loaded.segment(picture(0), BOXES), segmenter.segment(picture(0), BOXES))


def refused(path):
    with pytest.raises(ValueError, match="does not hold SAM 2 for transformers") as caught:
        Sam2Segmenter(str(path), device="cpu").load()
    return str(caught.value)


def test_folder_that_is_not_there(tmp_path):
    assert str(tmp_path / "sam2") in refused(tmp_path / "sam2")


def test_folder_with_nothing_in_it(tmp_path):
    refused(tmp_path)


def test_weights_that_are_missing(copy):
    (copy / "model.safetensors").unlink()
    assert "model.safetensors" in refused(copy)


def test_damaged_weights(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"vision_config": {"fpn_hidden_size": "x"}}'])
def test_damaged_config(copy, content):
    (copy / "config.json").write_text(content)
    refused(copy)


def test_config_of_another_size(copy):
    config = json.loads((copy / "config.json").read_text())
    config["mask_decoder_config"]["iou_head_hidden_dim"] = 24
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy)


def test_config_of_more_layers_than_there_are_weights(copy):
    """transformers itself fills them with random numbers."""
    config = json.loads((copy / "config.json").read_text())
    config["mask_decoder_config"]["num_hidden_layers"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    assert "of its weights are missing, such as mask_decoder.transformer.layers.1" in refused(copy)


class Exploit:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_pickled_weights_are_never_read(copy):
    trap = copy / "trap"
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(trap), protocol=2))
    refused(copy)
    assert not trap.exists()


def test_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'alpha-clip\[export\]'"):
        Sam2Segmenter("facebook/sam2.1-hiera-large").load()


def test_settings_can_be_sent_to_a_worker_and_weights_stay_behind(folder):
    settings = Sam2Segmenter(str(folder), device="cpu", boxes_per_batch=4)
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert len(pickle.dumps(settings)) < 1000
    assert str(folder) not in str(settings.settings())
    hub = Sam2Segmenter("facebook/sam2.1-hiera-large").settings()
    assert hub["checkpoint"] == "facebook/sam2.1-hiera-large"


@pytest.mark.slow
def test_compiled_encoder_gives_the_same(folder, segmenter):
    compiled = Sam2Segmenter(str(folder), device="cpu", compile=True)
    compiled.load()
    assert_same(compiled.segment(picture(0), BOXES), segmenter.segment(picture(0), BOXES))
