"""The regions of some pictures, as each way of pointing shows them to a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from alpha_clip.evaluation.focus_baselines import FOCUS, Focus, Mask
from alpha_clip.evaluation.labelled import LabelledPicture
from alpha_clip.regions import Region, decode_rle
from alpha_clip.transforms import RegionTransform

SHUFFLED = "shuffled alpha"
WRONG_OBJECT = "alpha of another object"
INVERTED = "inverted alpha"
ALPHA_ONLY = "alpha only"
CONTROLS = [SHUFFLED, WRONG_OBJECT, INVERTED, ALPHA_ONLY]


class RegionViews:
    """The regions of some pictures, as each way of pointing shows them to the model.

    A picture is resized once for all its regions, and passed once where all of them look the same.

    Args:
        pictures: The pictures; at least two, for the control that swaps alphas between them.
        transform: Makes tensors of them.
    """

    def __init__(self, pictures: list[LabelledPicture], transform: RegionTransform) -> None:
        self.transform = transform
        self.pictures = pictures
        self.owner = [i for i, picture in enumerate(pictures) for _ in picture.regions]
        self.labels = [region.label for picture in pictures for region in picture.regions]
        self._masks = [[decode_rle(region.rle) for region in p.regions] for p in pictures]

    def all(self, ways: list[str], controls: bool = True) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, views and whose view is which, for each way; behind `alpha` its controls.

        Yields:
            `name, rgba [views, 4, H, W], view [regions]`: the number of each region's view.
        """
        for name in ways:
            rgba, view = self._points(FOCUS[name])
            yield name, rgba, view
            if name == "alpha" and controls:
                rgba = rgba[view]
                yield from (
                    (n, control, torch.arange(len(rgba))) for n, control in self._controls(rgba)
                )

    def _points(self, focus: Focus) -> tuple[Tensor, Tensor]:
        views: list[Tensor] = []
        view: list[int] = []
        for picture, masks in zip(self.pictures, self._masks, strict=True):
            boxes = [region.box for region in picture.regions]
            shown = focus.show_all(picture.image, masks, boxes)
            if not shown:
                continue
            marks = [marked for _, marked in shown]
            if any(image is not picture.image for image, _ in shown):
                each = zip(shown, masks, strict=True)
                new = [self._marked(image, [mark], [mask])[0] for (image, mark), mask in each]
            elif all(mark is None for mark in marks) and self.transform.geometry != "crop_box":
                view += len(marks) * [len(views)]
                views.append(self.transform(picture.image))
                continue
            else:
                new = list(self._marked(picture.image, marks, masks))
            view += range(len(views), len(views) + len(new))
            views += new
        return torch.stack(views), torch.tensor(view)

    def _marked(
        self, image: Image.Image, marks: Sequence[Region], masks: Sequence[Mask]
    ) -> Float[Tensor, "regions 4 height width"]:
        """Resize an image once; a window around a region is cut also where alpha shows none."""
        whole = image.size == masks[0].shape[::-1]  # not a crop already
        blind = self.transform.geometry == "crop_box" and whole and all(m is None for m in marks)
        rgba = self.transform.stack(image, masks if blind else marks)
        if blind:
            rgba[:, 3] = self.transform.normalisation.whole_image
        return rgba

    def _controls(self, rgba: Tensor) -> Iterator[tuple[str, Tensor]]:
        rgb, alpha = rgba[:, :3], rgba[:, 3:]
        another_image, another_object = self._others()
        yield SHUFFLED, torch.cat([rgb, alpha[another_image]], 1)
        yield WRONG_OBJECT, torch.cat([rgb, alpha[another_object]], 1)
        normal = self.transform.normalisation
        yield INVERTED, torch.cat([rgb, (1 - 2 * normal.alpha_mean) / normal.alpha_std - alpha], 1)
        yield ALPHA_ONLY, torch.cat([torch.zeros_like(rgb), alpha], 1)  # 0 is the mean colour

    def _others(self) -> tuple[list[int], list[int]]:
        """Return whose alpha each region gets: of another image, of another object in its own."""
        count = len(self.owner)
        another_image, another_object = [], []
        for place, image in enumerate(self.owner):
            away = ((place + step) % count for step in range(count // 2, count + count // 2))
            another_image.append(next((q for q in away if self.owner[q] != image), place))
            near = ((place + step) % count for step in range(1, count))
            another_object.append(next((q for q in near if self.owner[q] == image), place))
        return another_image, another_object
