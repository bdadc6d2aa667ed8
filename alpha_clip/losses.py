"""The contrastive loss between regions and their phrases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class RegionContrastiveLoss(nn.Module):
    """CLIP's symmetric loss, without the negatives that are none.

    Two regions called "a red star" do not contradict each other, nor does a whole picture
    contradict the phrases of its own regions; with short phrases and several regions a picture,
    both happen in every batch. The gathered features of all processes carry a gradient.

    Args:
        label_smoothing: As in `cross_entropy`; the published script uses 0.1.
        mask_false_negatives: Whether such pairs are taken out. The published script keeps them.
    """

    def __init__(self, label_smoothing: float = 0.0, mask_false_negatives: bool = True) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.mask_false_negatives = mask_false_negatives

    def forward(
        self,
        image_features: Float[Tensor, "batch dim"],
        text_features: Float[Tensor, "batch dim"],
        tokens: Int[Tensor, "batch context"],
        logit_scale: Float[Tensor, ""],
        whole: Bool[Tensor, " batch"] | None = None,
        regions_per_image: int = 1,
    ) -> Float[Tensor, ""]:
        """Return the mean of the image-to-text and the text-to-image loss.

        Args:
            image_features: Features of regions, of length 1.
            text_features: Features of their phrases, of length 1.
            tokens: The phrases' tokens; equal rows are equal phrases.
            logit_scale: What cosines are multiplied with, above 0.
            whole: Which rows are whole images with their captions; `None` means none.
            regions_per_image: How many neighbouring rows belong to one picture.
        """
        image_features, text_features, tokens = (
            _gather(t) for t in (image_features, text_features, tokens)
        )
        logits = logit_scale * image_features @ text_features.T
        allowed = torch.ones_like(logits, dtype=torch.bool)
        if self.mask_false_negatives:
            phrase = torch.unique(tokens, dim=0, return_inverse=True)[1]
            allowed &= phrase[:, None] != phrase[None, :]
            if whole is not None:
                whole = _gather(whole)
                picture = torch.arange(len(logits), device=logits.device) // regions_per_image
                same_picture = picture[:, None] == picture[None, :]
                allowed &= ~(same_picture & (whole[:, None] | whole[None, :]))
            allowed.fill_diagonal_(True)
        return (self._one_way(logits, allowed) + self._one_way(logits.T, allowed)) / 2

    def _one_way(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """Cross entropy of each row with its diagonal, over the allowed columns alone."""
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        log_p = F.log_softmax(logits, dim=-1)
        loss = -log_p.diagonal()
        if self.label_smoothing:
            spread = -log_p.masked_fill(~allowed, 0.0).sum(-1) / allowed.sum(-1)
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * spread
        return loss.mean()


def _gather(tensor: Tensor) -> Tensor:
    """Join a tensor over all processes; floating ones keep their gradient."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    if torch.distributed.get_world_size() == 1:
        return tensor
    if tensor.is_floating_point():
        from torch.distributed.nn.functional import all_gather as all_gather_with_gradient

        return torch.cat(all_gather_with_gradient(tensor))
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor)
    return torch.cat(parts)
