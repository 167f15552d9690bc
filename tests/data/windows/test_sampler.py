"""The order of training: complete, the same for any number of ranks, and resumable."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres.data import BatchSampler, Order, accumulation_steps
from attnres.data.windows.mixing import Mix, quotas
from attnres.errors import ConfigError, DataError


@given(seed=st.integers(0, 2**32), windows=st.integers(1, 60), data=st.data())
def test_order_visits_every_window_once_per_epoch(seed, windows, data):
    size = data.draw(st.integers(1, windows))
    ids = np.concatenate([Order(windows, size, seed).batch(step) for step in range(3 * windows // size + 1)])
    for epoch in range(3):
        assert sorted(ids[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


def test_order_depends_on_seed_and_epoch_and_is_pinned():
    first, other_seed = Order(50, 50, 0).batch(0).tolist(), Order(50, 50, 1).batch(0).tolist()
    assert first not in (other_seed, Order(50, 50, 0).batch(1).tolist(), list(range(50)))
    # A resumed run must see this order on any machine and with any later numpy.
    assert Order(10, 4, 3).batch(7).tolist() == [1, 2, 0, 8]


@given(
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 4),
    start=st.integers(0, 5),
    seed=st.integers(0, 9),
    mix=st.sampled_from([None, Mix((0, 25), (25, 16), quotas([2, 1]))]),
)
def test_batch_sampler_ranks_share_exactly_the_global_batch(micro, accumulation, world, start, seed, mix):
    order = Order(41, micro * accumulation * world, seed, mix)
    ranks = [
        list(BatchSampler(order, micro, max_steps=7, start_step=start, rank=rank, world_size=world))
        for rank in range(world)
    ]
    for step in range(start, 7):
        first = (step - start) * accumulation
        seen = [ids for batches in ranks for ids in batches[first : first + accumulation]]
        assert all(len(ids) == micro for ids in seen)
        # The right side knows nothing of ranks, accumulation or where the run was resumed.
        assert sorted(sum(seen, [])) == sorted(order.batch(step))
    assert all(len(batches) == (7 - start) * accumulation for batches in ranks)


def test_batch_sampler_length_counts_from_the_first_step():
    order = Order(20, 4, 0)
    assert len(BatchSampler(order, 2, max_steps=6)) == len(BatchSampler(order, 2, max_steps=6, start_step=5)) == 12


def test_batch_sampler_refuses_sizes_that_do_not_divide():
    with pytest.raises(ConfigError, match="expected a multiple of micro_batch_size x ranks = 2 x 3, got 8"):
        accumulation_steps(8, 2, 3)
    with pytest.raises(ConfigError, match="micro_batch_size: expected at least 1"):
        accumulation_steps(8, 0, 1)
    with pytest.raises(DataError, match="3 training windows are fewer than one global batch of 4"):
        Order(3, 4, 0)
    with pytest.raises(ConfigError, match="max_steps: expected at least the 5 already made, got 4"):
        BatchSampler(Order(9, 4, 0), 4, max_steps=4, start_step=5)
