import math

import numpy as np
import pytest

from alpha_clip.evaluation.outcomes import Outcome

RNG = np.random.default_rng(0)


def test_a_figure_is_the_mean_of_what_there_is() -> None:
    outcome = Outcome(np.array([1.0, 0.0, np.nan, 1.0]), np.arange(4))
    assert outcome.mean() == pytest.approx(2 / 3)
    weighted = Outcome(np.array([1.0, 0.0]), np.arange(2), weights=np.array([3.0, 1.0]))
    assert weighted.mean() == 0.75
    assert math.isnan(Outcome(np.array([np.nan]), np.arange(1)).mean())
    assert all(map(math.isnan, Outcome(np.array([]), np.array([], int)).interval()))


def test_mean_per_class_by_hand() -> None:
    values, groups = np.array([1, 1, 0, 0, 1.0]), np.array([4, 4, 4, 7, 9])
    outcome = Outcome(values, np.arange(5), groups)
    assert outcome.mean() == pytest.approx((2 / 3 + 0 + 1) / 3)  # classes 0..3 have no regions
    assert outcome.by_group() == {4: (pytest.approx(2 / 3), 3), 7: (0.0, 1), 9: (1.0, 1)}
    with pytest.raises(ValueError, match="no mean over classes"):
        Outcome(values, np.arange(5)).by_group()


def test_the_interval_is_that_of_a_share() -> None:
    """Of independent outcomes: 1.96 standard errors to each side."""
    values = (RNG.random(4000) < 0.3).astype(float)
    low, high = Outcome(values, np.arange(4000)).interval()
    error = 1.96 * math.sqrt(0.3 * 0.7 / 4000)
    assert (high - low) / 2 == pytest.approx(error, rel=0.1)
    assert low < values.mean() < high
    assert Outcome(values, np.arange(4000)).interval() == (low, high)  # the same every time


def test_regions_of_one_picture_count_as_one_draw() -> None:
    values = np.repeat((RNG.random(200) < 0.5).astype(float), 10)  # ten regions, all alike
    apart = Outcome(values, np.arange(2000)).interval()
    together = Outcome(values, np.repeat(np.arange(200), 10)).interval()
    assert together[1] - together[0] == pytest.approx((apart[1] - apart[0]) * 10**0.5, rel=0.2)


@pytest.mark.parametrize("grouped", [False, True])
def test_many_rows_are_drawn_a_few_rounds_at_a_time(
    monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    from alpha_clip.evaluation import outcomes

    values, groups = RNG.random(50), RNG.integers(4, size=50)
    outcome = Outcome(values, np.arange(50), groups if grouped else None)
    at_once = outcome.interval(replicates=400)
    monkeypatch.setattr(outcomes, "_AT_A_TIME", 120)
    assert outcome.interval(replicates=400) == pytest.approx(at_once, rel=1e-12)
