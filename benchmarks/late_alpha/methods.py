"""What is compared: where alpha enters and how, beside peers that read an image once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from alpha_clip import AlphaEntry, create_model
from alpha_clip.attention import find_blocks
from alpha_clip.evaluation.focus_baselines import ATTENTION_MASK, MASK_POOLED
from benchmarks.focus.methods import Method

AS_IT_IS = [
    Method("CLIP, whole image", "no alpha"),
    Method("CLIP, attention mask", ATTENTION_MASK),
    Method("CLIP, mask pooling", MASK_POOLED),
]
# Trained on the same regions, but what it sees of each is the whole image.
UNTRAINED_IN_ALPHA = Method(
    "tuned without alpha",
    "no alpha",
    {"model.trainable.alpha": "false"},
    (ATTENTION_MASK, MASK_POOLED),
)


@dataclass(frozen=True)
class Entry:
    """Alpha somewhere, as a method of the study.

    Attributes:
        at: Where it enters, and how.
    """

    at: AlphaEntry

    @property
    def name(self) -> str:
        """What it is called in the table."""
        if self.at.is_first_layer:
            return "first layer"
        kinds = [word for word in ("repeat", "summary") if getattr(self.at, word)]
        how = {0: ", once", 1: f", {''.join(kinds)} alone", 2: ""}[len(kinds)]
        return f"block {self.at.block}{how}"

    @property
    def method(self) -> Method:
        """How it is trained and shown regions."""
        return Method(
            self.name, "alpha", {"model.encoder.alpha_block": json.dumps(asdict(self.at))}
        )


def entries(blocks: Sequence[int], parts_at: Sequence[int]) -> list[Entry]:
    """Return what is trained: the paper's entry, alpha in front of each block, and its parts.

    Args:
        blocks: Where alpha enters with everything that helps.
        parts_at: Where it also enters once, with repetition alone, and with the summary alone.
    """
    parts = [(False, False), (True, False), (False, True)]
    found = [AlphaEntry.of(0), *(AlphaEntry(block) for block in blocks)]
    found += [AlphaEntry(block, *part) for block in parts_at for part in parts]
    return [Entry(at) for at in found]


def blocks_of(base: str, blocks: Sequence[int] | None) -> list[int]:
    """Return the blocks that were asked for, or all that the base's tower has.

    Raises:
        ValueError: If it has no such block.
    """
    count = len(find_blocks(create_model(checkpoint=base)[0].visual)[1])
    asked = list(range(count)) if blocks is None else list(blocks)
    if wrong := [block for block in asked if not 0 <= block < count]:
        raise ValueError(f"the tower of {base} has the blocks 0..{count - 1}, not {wrong}")
    return asked
