"""What promptable segmenters share: batches, chunks, isolation, stability, settings."""

import gc
import pickle
import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from segment_anything.utils.amg import calculate_stability_score

from alpha_clip.regions import SampleError
from data_pipeline.segmenters import promptable
from data_pipeline.segmenters.promptable import PromptableSegmenter, pick_device, stability_score

BOXES = np.array([[0.0, 0, 4, 4], [1, 2, 3, 4], [0, 1, 5, 6], [2, 2, 9, 9], [0, 0, 1, 1]])


@dataclass
class Toy(PromptableSegmenter):
    """A picture's embedding is its mean; a mask is right of it; the IoU is the box's x2.

    Its pictures tell it what to do wrong: their first pixel is looked up in `wrong`.
    """

    checkpoint: str = ""
    wrong: dict = field(default_factory=dict)
    log: list = field(default_factory=list)

    def build(self):
        self.take(torch.nn.Linear(1, 1), torch.nn.Identity())

    def encode(self, images):
        self.log.append(len(images))
        for rgb in images:
            if isinstance(todo := self.wrong.get(int(rgb[0, 0, 0])), Exception):
                raise todo
        means = [float(rgb.mean()) for rgb in images]
        for index, rgb in enumerate(images):
            if self.wrong.get(int(rgb[0, 0, 0])) == "encode nan":
                means[index] = float("nan")
        return (torch.tensor(means)[:, None], torch.zeros(len(images), 2))

    def decode(self, embedding, boxes_xyxy_px, size):
        self.log.append(boxes_xyxy_px.shape)
        mean = embedding[0]
        assert mean.shape == (1, 1)
        assert embedding[1].shape == (1, 2)
        ious = torch.as_tensor(boxes_xyxy_px[:, 2], dtype=torch.float32)
        todo = self.wrong.get(("decode", round(mean.item())))
        if isinstance(todo, Exception):
            raise todo
        if todo == "iou nan":
            ious[-1] = float("inf")
        logits = mean.expand(len(boxes_xyxy_px), 4).reshape(-1, 1, 2, 2).clone()
        if todo == "mask nan":
            logits[-1] = float("nan")
        return logits, ious

    def upscale(self, logits, size):
        self.log.append(("upscale", len(logits)))
        columns = torch.arange(size[1], dtype=torch.float32).expand(1, 1, *size)
        return columns - logits.mean((-2, -1), keepdim=True)


def picture(value, height=6, width=10):
    return np.full((height, width, 3), value, np.uint8)


def toy(**options):
    return Toy(device="cpu", **options)


def check(result, value, boxes=BOXES, size=(6, 10)):
    """These are the masks of the picture of this value, one a box, in order."""
    assert [p.iou for p in result] == list(boxes[:, 2])
    for prediction in result:
        expected = np.broadcast_to(np.arange(size[1]) > value, size)
        np.testing.assert_array_equal(prediction.mask, expected)
        assert type(prediction.iou) is type(prediction.stability) is float


@pytest.mark.parametrize("count", [None, 1, 2, 3, 7])
def test_pictures_are_encoded_in_batches(count):
    segmenter = toy(images_per_batch=count, boxes_per_batch=99)
    sizes = [(6, 10), (4, 12), (6, 10), (9, 9), (3, 8)]
    pictures = [picture(v, *size) for v, size in enumerate(sizes)]
    boxes = [BOXES[: v + 1] for v in range(5)]
    results = segmenter.segment_batch(pictures, boxes)
    for value, result in enumerate(results):
        check(result, value, boxes[value], sizes[value])
    full, rest = divmod(5, count or 1)
    encoded = [entry for entry in segmenter.log if isinstance(entry, int)]
    assert encoded == [count or 1] * full + [rest] * (rest > 0)
    assert segmenter.batch_size() == (count or 1)


@pytest.mark.parametrize("count", [None, 1, 2, 5, 99])
def test_boxes_are_decoded_in_chunks(count):
    segmenter = toy(boxes_per_batch=count)
    check(segmenter.segment(picture(3), BOXES), 3)
    chunks = [entry[0] for entry in segmenter.log if isinstance(entry, tuple) and entry[-1] == 4]
    assert sum(chunks) == len(BOXES)
    assert max(chunks) == min(count or 1, len(BOXES))


def test_large_masks_are_made_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(promptable, "_CPU_UPSCALED_PX", 150)
    segmenter = toy(boxes_per_batch=5)
    check(segmenter.segment(picture(3), BOXES), 3)
    assert [e for e in segmenter.log if isinstance(e, tuple) and e[0] == "upscale"] == [
        ("upscale", 2),
        ("upscale", 2),
        ("upscale", 1),
    ]


def test_nothing_to_do_is_no_work():
    segmenter = toy()
    assert segmenter.segment_batch([], []) == []
    assert segmenter.segment_batch([picture(1)], [np.empty((0, 4))]) == [[]]


