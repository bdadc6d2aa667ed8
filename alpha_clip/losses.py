"""Losses between regions and phrases: CLIP's softmax and SigLIP's sigmoid, over all processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Pairs:
    """Regions with their phrases, row by row.

    Attributes:
        image: Features of regions, of length 1.
        text: Features of their phrases, of length 1.
        phrase_ids: A number for each phrase; equal numbers are equal phrases.
        image_ids: A number for the picture that each region belongs to.
        whole: Which rows are whole pictures with their captions.
    """

    image: Float[Tensor, "batch dim"]
    text: Float[Tensor, "batch dim"]
    phrase_ids: Int[Tensor, " batch"]
    image_ids: Int[Tensor, " batch"]
    whole: Bool[Tensor, " batch"]

    def gathered(self, gradient: bool) -> Pairs:
        """Return the rows of all processes, in order.

        Args:
            gradient: Whether a loss on them reaches the processes that the rows come from.
        """
        from open_clip.loss import gather_features

        image, text, ids = self.image, self.text, (self.phrase_ids, self.image_ids, self.whole)
        if (world := _world()) > 1:
            image, text = gather_features(
                image.contiguous(),
                text.contiguous(),
                local_loss=True,  # without it, one's own rows would get a gradient after all
                gather_with_grad=gradient,
                rank=dist.get_rank(),
                world_size=world,
            )
            ids = (_gather(self.phrase_ids), _gather(self.image_ids), _gather(self.whole))
        if not gradient:
            image, text = image.detach(), text.detach()
        return Pairs(image, text, *ids)

    def contradict(self, others: Pairs) -> Bool[Tensor, "batch others"]:
        """Say which rows are negatives of which others.

        Two regions called "a red star" do not contradict each other, nor does a whole picture
        contradict the phrases of its own regions.
        """
        same_phrase = self.phrase_ids[:, None] == others.phrase_ids
        same_picture = self.image_ids[:, None] == others.image_ids
        return ~(same_phrase | same_picture & (self.whole[:, None] | others.whole))


class RegionLoss(nn.Module, ABC):
    """What training minimises. Over several processes, its gradient is the joined batch's."""

    @abstractmethod
    def forward(
        self, pairs: Pairs, logit_scale: Float[Tensor, ""], logit_bias: Float[Tensor, ""] | None
    ) -> Float[Tensor, ""]:
        """Return the loss of this process's rows; the mean over the processes is minimised.

        Args:
            pairs: This process's rows.
            logit_scale: What cosines are multiplied with, above 0.
            logit_bias: What is then added, for models that have it.
        """


class RegionContrastiveLoss(RegionLoss):
    """CLIP's symmetric cross entropy, without the negatives that are none.

    Args:
        label_smoothing: As in `cross_entropy`; the published script uses 0.1.
        mask_false_negatives: Whether pairs that do not contradict each other are left out (see
            `Pairs.contradict`); with short phrases and several regions a picture they are in every
            batch. The published script keeps them.
        local_loss: Whether each process compares its own rows alone with everyone's: the same
            gradient, and a fraction of the memory.
        gather_gradient: Whether features of other processes carry a gradient. The published
            script's do not, on any number of processes: with a frozen text tower only the
            image-to-text half of its loss then trains. Needs `local_loss`.

    Raises:
        ValueError: If the options contradict each other.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        mask_false_negatives: bool = True,
        local_loss: bool = True,
        gather_gradient: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"expected a label_smoothing in 0..1, got {label_smoothing}")
        if not (gather_gradient or local_loss):
            raise ValueError("without gather_gradient and local_loss nothing would train")
        self.label_smoothing = label_smoothing
        self.mask_false_negatives = mask_false_negatives
        self.local_loss = local_loss
        self.gather_gradient = gather_gradient

    def forward(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean of the image-to-text and the text-to-image loss; see `RegionLoss`."""
        everyone = pairs.gathered(self.gather_gradient)
        rows, target = pairs, _own_columns(pairs)
        if not self.local_loss:
            rows, target = everyone, torch.arange(len(everyone.image), device=target.device)
        contradict = rows.contradict(everyone) if self.mask_false_negatives else None
        losses = []
        for ours, theirs in ((rows.image, everyone.text), (rows.text, everyone.image)):
            logits = logit_scale.float() * _similarity(ours, theirs)
            losses.append(self._cross_entropy(logits, target, contradict))
        return (losses[0] + losses[1]) / 2

    def _cross_entropy(self, logits: Tensor, target: Tensor, contradict: Tensor | None) -> Tensor:
        """Cross entropy of each row with its target, over that and the negatives alone."""
        if contradict is None:
            return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        allowed = contradict.scatter(1, target[:, None], True)
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        if not self.label_smoothing:
            return F.cross_entropy(logits, target)
        # cross_entropy's own smoothing would count what is masked.
        log_p = F.log_softmax(logits, dim=-1)
        right = -log_p.gather(1, target[:, None])[:, 0]
        spread = -log_p.masked_fill(~allowed, 0.0).sum(-1) / allowed.sum(-1)
        return ((1 - self.label_smoothing) * right + self.label_smoothing * spread).mean()


class RegionSigmoidLoss(RegionLoss):
    """SigLIP's pairwise sigmoid loss (arXiv 2303.15343), without the negatives that are none.

    Args:
        mask_false_negatives: Whether pairs that do not contradict each other are left out.
    """

    def __init__(self, mask_false_negatives: bool = True) -> None:
        super().__init__()
        self.mask_false_negatives = mask_false_negatives

    def forward(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the sum over a region's pairs, averaged over regions; see `RegionLoss`."""
        everyone = pairs.gathered(gradient=True)
        logits = logit_scale.float() * _similarity(pairs.image, everyone.text)
        if logit_bias is not None:
            logits = logits + logit_bias.float()
        sign = torch.full_like(logits, -1).scatter(1, _own_columns(pairs)[:, None], 1.0)
        losses = -F.logsigmoid(sign * logits)
        if self.mask_false_negatives:
            losses = losses.masked_fill(~(pairs.contradict(everyone) | (sign > 0)), 0.0)
        return losses.sum() / len(logits)


def _similarity(rows: Tensor, columns: Tensor) -> Tensor:
    """Return cosines in fp32: 100 times a cosine in bf16 would be off by up to 0.4."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows.float() @ columns.float().T


def _own_columns(rows: Pairs) -> Tensor:
    """Say where this process's rows are among everyone's."""
    first = dist.get_rank() * len(rows.image) if _world() > 1 else 0
    return torch.arange(first, first + len(rows.image), device=rows.image.device)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(numbers: Tensor) -> Tensor:
    parts = [torch.empty_like(numbers) for _ in range(_world())]
    dist.all_gather(parts, numbers.contiguous())
    return torch.cat(parts)
