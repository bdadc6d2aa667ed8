"""Figures of the paper (arXiv 2312.03818) and of peers, to be shown beside one's own."""

from __future__ import annotations

MASK, BOX, WHOLE = "mean per class/alpha", "mean per class/box alpha", "mean per class/no alpha"
_FIVE = "mean per class top-5"

_REFERRING = {
    "refcoco_val": (0.322, 0.458, 0.498, 0.557),
    "refcoco_testa": (0.361, 0.461, 0.586, 0.611),
    "refcoco_testb": (0.303, 0.471, 0.399, 0.503),
    "refcoco+_val": (0.319, 0.479, 0.553, 0.556),
    "refcoco+_testa": (0.352, 0.501, 0.639, 0.627),
    "refcoco+_testb": (0.288, 0.451, 0.454, 0.464),
    "refcocog_val": (0.367, 0.593, 0.594, 0.612),
    "refcocog_test": (0.365, 0.590, 0.589, 0.620),
}
_REFERRERS = ("CPT", "ReCLIP", "Red Circle", "Alpha-CLIP B/16 + L/14")

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
    **{
        f"ReferringExpressions {data}": {
            name: {"all views": figure} for name, figure in zip(_REFERRERS, figures, strict=True)
        }
        for data, figures in _REFERRING.items()
    },
}
"""Benchmark, with its data where there are several -> model -> figure; of COCO with crops of 1.5
times the box."""
