"""Proves that the order of training is a pure function that loses and repeats no row, for any number of workers."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import epoch_order, rank_batches, share, steps_per_epoch

ROWS = st.integers(0, 5000)
BATCH = st.integers(1, 1000)
WORLD = st.integers(1, 64)
SEED = st.integers(0, 2**63 - 1)
EPOCH = st.integers(1, 10_000)


def rank_slices(rows: int, batch: int, world: int) -> list[list[tuple[int, int, int]]]:
    return [list(rank_batches(rows, batch, rank, world)) for rank in range(world)]


def test_the_order_never_changes_between_releases() -> None:
    """A value written down once: another one would silently change what a seed means."""
    first_ten = [12569, 57285, 42502, 35289, 26576, 22685, 6123, 31556, 9016, 26822]
    assert epoch_order(60_000, seed=0, epoch=1)[:10].tolist() == first_ten


def test_the_order_is_the_stable_sort_of_philox() -> None:
    keys = np.random.Philox(key=np.array([5, 2], dtype=np.uint64)).random_raw(1000).tolist()
    assert epoch_order(1000, seed=5, epoch=2).tolist() == sorted(range(1000), key=keys.__getitem__)


@given(rows=ROWS, seed=SEED, epoch=EPOCH)
def test_every_epoch_is_a_permutation(rows: int, seed: int, epoch: int) -> None:
    order = epoch_order(rows, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(rows))


@given(rows=ROWS, seed=SEED, epoch=EPOCH)
def test_the_order_is_pure(rows: int, seed: int, epoch: int) -> None:
    first = epoch_order(rows, seed, epoch)
    np.random.random(3)  # numpy's global state must not matter
    assert np.array_equal(epoch_order(rows, seed, epoch), first)


@given(rows=st.integers(100, 5000), seed=SEED, epoch=EPOCH, other=st.tuples(SEED, EPOCH))
def test_another_seed_or_epoch_gives_another_order(rows: int, seed: int, epoch: int, other: tuple[int, int]) -> None:
    same = np.array_equal(epoch_order(rows, seed, epoch), epoch_order(rows, *other))
    assert same == (other == (seed, epoch))


@given(total=ROWS, world=WORLD)
def test_shares_lie_end_to_end_and_differ_by_one_at_most(total: int, world: int) -> None:
    shares = [share(total, rank, world) for rank in range(world)]
    assert shares[0][0] == 0
    assert shares[-1][1] == total
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(shares))
    sizes = {stop - start for start, stop in shares}
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=20)
@given(rows=ROWS, batch=BATCH, world=WORLD, seed=SEED)
def test_the_ranks_slices_put_together_are_the_global_batch(rows: int, batch: int, world: int, seed: int) -> None:
    order = epoch_order(rows, seed, epoch=1)
    for step, parts in enumerate(zip(*rank_slices(rows, batch, world), strict=True)):
        whole = order[step * batch : (step + 1) * batch]
        assert np.array_equal(np.concatenate([order[start:stop] for start, stop, _ in parts]), whole)
        assert {size for _, _, size in parts} == {len(whole)}


@settings(max_examples=20)
@given(rows=ROWS, batch=BATCH, world=WORLD)
def test_an_epoch_visits_each_row_once(rows: int, batch: int, world: int) -> None:
    visits = np.zeros(rows, int)
    for slices in rank_slices(rows, batch, world):
        for start, stop, _ in slices:
            visits[start:stop] += 1
    assert np.array_equal(visits, np.ones(rows))


@given(rows=ROWS, batch=BATCH, world=WORLD)
def test_the_batches_do_not_depend_on_the_number_of_workers(rows: int, batch: int, world: int) -> None:
    alone = list(rank_batches(rows, batch, 0, 1))
    first, last = list(rank_batches(rows, batch, 0, world)), list(rank_batches(rows, batch, world - 1, world))
    assert [(a[0], b[1], b[2]) for a, b in zip(first, last, strict=True)] == alone


@given(rows=ROWS, batch=BATCH, world=WORLD)
def test_every_rank_takes_the_promised_number_of_steps(rows: int, batch: int, world: int) -> None:
    steps = -(-rows // batch)
    assert steps_per_epoch(rows, batch) == steps
    assert [len(list(rank_batches(rows, batch, rank, world))) for rank in (0, world - 1)] == [steps, steps]
