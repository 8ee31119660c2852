"""When validation gains nothing any more."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidal_dist.config import ValidationConfig
from tidal_dist.errors import ConfigError
from tidal_dist.training.early_stop import EarlyStop, check_early_stop

BITS, MATCH = "validation/bits_per_byte", "validation/exact_match"


def config(patience: int | None, metric: str = "bits_per_byte") -> ValidationConfig:
    return ValidationConfig.model_validate({"early_stop_patience": patience, "early_stop_metric": metric})


def stopped_at(stop: EarlyStop, values: list[float], name: str = BITS) -> int | None:
    for i, value in enumerate(values):
        stop.judge(i, {name: value})
        if stop.reason:
            return i
    return None


def test_ends_after_so_many_without_a_gain() -> None:
    assert stopped_at(EarlyStop(config(2)), [3.0, 2.0, 2.5, 1.9, 1.9, 2.0, 1.0]) == 5
    assert stopped_at(EarlyStop(config(2, "exact_match")), [0.1, 0.3, 0.2, 0.3, 0.9], MATCH) == 3
    assert stopped_at(EarlyStop(config(None)), [1.0] * 50) is None


def test_what_is_not_finite_is_no_gain() -> None:
    stop = EarlyStop(config(3))
    assert stopped_at(stop, [math.nan, math.inf, math.nan]) == 2
    assert "never finite" in stop.reason
    stop = EarlyStop(config(2))
    assert stopped_at(stop, [2.0, math.nan, 1.0, math.nan, math.nan]) == 4
    assert "1.0000 after step 2" in stop.reason


@given(
    values=st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan]), max_size=12),
    patience=st.integers(1, 4),
    cut=st.integers(0, 12),
)
def test_a_resumed_run_ends_where_the_undisturbed_one_does(values: list[float], patience: int, cut: int) -> None:
    straight = EarlyStop(config(patience))
    for step, value in enumerate(values):
        straight.judge(step, {BITS: value})
    halves = EarlyStop(config(patience))
    for step, value in enumerate(values):
        if step == cut:
            halves = EarlyStop.resumed(config(patience), json.loads(json.dumps(halves.state)))
        halves.judge(step, {BITS: value})
    assert (halves.state, halves.reason) == (straight.state, straight.reason)


def test_another_metric_is_watched_anew_and_more_patience_goes_on() -> None:
    stop = EarlyStop(config(1))
    assert stopped_at(stop, [1.0, 2.0]) == 1
    assert not EarlyStop.resumed(config(2), stop.state).reason
    assert EarlyStop.resumed(config(1), stop.state).reason
    assert EarlyStop.resumed(config(1, "exact_match"), stop.state).best is None
    assert EarlyStop.resumed(config(1), {}).without_gain == 0


def test_what_is_not_measured_cannot_be_watched() -> None:
    check_early_stop(config(None, "exact_match"), held_out=False, answers=False)
    check_early_stop(config(3, "exact_match"), held_out=True, answers=True)
    with pytest.raises(ConfigError, match="no document is held out"):
        check_early_stop(config(3), held_out=False, answers=False)
    with pytest.raises(ConfigError, match="no held-out document has a prompt and an answer; take bits_per_byte"):
        check_early_stop(config(3, "exact_match"), held_out=True, answers=False)
