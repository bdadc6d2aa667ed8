"""Region classification on region–text shards: which of all names is this region?"""

from __future__ import annotations

import json
from pathlib import Path

from alpha_clip.evaluation.classification import Classification
from alpha_clip.evaluation.labelled import ShardRegions
from alpha_clip.geometry import Geometry
from alpha_clip.reader import find_shards


class RegionClassification(Classification):
    """Every region is asked for its own phrase among the names, for every way of pointing.

    Args:
        data: Folders of finished shards.
        names: A `names.json` as `alpha-clip-data scenes` writes it (`{"names": [...], "held_out":
            [...]}`), or `None` for all phrases of the data.
        template: The prompt; `{}` stands for the name.
        focus: Ways of pointing, of `focus_baselines.FOCUS`; `None` takes all that the model's tower
            allows.
        geometry: How images become squares.
        batch_size: Images that go through the tower at a time.
        max_images: Most images to read; `None` reads all.
        controls: Whether `alpha` is followed by its controls (another picture's alpha, another
            object's, inverted, alpha alone), four more passes.

    Raises:
        ValueError: If a way of pointing is unknown, or the names file is none.
    """

    def __init__(
        self,
        data: list[str],
        names: str | None = None,
        template: str = "{}",
        focus: list[str] | None = None,
        geometry: Geometry = "squash",
        batch_size: int = 64,
        max_images: int | None = None,
        controls: bool = True,
    ) -> None:
        named, held_out = _read_names(names) if names else ([], [])
        source = ShardRegions(find_shards(data), named, max_images)
        super().__init__(
            source,
            [template],
            focus,
            geometry,
            batch_size=batch_size,
            held_out=tuple(held_out),
            controls=controls,
        )


def _read_names(file: str) -> tuple[list[str], list[str]]:
    try:
        record = json.loads(Path(file).read_text())
        return list(record["names"]), list(record["held_out"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{file} is no names file: expected {{"names": [...], "held_out": [...]}}; {error}'
        ) from error
