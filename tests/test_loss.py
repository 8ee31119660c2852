"""The normalisation of the loss: whatever rank holds which rows, the average over ranks is nats over all labels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidal_dist.model.likelihood import bits_per_byte
from tidal_dist.training.loss import loss_scale

RANKS = st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 10)), min_size=1, max_size=8)


@given(RANKS)
def test_the_average_over_ranks_is_the_global_mean(ranks: list[tuple[int, float]]) -> None:
    total = sum(labels for labels, _ in ranks)
    scales = [loss_scale(labels, len(ranks), lambda _: total) for labels, _ in ranks]
    nats = [labels * per_label for labels, per_label in ranks]
    average = sum(scale * n for (scale, _), n in zip(scales, nats, strict=True)) / len(ranks)
    assert average == pytest.approx(sum(nats) / max(total, 1))
    assert {labels for _, labels in scales} == {total}


def test_a_step_without_labels_has_no_loss() -> None:
    assert loss_scale(0, 2, lambda x: x) == (2.0, 0)


def test_bits_per_byte_counts_bytes_alone() -> None:
    assert bits_per_byte(8 * 0.6931471805599453, 4) == pytest.approx(2.0)
    assert bits_per_byte(1.0, 0) > 0
