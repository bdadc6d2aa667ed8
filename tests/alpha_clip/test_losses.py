import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import multiprocessing as mp

from alpha_clip.losses import Pairs, RegionContrastiveLoss, RegionLoss, RegionSigmoidLoss

SCALE = torch.tensor(12.0)


def pairs(size: int, phrases: int, regions: int = 1, whole: tuple[int, ...] = ()) -> Pairs:
    """Random features of `size` rows; `phrases` different phrases, `regions` rows a picture."""
    image = F.normalize(torch.randn(size, 8), dim=-1).requires_grad_()
    ids = torch.randint(0, phrases, (size,)) if phrases < size else torch.arange(size)
    text = F.normalize(torch.randn(max(phrases, size), 8), dim=-1)[ids]
    flags = torch.zeros(size, dtype=torch.bool)
    flags[list(whole)] = True
    return Pairs(image, text, ids, torch.arange(size) // regions, flags)


def allowed(p: Pairs) -> list[list[bool]]:
    """Which columns each row may see, one pair at a time."""
    ids, pictures, whole = p.phrase_ids.tolist(), p.image_ids.tolist(), p.whole.tolist()
    size = range(len(ids))
    return [
        [
            i == j
            or (ids[i] != ids[j] and not (pictures[i] == pictures[j] and (whole[i] or whole[j])))
            for j in size
        ]
        for i in size
    ]


def by_hand(p: Pairs, smoothing: float = 0.0) -> float:
    """The softmax loss by its definition: one row, one sum of exponentials at a time."""
    logits = (SCALE * p.image @ p.text.T).detach().tolist()
    size, total = len(logits), 0.0
    for rows in (logits, [list(column) for column in zip(*logits, strict=True)]):
        for i in range(size):
            kept = [j for j in range(size) if allowed(p)[i][j]]
            norm = math.log(sum(math.exp(rows[i][j]) for j in kept))
            total += (1 - smoothing) * (norm - rows[i][i])
            total += smoothing * sum(norm - rows[i][j] for j in kept) / len(kept)
    return total / (2 * size)


def sigmoid_by_hand(p: Pairs, bias: float) -> float:
    logits = (SCALE * p.image @ p.text.T + bias).detach().tolist()
    size, total = len(logits), 0.0
    for i in range(size):
        for j in range(size):
            if allowed(p)[i][j]:
                total += math.log1p(math.exp(-logits[i][j] if i == j else logits[i][j]))
    return total / size


@pytest.mark.parametrize("local_loss", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("phrases", [2, 4, 9])
def test_softmax_equals_its_definition(phrases: int, smoothing: float, local_loss: bool) -> None:
    p = pairs(9, phrases, 3, whole=(1, 8))
    ours = RegionContrastiveLoss(smoothing, local_loss=local_loss)(p, SCALE)
    assert ours.item() == pytest.approx(by_hand(p, smoothing), abs=1e-5)


@pytest.mark.parametrize("bias", [0.0, -10.0])
@pytest.mark.parametrize("phrases", [2, 9])
def test_sigmoid_equals_its_definition(phrases: int, bias: float) -> None:
    p = pairs(9, phrases, 3, whole=(1, 8))
    ours = RegionSigmoidLoss()(p, SCALE, torch.tensor(bias))
    assert ours.item() == pytest.approx(sigmoid_by_hand(p, bias), rel=1e-5)


def test_unmasked_losses_are_open_clips() -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    p = pairs(9, 3, 3, whole=(0, 1, 2))
    bias = torch.tensor(-3.0)
    clip = RegionContrastiveLoss(mask_false_negatives=False)(p, SCALE)
    torch.testing.assert_close(clip, ClipLoss()(p.image, p.text, SCALE))
    siglip = RegionSigmoidLoss(mask_false_negatives=False)(p, SCALE, bias)
    torch.testing.assert_close(siglip, SigLipLoss()(p.image, p.text, SCALE, bias))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_is_cross_entropys_when_nothing_is_masked(smoothing: float) -> None:
    p = pairs(9, 9)
    logits = SCALE * p.image @ p.text.T
    target = torch.arange(9)
    expected = sum(
        F.cross_entropy(x, target, label_smoothing=smoothing) for x in (logits, logits.T)
    )
    for masks in (True, False):
        ours = RegionContrastiveLoss(smoothing, mask_false_negatives=masks)(p, SCALE)
        torch.testing.assert_close(ours, expected / 2)


@pytest.mark.parametrize("loss", [RegionContrastiveLoss(), RegionSigmoidLoss()])
def test_equal_phrases_do_not_push_each_other_away(loss: RegionLoss) -> None:
    p = pairs(3, 3)
    p = Pairs(p.image, p.text, torch.tensor([1, 1, 2]), p.image_ids, p.whole)
    loss(p, SCALE, None).backward()
    image, text = p.image.detach().clone().requires_grad_(), p.text.clone()
    text[1] = -text[1]  # what region 0 may not notice
    loss(Pairs(image, text, p.phrase_ids, p.image_ids, p.whole), SCALE, None).backward()
    assert torch.equal(p.image.grad[0], image.grad[0])
    assert not torch.equal(p.image.grad[2], image.grad[2])


def test_what_contradicts_what() -> None:
    """Rows 0..2 are picture A, 3..5 are B; row 1 is the whole of A; 2 and 5 say the same."""
    p = pairs(6, 6, 3, whole=(1,))
    p.phrase_ids[5] = p.phrase_ids[2]
    contradict = p.contradict(p)
    assert not contradict.diagonal().any()
    no = {(i, j) for i, j in (~contradict).nonzero().tolist() if i != j}
    assert no == {(0, 1), (1, 0), (1, 2), (2, 1), (2, 5), (5, 2)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_phrases_equal_gives_no_loss_and_no_nan(smoothing: float) -> None:
    p = pairs(5, 1)
    loss = RegionContrastiveLoss(smoothing)(p, SCALE)
    assert loss.item() == 0
    loss.backward()
    assert p.image.grad.isfinite().all()


@pytest.mark.parametrize("loss", [RegionContrastiveLoss(), RegionSigmoidLoss()])
def test_a_batch_of_one_is_finite(loss: RegionLoss) -> None:
    value = loss(pairs(1, 1), SCALE, torch.tensor(-10.0))
    assert value.isfinite()


@pytest.mark.parametrize("loss", [RegionContrastiveLoss(), RegionSigmoidLoss()])
def test_gradient_reaches_the_scale_and_both_towers(loss: RegionLoss) -> None:
    parts = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    scale, bias = torch.tensor(5.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    ids = torch.arange(4)
    loss(Pairs(*parts, ids, ids, torch.zeros(4, dtype=torch.bool)), scale, bias).backward()
    learns = (*parts, scale, bias) if isinstance(loss, RegionSigmoidLoss) else (*parts, scale)
    for tensor in learns:
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


def test_bf16_features_are_compared_in_fp32() -> None:
    p = pairs(9, 9)
    half = Pairs(p.image.bfloat16(), p.text.bfloat16(), p.phrase_ids, p.image_ids, p.whole)
    exact = Pairs(half.image.float(), half.text.float(), p.phrase_ids, p.image_ids, p.whole)
    hundred = torch.tensor(100.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = RegionContrastiveLoss()(half, hundred)
    torch.testing.assert_close(ours, RegionContrastiveLoss()(exact, hundred))


def test_without_gathered_gradient_only_image_to_text_trains() -> None:
    """The published script: its frozen text tower leaves nothing of the other half."""
    p = pairs(9, 9)
    loss = RegionContrastiveLoss(mask_false_negatives=False, gather_gradient=False)
    whole = RegionContrastiveLoss(mask_false_negatives=False)
    torch.testing.assert_close(loss(p, SCALE), whole(p, SCALE))
    (ours,) = torch.autograd.grad(loss(p, SCALE), p.image)
    half = F.cross_entropy(SCALE * p.image @ p.text.T, torch.arange(9)) / 2
    torch.testing.assert_close(ours, torch.autograd.grad(half, p.image)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing in 0..1, got 1.0"),
        ({"gather_gradient": False, "local_loss": False}, "nothing would train"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegionContrastiveLoss(**options)


LOSSES = {
    "local": RegionContrastiveLoss(0.1),
    "global": RegionContrastiveLoss(0.1, local_loss=False),
    "unmasked": RegionContrastiveLoss(mask_false_negatives=False),
    "sigmoid": RegionSigmoidLoss(),
}


def tower_and_batch() -> tuple[torch.nn.Linear, torch.nn.Linear, dict[str, torch.Tensor]]:
    """Two towers and a batch of 8 rows; phrases repeat across the halves that two processes get."""
    torch.manual_seed(0)
    towers = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)
    ids = torch.tensor([0, 1, 2, 3, 0, 4, 3, 5])
    batch = {
        "image": torch.randn(8, 6),
        "text": torch.randn(8, 6),
        "ids": ids,
        "pictures": torch.arange(8) // 2,
        "whole": torch.tensor([0, 1, 0, 0, 0, 0, 1, 0], dtype=torch.bool),
    }
    return *towers, batch


def gradients(loss: RegionLoss, rank: int, world: int) -> list[torch.Tensor]:
    """A step of DistributedDataParallel (or none, alone) on one process's part of the batch."""
    visual, textual, batch = tower_and_batch()
    scale = torch.nn.Parameter(torch.tensor(2.0))
    mine = {name: part.chunk(world)[rank] for name, part in batch.items()}
    image = F.normalize(visual(mine["image"]), dim=-1)
    text = F.normalize(textual(mine["text"]), dim=-1)
    rows = Pairs(image, text, mine["ids"], mine["pictures"], mine["whole"])
    loss(rows, scale.exp(), torch.tensor(-2.0)).backward()
    grads = [p.grad for p in (*visual.parameters(), *textual.parameters(), scale)]
    if world > 1:
        for gradient in grads:  # what DistributedDataParallel does
            torch.distributed.all_reduce(gradient)
            gradient /= world
    return grads


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    result = {name: gradients(loss, rank, world) for name, loss in LOSSES.items()}
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_the_joined_batch(tmp_path: Path) -> None:
    mp.spawn(_process, (2, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, loss in LOSSES.items():
            for ours, alone in zip(found[name], gradients(loss, 0, 1), strict=True):
                torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6, msg=name)
                assert alone.abs().max() > 0
