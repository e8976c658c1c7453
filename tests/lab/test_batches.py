import multiprocessing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fogzo_lab.data.batches import ShuffledBatches


class Numbers:
    """A split whose examples are their own indices."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, indices):
        return indices.clone()


def take(batches, steps):
    return [torch.cat(next(batches)).tolist() for _ in range(steps)]


def test_an_epoch_shows_every_example_once_and_the_next_one_in_another_order():
    batches = ShuffledBatches(Numbers(20), 5, seed=0)
    first, second = take(batches, 4), take(batches, 4)
    for epoch in (first, second):
        assert sorted(number for batch in epoch for number in batch) == list(range(20))
    assert first != second


def test_the_order_is_that_of_the_seed_and_leaves_the_global_stream_alone():
    state = torch.get_rng_state()
    orders = [take(ShuffledBatches(Numbers(20), 5, seed), 3) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert torch.equal(torch.get_rng_state(), state)


@given(ranks=st.integers(1, 5), accumulation=st.integers(1, 3), count=st.integers(24, 60))
def test_ranks_and_micro_batches_share_out_the_batches_of_one_process(ranks, accumulation, count):
    size = 24
    whole = ShuffledBatches(Numbers(count), size, 3)
    if size % (ranks * accumulation):
        with pytest.raises(ValueError, match="--batch-size"):
            ShuffledBatches(Numbers(count), size, 3, ranks=ranks, accumulation=accumulation)
        return
    parts = [
        ShuffledBatches(Numbers(count), size, 3, rank=rank, ranks=ranks, accumulation=accumulation)
        for rank in range(ranks)
    ]
    for expected in take(whole, 5):
        windows = [next(part) for part in parts]
        assert all(len(window) == accumulation for window in windows)
        assert len({len(micro) for window in windows for micro in window}) == 1
        assert torch.cat([torch.cat(window) for window in windows]).tolist() == expected


@given(taken=st.integers(0, 15), accumulation=st.sampled_from([1, 2]))
def test_a_resumed_order_goes_on_where_it_stood(taken, accumulation):
    options = {"batch_size": 4, "seed": 7, "accumulation": accumulation}
    batches = ShuffledBatches(Numbers(18), **options)
    take(batches, taken)
    resumed = ShuffledBatches(Numbers(18), **options)
    resumed.load_state_dict(batches.state_dict())
    assert take(resumed, 6) == take(batches, 6)


def test_workers_load_the_same_batches_and_leave_the_global_stream_alone():
    alone = ShuffledBatches(Numbers(18), 6, 7, accumulation=2)
    loaded = ShuffledBatches(Numbers(18), 6, 7, accumulation=2, workers=2)
    state = torch.get_rng_state()
    assert take(loaded, 7) == take(alone, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert multiprocessing.active_children()
    loaded.close()
    assert not multiprocessing.active_children()
    assert take(loaded, 2) == take(alone, 2)
    loaded.close()


def test_more_than_there_is_or_cannot_be_shared_names_a_size_that_works():
    with pytest.raises(ValueError, match="--batch-size 18"):
        ShuffledBatches(Numbers(18), 19, 0)
    with pytest.raises(ValueError, match="--batch-size 16"):
        ShuffledBatches(Numbers(18), 20, 0, accumulation=4)
    with pytest.raises(ValueError, match="--accumulation 1"):
        ShuffledBatches(Numbers(3), 20, 0, accumulation=4)
    with pytest.raises(ValueError, match=r"2 rank.*3 micro-batch.*--batch-size 12"):
        ShuffledBatches(Numbers(18), 13, 0, ranks=2, accumulation=3)
