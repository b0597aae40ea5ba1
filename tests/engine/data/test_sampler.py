"""The sample order: permutations that are pure functions of (seed, epoch)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.sampler import batch_at, epoch_order, steps_per_epoch


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**20), n=st.integers(1, 300), data=st.data())
def test_an_epoch_is_every_index_once_in_whole_batches(seed, epoch, n, data):
    order = epoch_order(seed, epoch, n)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(n))
    batch_size = data.draw(st.integers(1, n))
    steps = steps_per_epoch(n, batch_size)
    batches = [batch_at(seed, epoch * steps + s, n, batch_size) for s in range(steps)]
    assert {e for e, _ in batches} == {epoch}
    np.testing.assert_array_equal(np.concatenate([b for _, b in batches]), order[: steps * batch_size])


def test_seed_and_epoch_change_the_order():
    orders = {epoch_order(seed, epoch, 50).tobytes() for seed in (0, 1, 2**32) for epoch in range(5)}
    assert len(orders) == 15


def test_the_order_is_frozen():
    """A run continued on another machine or version must go on with the same images."""
    assert epoch_order(0, 0, 8).tolist() == [4, 6, 5, 7, 0, 3, 1, 2]
    assert epoch_order(7, 3, 8).tolist() == [4, 3, 1, 2, 0, 6, 5, 7]


def test_positions_are_uniform():
    places = np.stack([np.argsort(epoch_order(0, e, 10)) for e in range(4000)])
    counts = np.stack([np.bincount(places[:, i], minlength=10) for i in range(10)])
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400)


def test_fewer_images_than_a_batch_names_both_numbers():
    with pytest.raises(ValueError, match="20 readable training images.*batch_size=32.*at most 20"):
        batch_at(0, 0, 20, 32)
    with pytest.raises(ValueError, match="batch_size=0"):
        steps_per_epoch(20, 0)
    with pytest.raises(ValueError, match="step=-1"):
        batch_at(0, -1, 20, 4)
