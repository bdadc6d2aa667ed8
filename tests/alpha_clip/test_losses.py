import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from alpha_clip.losses import RegionContrastiveLoss


def batch(size: int, phrases: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    image = F.normalize(torch.randn(size, 8), dim=-1).requires_grad_()
    tokens = torch.randint(0, phrases, (size, 1)).repeat(1, 4)
    text = F.normalize(torch.randn(phrases, 8), dim=-1)[tokens[:, 0]]
    return image, text, tokens, torch.tensor(12.0)


def distinct(size: int) -> torch.Tensor:
    return torch.arange(size)[:, None].repeat(1, 4)


def by_hand(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: float,
    allowed: list[list[bool]],
    smoothing: float = 0.0,
) -> float:
    """The loss by its definition: one row, one column, one sum of exponentials at a time."""
    logits = (scale * image @ text.T).detach().tolist()
    size, total = len(logits), 0.0
    for rows in (logits, [list(column) for column in zip(*logits, strict=True)]):
        for i in range(size):
            kept = [j for j in range(size) if allowed[i][j]]
            norm = math.log(sum(math.exp(rows[i][j]) for j in kept))
            total += (1 - smoothing) * (norm - rows[i][i])
            total += smoothing * sum(norm - rows[i][j] for j in kept) / len(kept)
    return total / (2 * size)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("phrases", [2, 4, 50])
def test_equals_its_definition(phrases: int, smoothing: float) -> None:
    image, text, tokens, scale = batch(9, phrases)
    names = tokens[:, 0].tolist()
    allowed = [[i == j or a != b for j, b in enumerate(names)] for i, a in enumerate(names)]
    ours = RegionContrastiveLoss(smoothing)(image, text, tokens, scale)
    assert ours.item() == pytest.approx(by_hand(image, text, 12.0, allowed, smoothing), abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_equals_cross_entropy_when_nothing_is_masked(smoothing: float) -> None:
    image, text, tokens, scale = batch(9, 3)
    logits = scale * image @ text.T
    target = torch.arange(9)
    expected = sum(
        F.cross_entropy(x, target, label_smoothing=smoothing) for x in (logits, logits.T)
    )
    unmasked = RegionContrastiveLoss(smoothing, mask_false_negatives=False)
    everything_whole = unmasked(image, text, tokens, scale, torch.ones(9, dtype=torch.bool), 3)
    torch.testing.assert_close(everything_whole, expected / 2)
    ours = RegionContrastiveLoss(smoothing)(image, text, distinct(9), scale)
    torch.testing.assert_close(ours, expected / 2)


def test_equal_phrases_do_not_push_each_other_away() -> None:
    image, text, _, scale = batch(3, 3)
    tokens = torch.tensor([[1, 2], [1, 2], [1, 3]])
    RegionContrastiveLoss()(image, text.detach(), tokens, scale).backward()
    alone = image.detach().clone().requires_grad_()
    loss = RegionContrastiveLoss()
    moved = text.clone()
    moved[1] = -moved[1]  # what region 0 may not notice
    loss(alone, moved, tokens, scale).backward()
    assert torch.equal(image.grad[0], alone.grad[0])
    assert not torch.equal(image.grad[2], alone.grad[2])


def test_a_whole_image_is_no_negative_of_its_own_regions() -> None:
    """Rows 0..2 are picture A, 3..5 are B; row 1 is the whole of A."""
    image, text, _, scale = batch(6, 6)
    whole = torch.tensor([False, True, False, False, False, False])
    ours = RegionContrastiveLoss()(image, text, distinct(6), scale, whole, 3)
    allowed = [[True] * 6 for _ in range(6)]
    for region in (0, 2):
        allowed[1][region] = allowed[region][1] = False
    assert ours.item() == pytest.approx(by_hand(image, text, 12.0, allowed), abs=1e-5)


def test_regions_of_one_picture_are_negatives() -> None:
    image, text, _, scale = batch(4, 4)
    nothing_whole = torch.zeros(4, dtype=torch.bool)
    loss = RegionContrastiveLoss()
    torch.testing.assert_close(
        loss(image, text, distinct(4), scale, nothing_whole, 2),
        loss(image, text, distinct(4), scale),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_phrases_equal_gives_no_loss_and_no_nan(smoothing: float) -> None:
    image, text, tokens, scale = batch(5, 1)
    loss = RegionContrastiveLoss(smoothing)(image, text, tokens, scale)
    assert loss.item() == 0
    loss.backward()
    assert image.grad.isfinite().all()


def test_gradient_reaches_the_scale_and_both_towers() -> None:
    parts = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(5.0, requires_grad=True)
    RegionContrastiveLoss()(*parts, distinct(4), scale).backward()
    for tensor in (*parts, scale):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


def test_perfect_features_cost_next_to_nothing() -> None:
    features = torch.eye(5)
    loss = RegionContrastiveLoss()
    right = loss(features, features, distinct(5), torch.tensor(100.0))
    wrong = loss(features, features.roll(1, 0), distinct(5), torch.tensor(100.0))
    assert right.item() < 1e-6
    assert wrong.item() > 50


def test_one_process_gathers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, tokens, scale = batch(4, 4)
    alone = RegionContrastiveLoss()(image, text, tokens, scale)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert torch.equal(RegionContrastiveLoss()(image, text, tokens, scale), alone)