ERRORS = {
    "segmenter_failed": [
        RuntimeError("shapes"),
        ValueError("value"),
        ZeroDivisionError("zero"),
        KeyError("key"),
    ],
    "segmenter_out_of_memory": [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    "not_a_picture": [SampleError("not_a_picture", "a sketch")],
}
CASES = [(reason, error) for reason, errors in ERRORS.items() for error in errors]


@pytest.mark.parametrize(("reason", "error"), CASES)
@pytest.mark.parametrize("where", ["encode", "decode"])
def test_failure_costs_only_its_picture(where, reason, error):
    segmenter = toy(images_per_batch=4, wrong={6 if where == "encode" else (where, 6): error})
    pictures, boxes = [picture(v) for v in (5, 6, 7, 8)], [BOXES, BOXES[1:], BOXES[2:], BOXES[:2]]
    results = segmenter.segment_batch(pictures, boxes)
    assert isinstance(results[1], SampleError)
    assert results[1].reason == reason
    assert str(error) in str(results[1])
    for index in (0, 2, 3):
        check(results[index], 5 + index, boxes[index])
    with pytest.raises(SampleError, match=reason):
        segmenter.segment(pictures[1], BOXES)
    check(segmenter.segment(pictures[0], BOXES), 5)  # and leaves nothing behind


@pytest.mark.parametrize(
    "wrong", [{6: "encode nan"}, {("decode", 6): "iou nan"}, {("decode", 6): "mask nan"}]
)
def test_numbers_must_be_finite(wrong):
    segmenter = toy(images_per_batch=3, wrong=wrong)
    results = segmenter.segment_batch([picture(v) for v in (5, 6, 7)], [BOXES] * 3)
    assert results[1].reason == "segmenter_not_finite"
    check(results[0], 5)
    check(results[2], 7)
    assert [e for e in segmenter.log if isinstance(e, int)] == [3]  # nothing is encoded again


@pytest.mark.parametrize("where", ["encode", "decode"])
def test_broken_device_stops_everything(where):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    segmenter = toy(images_per_batch=3, wrong={6 if where == "encode" else (where, 6): error})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        segmenter.segment_batch([picture(v) for v in (5, 6, 7)], [BOXES] * 3)


def test_mistakes_in_the_code_are_not_the_pictures_fault():
    with pytest.raises(TypeError):
        toy(wrong={6: TypeError("no such argument")}).segment(picture(6), BOXES)


def test_rejection_keeps_no_tensors_alive(monkeypatch):
    """A frame that an exception remembers would hold the whole batch on the GPU."""
    segmenter, alive = toy(wrong={("decode", 6): "iou nan"}), []
    decode = segmenter.decode

    def watched(*arguments):
        logits, ious = decode(*arguments)
        alive.append(weakref.ref(logits))
        return logits, ious

    monkeypatch.setattr(segmenter, "decode", watched)
    gc.disable()
    try:
        (result,) = segmenter.segment_batch([picture(6)], [BOXES])
        assert result.reason == "segmenter_not_finite"
        assert alive[-1]() is None
    finally:
        gc.enable()


def test_compiled_encoder_sees_two_sizes_only(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    segmenter = toy(compile=True, images_per_batch=3)
    results = segmenter.segment_batch([picture(v) for v in range(5)], [BOXES] * 5)
    for value, result in enumerate(results):
        check(result, value)
    segmenter.segment(picture(1), BOXES)
    assert [entry for entry in segmenter.log if isinstance(entry, int)] == [3, 3, 3, 1]


@pytest.mark.parametrize("offset", [0.5, 1.0])
def test_stability_is_that_of_segment_anything(offset):
    torch.manual_seed(0)
    logits = torch.randn(4, 20, 30) * torch.tensor([0.5, 1, 3, 9])[:, None, None]
    wanted = calculate_stability_score(logits, 0.0, offset)
    torch.testing.assert_close(stability_score(logits, offset), wanted)
    assert wanted.min() < 0.2 < 0.8 < wanted.max()


def test_stability_of_nothing_is_0():
    assert stability_score(torch.full((1, 4, 4), -9.0)).tolist() == [0.0]
    assert stability_score(torch.full((1, 4, 4), 9.0)).tolist() == [1.0]


@pytest.mark.parametrize("name", ["images_per_batch", "boxes_per_batch"])
@pytest.mark.parametrize("count", [0, -1])
def test_batches_hold_something(name, count):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, .*got {count}"):
        toy(**{name: count})


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_device_that_is_not_there(name):
    with pytest.raises(ValueError, match="device"):
        pick_device(name)
    with pytest.raises(ValueError, match="device"):
        Toy(device=name).load()


def test_settings_follow_the_weights_and_not_the_machine(tmp_path):
    for name, content in (("a", b"weights"), ("b", b"weights"), ("c", b"others")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert Toy(a).settings() == Toy(b, device="cuda").settings() != Toy(c).settings()
    assert "device" not in Toy(a).settings()
    assert Toy("nowhere").settings()["checkpoint"] == "nowhere"
    for change in ({"precision": "bf16"}, {"images_per_batch": 2}, {"boxes_per_batch": 2}):
        assert Toy(a, **change).settings() != Toy(a).settings()


def test_settings_travel_and_the_model_stays(tmp_path):
    segmenter = Toy("x", precision="bf16", boxes_per_batch=3)
    before = segmenter.settings()
    assert pickle.loads(pickle.dumps(segmenter)) == segmenter
    segmenter.load()
    assert segmenter.settings() == before


def test_workers_share_out_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [pick_device("auto", worker).index for worker in range(5)] == [0, 1, 2, 0, 1]
    assert pick_device("cpu", 2).type == "cpu"
    assert pick_device("cuda:1", 2).index == 1
