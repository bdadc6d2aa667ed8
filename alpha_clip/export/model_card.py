"""The model card of an export: what it is, how to load it, what it was trained and measured on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpha_clip.model import AlphaClip

CARD_FILE = "README.md"
_BODY = """\
# {name} with an alpha channel

An [Alpha-CLIP](https://arxiv.org/abs/2312.03818) encoder: a fourth input channel says where to
look, while the whole image stays in view.

- Input: {size} x {size} px. RGB has mean {mean} and standard deviation {std}; alpha, 1 inside
  the region and 0 outside (1 everywhere for the whole image), has {alpha_mean:g} and {alpha_std:g}.
- Images become squares by: {geometry}.
- Trained from: {base}.
- Trained on: {data}.
- Largest difference from the model that was exported: {difference:.1e} of the largest feature.

```python
{usage}
```

{figures}## Licence

These weights derive from those of the CLIP that they were trained from, and from the data: the
licences and terms of use of both apply. The code of Alpha-CLIP is under Apache-2.0.
"""


@dataclass(frozen=True)
class Card:
    """What a card says beyond what the model itself tells.

    Attributes:
        training_data: What alpha was trained on.
        licence: Of the weights, as an SPDX name such as `apache-2.0`.
        metrics: Files that `alpha-clip eval` wrote; their figures become a table.
    """

    training_data: str | None = None
    licence: str | None = None
    metrics: tuple[str, ...] = ()

    def write(self, folder: Path, model: AlphaClip, usage: str, difference: float) -> None:
        """Write `README.md`.

        Args:
            folder: The export.
            model: What was exported.
            usage: Python code that loads and runs it.
            difference: Largest difference of any feature from the model's, relative to the largest.

        Raises:
            ValueError: If a file of figures is none.
        """
        normal = model.normalisation
        head = ["---", *([f"license: {self.licence}"] if self.licence else [])]
        head += ["tags: [clip, alpha-clip, region]", "---", ""]
        body = _BODY.format(
            name=model.name,
            size=model.image_size,
            mean=_numbers(normal.mean),
            std=_numbers(normal.std),
            alpha_mean=normal.alpha_mean,
            alpha_std=normal.alpha_std,
            geometry=model.transform.geometry,
            base=model.base or "not known",
            data=self.training_data or "not stated",
            difference=difference,
            usage=usage.strip(),
            figures=_figures(self.metrics),
        )
        (folder / CARD_FILE).write_text("\n".join(head) + body, encoding="utf-8")


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _figures(files: tuple[str, ...]) -> str:
    """Return tables of results; a figure has its 95 % interval."""
    lines: list[str] = ["## Figures", ""] if files else []
    for file in files:
        try:
            record = json.loads(Path(file).read_text(encoding="utf-8"))
            scores, intervals, name = record["scores"], record["intervals"], record["benchmark"]
            rows = [
                f"| {figure} | {value:.4f} | {low:.4f}–{high:.4f} |"
                for figure, value in scores.items()
                if figure in intervals
                for low, high in [intervals[figure]]
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no result of alpha-clip eval: {error}") from error
        lines += [f"| {name} | | 95 % |", "|---|---|---|", *rows, ""]
    return "".join(f"{line}\n" for line in lines)
