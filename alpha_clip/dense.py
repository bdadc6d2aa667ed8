"""Dense features: a plain CLIP read patch by patch, once an image, and pooled over regions.

In the last block each token looks at itself alone, so that what it has to say of its own place is
not mixed with the rest (the value path of "MaskCLIP", Zhou et al., arXiv 2112.01071; CLIPSelf,
arXiv 2310.01403, and FG-CLIP 2 measure so). Then the tower's own norm and projection are applied to
each patch as they are to the class token.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import roi_align

from alpha_clip.attention import find_blocks, setting
from alpha_clip.attention_masking import find_attentions, mask_as_taken, patch_size


def dense_features(
    visual: nn.Module, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch dim rows columns"]:
    """Return a feature of length 1 for each patch.

    Args:
        visual: An open_clip image tower whose features come from its class token; see
            `attending_to`.
        images: What the tower takes.

    Raises:
        ValueError: If the tower pools in another way or its attention takes no mask.
    """
    attends, layout = find_attentions(visual)
    home, blocks = find_blocks(visual)
    rows, columns = (s // p for s, p in zip(images.shape[2:], patch_size(visual), strict=True))

    def alone(attend: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        batch, tokens = args[0].shape[:2]
        others = ~torch.eye(tokens, dtype=torch.bool, device=args[0].device)
        mask = mask_as_taken(attend, others.expand(batch, -1, -1), args[0])
        return args, {**kwargs, "attn_mask": mask}

    def spread(_: nn.Module, args: Any, x: Tensor) -> Tensor:
        """Let each patch be the class token of a pass of its own, from here on."""
        return x[:, layout.prefix :].reshape(-1, 1, x.shape[-1])

    with ExitStack() as stack:
        stack.enter_context(setting(home, "grad_checkpointing", False))
        stack.enter_context(attends[-1].register_forward_pre_hook(alone, with_kwargs=True))
        stack.enter_context(blocks[len(blocks) - 1].register_forward_hook(spread))
        found = visual(images)
    features = F.normalize(found[0] if isinstance(found, tuple) else found, dim=-1)
    return features.view(len(images), rows, columns, -1).permute(0, 3, 1, 2)


def pool_masks(
    dense: Float[Tensor, "batch dim rows columns"], masks: Float[Tensor, "batch 1 height width"]
) -> Float[Tensor, "batch dim"]:
    """Return the mean feature under a mask for each image, of length 1.

    A patch counts by the share of it that is inside.

    Args:
        dense: What `dense_features` gives.
        masks: A region for each image, 0..1, in the pixels that the tower was given.
    """
    inside = F.adaptive_avg_pool2d(masks.float(), (dense.shape[2], dense.shape[3]))
    return F.normalize((dense * inside).sum((2, 3)), dim=-1)


def pool_boxes(
    dense: Float[Tensor, "batch dim rows columns"], masks: Float[Tensor, "batch 1 height width"]
) -> Float[Tensor, "batch dim"]:
    """Return the feature in the box around a mask for each image, by RoIAlign, of length 1.

    Args:
        dense: What `dense_features` gives.
        masks: As for `pool_masks`; the box is around what is 0.5 or more. Without any, the whole
            image is taken.
    """
    boxes = []
    for mask in masks[:, 0] >= 0.5:
        ys, xs = (mask if mask.any() else torch.ones_like(mask)).nonzero(as_tuple=True)
        boxes.append(torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])[None])
    scale = dense.shape[3] / masks.shape[3]
    places = [box.to(dense) for box in boxes]
    pooled: Tensor = roi_align(dense, places, 1, scale, aligned=True)[..., 0, 0]
    return F.normalize(pooled, dim=-1)
