from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from alpha_clip.regions import RegionSample, SampleError
from alpha_clip.sampling import Sampling

MakeSample = Callable[..., RegionSample]


def test_every_region_is_drawn_as_often(make_sample: MakeSample) -> None:
    sample = make_sample("0", ("red", "green", "blue"))
    rng = np.random.default_rng(0)
    sampling = Sampling(1, 0.0)
    seen = Counter(sampling.draw(sample, rng)[0][1] for _ in range(600))
    assert set(seen) == {"red thing", "green thing", "blue thing"}
    assert min(seen.values()) > 150


def test_regions_of_one_image_differ_while_there_are_enough(make_sample: MakeSample) -> None:
    sample = make_sample("0", ("red", "green", "blue"))
    rng = np.random.default_rng(0)
    for _ in range(30):
        chosen = Sampling(3, 0.0).draw(sample, rng)
        assert {region.rid for region, _ in chosen if region} == {0, 1, 2}
        assert all(region is not None and region.text == text for region, text in chosen)
    assert len(Sampling(5, 0.0).draw(sample, rng)) == 5


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_the_whole_image_comes_with_its_caption(make_sample: MakeSample, ratio: float) -> None:
    sample = make_sample()
    rng = np.random.default_rng(0)
    chosen = [c for _ in range(1000) for c in Sampling(1, ratio).draw(sample, rng)]
    whole = [text for region, text in chosen if region is None]
    assert set(whole) <= {sample.caption}
    assert len(whole) / 1000 == pytest.approx(ratio, abs=0.03)


def test_without_a_caption_there_is_no_whole_image(make_sample: MakeSample) -> None:
    sample = make_sample()
    regions = tuple(replace(r, span=None) for r in sample.regions)
    silent = replace(sample, caption="", regions=regions)
    chosen = Sampling(2, 1.0).draw(silent, np.random.default_rng(0))
    assert all(region is not None for region, _ in chosen)


def test_only_the_wanted_kinds_are_drawn(make_sample: MakeSample) -> None:
    sample = make_sample()
    first, second = sample.regions
    mixed = replace(sample, regions=(replace(first, kind="class"), second))
    rng = np.random.default_rng(0)
    texts = {Sampling(1, 0.0, ["class"]).draw(mixed, rng)[0][1] for _ in range(20)}
    assert texts == {first.text}
    with pytest.raises(SampleError, match="no_wanted_kind: 0 has no phrase of"):
        Sampling(1, 0.0, ["caption"]).draw(mixed, rng)


@pytest.mark.parametrize("arguments", [(0, 0.1), (-1, 0.1), (1, -0.1), (1, 1.1), (1, float("nan"))])
def test_bad_settings_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"regions_per_image >= 1 and whole_image_ratio in 0\.\.1"):
        Sampling(*arguments)
