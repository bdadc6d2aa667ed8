"""The benchmark of making shards, with two pictures and a SAM of 256 pixels."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import segment_anything
import torch
from test_sam import build_tiny_sam

from benchmarks import pipeline as whole
from benchmarks import pipeline_sam
from benchmarks.machine import forward_flops
from benchmarks.pipeline import by_groupby, by_loops, pipeline, rle_rows, stage_rows
from benchmarks.pipeline_sam import Rounds, box_rows, build, encoder_rows, mask_rows
from data_pipeline.segmenters.base import MaskPrediction
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.segmenters.sam_attention import FusedAttention, use_fused_attention
from data_pipeline.stage_benchmark import STAGES

TWICE = Rounds(2, "cpu", 0)
RATE = 1e10  # operations a second


@pytest.fixture
def tiny(monkeypatch):
    """Let `vit_b` mean the tiny SAM: the real one takes ten seconds an image."""
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", build_tiny_sam)
    monkeypatch.setattr(pipeline_sam, "matmul_rate", lambda device, dtype: RATE)


@pytest.fixture
def sam(tiny):
    return build("vit_b", 256, "cpu")


def by_variant(rows, case):
    return {row.variant: row for row in rows if case in row.case}


def test_table_and_picture_of_all_that_is_timed(tiny, tmp_path, capsys):
    output = tmp_path / "new" / "pipeline.csv"
    options = {"image_size_px": 128, "pictures": 2, "boxes": 3, "grabcut": False, "compile": False}
    rows = pipeline(rounds=2, sam="vit_b", budget_s=0, output=output, **options)
    with output.open() as stream:
        written = list(csv.DictReader(stream))
    assert [(w["case"], w["variant"]) for w in written] == [(r.case, r.variant) for r in rows]
    assert output.with_suffix(".png").stat().st_size > 10_000
    cases = list(dict.fromkeys(row.case for row in rows))
    assert cases == [
        "box segmenter, each picture",
        "encoding 4 masks of 640 x 480",
        "decoding 4 masks of 640 x 480",
        "encoding 4 masks of 1024 x 768",
        "decoding 4 masks of 1024 x 768",
        "vit_b's encoder, 128 px, 1 at a time",
        "2 masks of 32 px enlarged, filtered",
        "3 boxes on an embedding",
    ]
    assert all(row.rounds == 2 for row in rows)
    assert "encoder's operations" in capsys.readouterr().out


def test_without_sam_its_package_is_not_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline_sam, "build", None)
    monkeypatch.setattr(whole, "stage_rows", lambda *_: [])
    rows = pipeline(rounds=2, sam="none", output=tmp_path / "pipeline.csv")
    assert {row.case.split()[0] for row in rows} == {"encoding", "decoding"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 1}, "rounds must be at least 2, got 1"),
        ({"pictures": 0}, "pictures must be at least 1, got 0"),
        ({"boxes": 0}, "boxes must be at least 1, got 0"),
        ({"device": "abacus"}, "device must be auto, cpu, cuda"),
    ],
)
def test_nonsense_is_refused_before_any_work(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        pipeline(**options, output=tmp_path / "pipeline.csv")
    assert not list(tmp_path.iterdir())


class Fast(BoxSegmenter):
    """Another box segmenter."""


def test_shares_of_the_stages_make_the_whole():
    rows = stage_rows({"box": BoxSegmenter(), "fast": Fast()}, pictures=2, rounds=2)
    assert [row.variant for row in rows[:2]] == ["box", "fast"]
    for name in ("box", "fast"):
        shares = by_variant(rows, f"{name}, each picture")
        assert list(shares) == ["all stages", *STAGES]
        assert shares.pop("all stages").ratio == 1
        # With two rounds a median is a mean, and means add up.
        assert sum(row.ratio for row in shares.values()) == pytest.approx(1)
        assert all(row.ratio > 0 for row in shares.values())
    assert rows[0].milliseconds == by_variant(rows, "box, each")["all stages"].milliseconds
    assert rows[0].per_second == pytest.approx(1000 / rows[0].milliseconds)


class Failing(BoxSegmenter):
    """Finds nothing."""

    def segment(self, rgb, boxes_xyxy_px):
        return [MaskPrediction(np.zeros(rgb.shape[:2], bool)) for _ in boxes_xyxy_px]


def test_rejected_pictures_are_no_figures():
    with pytest.raises(ValueError, match="expected 1 pictures in the shard, got 0"):
        stage_rows({"failing": Failing()}, pictures=1, rounds=2)


@pytest.mark.parametrize("shape", [(7, 5), (60, 1), (1, 1), (480, 640)])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999, 1.0])
def test_pythons_own_ways_are_right(shape, share):
    mask = np.random.default_rng(0).random(shape) < share
    runs = by_groupby(mask)
    assert sum(runs["counts"]) == mask.size
    assert sum(runs["counts"][1::2]) == mask.sum()
    np.testing.assert_array_equal(by_loops(whole.encode_rle(mask)), mask)


def test_a_wrong_encoder_is_refused(monkeypatch):
    monkeypatch.setattr(whole, "encode_rle", lambda mask: by_groupby(mask.T))
    with pytest.raises(ValueError, match="encode_rle gives other runs than groupby"):
        rle_rows(rounds=2)


def test_a_wrong_decoder_is_refused(monkeypatch):
    monkeypatch.setattr(whole, "decode_rle", lambda rle: ~by_loops(rle))
    with pytest.raises(ValueError, match="decode_rle gives another mask"):
        rle_rows(rounds=2)


def test_encoders_run_on_the_same_weights_and_leave_them(sam, monkeypatch):
    seen = []

    def compiled(tower, dynamic):
        seen.append(tower)
        return tower

    monkeypatch.setattr(torch, "compile", compiled)
    before = list(sam.image_encoder.parameters())
    rows = encoder_rows("tiny", sam, TWICE)
    assert [row.variant for row in rows] == [
        "segment-anything, fp32",
        "ours, fp32",
        "ours, compiled, fp32",
    ]
    assert all(a is b for a, b in zip(seen[0].parameters(), before, strict=True))
    assert all(isinstance(block.attn, FusedAttention) for block in seen[0].blocks)
    assert not any(isinstance(block.attn, FusedAttention) for block in sam.image_encoder.blocks)
    flops = forward_flops(sam.image_encoder, torch.zeros(1, 3, 256, 256))
    assert flops > 256 * 2 * 32 * 3 * 16**2  # the patches alone
    for row in rows:
        assert row.of_floor == pytest.approx(1000 * flops / RATE / row.milliseconds)


def test_an_attention_without_positions_is_refused(sam, monkeypatch):
    def without_rows(encoder):
        for block in encoder.blocks:
            block.attn.rel_pos_h = torch.nn.Parameter(0 * block.attn.rel_pos_h)
        use_fused_attention(encoder)

    monkeypatch.setattr(pipeline_sam, "use_fused_attention", without_rows)
    with pytest.raises(ValueError, match="ours, fp32: expected the first way's features within"):
        encoder_rows("tiny", sam, TWICE, compile=False)


def test_what_does_not_fit_into_memory_is_left_out(sam, monkeypatch, capsys):
    def small(images, tower, dtype):
        if tower is sam.image_encoder:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tower(images)

    monkeypatch.setattr(pipeline_sam, "_encode", small)
    (row,) = encoder_rows("tiny", sam, TWICE, compile=False)
    assert (row.variant, row.ratio) == ("ours, fp32", 1)
    assert "segment-anything, fp32: left out" in capsys.readouterr().out


def test_masks_are_enlarged_as_the_package_does(sam):
    rows = mask_rows(sam, 3, TWICE)
    assert [row.variant for row in rows] == [
        "segment-anything, one by one",
        "ours, one by one",
        "ours, 32 at a time",
    ]


@pytest.mark.parametrize("change", ["mask", "iou", "stability"])
def test_other_masks_are_refused(sam, monkeypatch, change):
    right = pipeline_sam.package_masks

    def wrong(*arguments):
        masks = right(*arguments)
        value = getattr(masks[1], change)
        masks[1] = replace(masks[1], **{change: ~value if change == "mask" else value + 0.02})
        return masks

    monkeypatch.setattr(pipeline_sam, "package_masks", wrong)
    with pytest.raises(ValueError, match="ours, one by one: expected the first way's mask 1"):
        mask_rows(sam, 3, TWICE)


def test_boxes_go_in_chunks_and_the_encoder_is_left_out(sam, monkeypatch):
    sizes = []
    decode = pipeline_sam.SamSegmenter.decode

    def watched(self, embedding, boxes, size):
        sizes.append(len(boxes))
        return decode(self, embedding, boxes, size)

    monkeypatch.setattr(pipeline_sam.SamSegmenter, "decode", watched)
    monkeypatch.setattr(sam.image_encoder, "forward", None)
    rows = box_rows(sam, 17, TWICE)
    assert [row.variant for row in rows] == list(pipeline_sam._CHUNKS)
    assert sizes[: 17 + 5 + 2 + 1] == [1] * 17 + [4] * 4 + [1, 16, 1, 17]
    assert all(row.per_second for row in rows)


@pytest.mark.parametrize("side", [8, 250, 512])
def test_an_image_the_encoder_cannot_see_is_refused(tiny, side):
    with pytest.raises(ValueError, match=f"multiple of 16 up to 256, got {side}"):
        build("vit_b", side, "cpu")
