"""Texts: the whole context, and the batch cut to its longest text."""

from __future__ import annotations

from pathlib import Path

import torch

from alpha_clip import create_model
from benchmarks.table import report
from benchmarks.timing import Row, compare

LABELS = ("dog", "fire engine", "wooden spoon", "purple dress", "bouquet of pink flowers")


def text(
    architecture: str = "ViT-B-16",
    count: int = 64,
    rounds: int = 7,
    device: str = "cpu",
    output: Path = Path("runs/benchmarks/text.csv"),
) -> list[Row]:
    """Embed `a photo of a ...` with open_clip's own encoder and with ours; open_clip's is 1.

    Args:
        architecture: An open_clip architecture with a causal text tower.
        count: Texts in the batch.
        rounds: How often to measure.
        device: Where to run.
        output: CSV file for the table.
    """
    model, _, tokenizer = create_model(architecture, device=device)
    tokens = tokenizer([f"a photo of a {LABELS[i % len(LABELS)]}." for i in range(count)])
    tokens = tokens.to(device)
    with torch.inference_mode():
        rows = compare(
            f"{architecture}, {count} texts",
            {
                "whole context": lambda: model.clip.encode_text(tokens),
                "cut to the longest": lambda: model.encode_text(tokens),
            },
            rounds,
            device,
        )
    report(rows, output)
    return rows
