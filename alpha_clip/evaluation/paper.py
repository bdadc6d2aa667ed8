"""Figures of the paper (arXiv 2312.03818) and of peers, to be shown beside one's own."""

from __future__ import annotations

MASK, BOX, WHOLE = "mean per class/alpha", "mean per class/box alpha", "mean per class/no alpha"
_FIVE = "mean per class top-5"

PAPER: dict[str, dict[str, dict[str, float]]] = {
    "ImageNetS": {
        "CLIP B/16": {WHOLE: 0.6648, f"{_FIVE}/no alpha": 0.8890},
        "Alpha-CLIP B/16": {MASK: 0.6889, f"{_FIVE}/alpha": 0.9051},
        "CLIP L/14": {
            WHOLE: 0.7348,
            f"{_FIVE}/no alpha": 0.9160,
            "mean per class/attention mask": 0.7704,
            "mean per class/red circle": 0.7337,
        },
        "Alpha-CLIP L/14": {WHOLE: 0.7337, BOX: 0.7562, MASK: 0.7741, f"{_FIVE}/alpha": 0.9445},
        "Alpha-CLIP L/14@336": {MASK: 0.7961, f"{_FIVE}/alpha": 0.9531},
    },
    "CocoClassification": {
        "Alpha-CLIP B/16": {MASK: 0.7108, "mean per class/masked background": 0.5339},
        "Alpha-CLIP L/14": {MASK: 0.7756, "mean per class/masked background": 0.5884},
    },
}
"""Benchmark -> model -> figure; of COCO with crops of 1.5 times the box."""
