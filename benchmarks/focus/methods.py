"""What is compared: ways of pointing a CLIP as it is, and ways of training one."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: What it is called there.
        way: How a region is shown to the model: a key of `focus_baselines.FOCUS`.
        options: What its training changes of `alpha.yaml`; `None` is the base as it is.
        others: Ways to show a region to the same trained model beside `way`.
    """

    name: str
    way: str
    options: dict[str, object] | None = field(default=None)
    others: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """Its name as a folder."""
        return self.name.replace(",", "").replace(" ", "-")


AS_IT_IS = [
    Method("CLIP, whole image", "no alpha"),
    Method("CLIP, crop", "crop"),
    Method("CLIP, masked crop", "masked crop"),
    Method("CLIP, red circle", "red circle"),
    Method("CLIP, blur", "blur"),
    Method("CLIP, attention mask", "attention mask"),
]
TRAINED = [
    Method("tuned without alpha", "no alpha", {"model.trainable.alpha": "false"}),
    Method("alpha conv only", "alpha", {"model.trainable.visual": "false"}),
    Method("last block", "alpha", {"model.trainable.last_blocks": 1}),
    Method("LoRA, rank 8", "alpha", {"model.trainable.lora": "{rank: 8, alpha: 16.0}"}),
    Method(
        "all blocks, one region an image",
        "alpha",
        {"data.sampling.regions_per_image": 1, "data.batch_size": 32},
    ),
    Method("all blocks", "alpha", {}),
]
