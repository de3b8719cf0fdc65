"""Proves that the order of training is a pure function that loses and repeats no row, for any number of workers, and
that training can stop after any step and go on with another number."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import (
    LANES,
    Rows,
    ShuffledOrder,
    StreamedOrder,
    batch_at,
    hold_out,
    permutation,
    share,
    steps_per_epoch,
)

ROWS = st.integers(1, 5000)
BATCH = st.integers(1, 1000)
WORLD = st.integers(1, 64)
SEED = st.integers(0, 2**63 - 1)
EPOCH = st.integers(1, 10_000)
SHARDS = st.lists(st.integers(1, 300), min_size=1, max_size=40).map(tuple)


@st.composite
def orders(draw: st.DrawFn) -> ShuffledOrder | StreamedOrder:
    seed, epoch, batch = draw(SEED), draw(EPOCH), draw(BATCH)
    if draw(st.booleans()):
        return ShuffledOrder(draw(ROWS), seed, epoch, batch)
    return StreamedOrder(draw(SHARDS), seed, epoch, batch)


def rows_of(order: ShuffledOrder | StreamedOrder, step: int, rank: int, world: int) -> Rows:
    """The split's rows in a rank's slice, worked out one by one for the streamed order."""
    if isinstance(order, ShuffledOrder):
        start, stop = order.slice(step, rank, world)
        return order.order[start:stop]
    return np.array(list(streamed_rows(order, step, rank, world)), dtype=np.int64)


def streamed_rows(order: StreamedOrder, step: int, rank: int, world: int) -> Iterator[int]:
    first_rows = np.concatenate([[0], np.cumsum(order.shard_rows)])
    for lane, start, stop in order.slice(step, rank, world):
        segments = order.segments(lane)
        for position in range(start, stop):
            (segment,) = [one for one in segments if one.start <= position < one.stop]
            yield int(first_rows[segment.shard] + order.shuffled(segment)[position - segment.start])


def global_batch(order: ShuffledOrder | StreamedOrder, step: int, world: int) -> list[int]:
    return [int(row) for rank in range(world) for row in rows_of(order, step, rank, world)]


def steps_of(order: ShuffledOrder | StreamedOrder) -> int:
    return steps_per_epoch(order.rows, order.global_batch_size)


def test_the_order_never_changes_between_releases() -> None:
    """Values written down once: others would silently change what a seed means."""
    first_ten = [12569, 57285, 42502, 35289, 26576, 22685, 6123, 31556, 9016, 26822]
    assert permutation(60_000, 0, 1)[:10].tolist() == first_ten
    streamed = StreamedOrder((10_000,) * 6, seed=0, epoch=1, global_batch_size=256)
    assert global_batch(streamed, 0, 1)[:6] == [56673, 59781, 54108, 53307, 50823, 57983]


def test_a_permutation_is_the_stable_sort_of_philox() -> None:
    keys = np.random.Philox(key=np.array([5, 2], dtype=np.uint64)).random_raw(1000).tolist()
    assert permutation(1000, 5, 2).tolist() == sorted(range(1000), key=keys.__getitem__)


@given(count=st.integers(0, 5000), seed=SEED, epoch=EPOCH, stream=st.lists(SEED, max_size=3))
def test_a_permutation_has_everything_once(count: int, seed: int, epoch: int, stream: list[int]) -> None:
    order = permutation(count, seed, epoch, *stream)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(count))


@given(rows=ROWS, seed=SEED, epoch=EPOCH)
def test_a_permutation_is_pure(rows: int, seed: int, epoch: int) -> None:
    first = permutation(rows, seed, epoch)
    np.random.random(3)  # numpy's global state must not matter
    assert np.array_equal(permutation(rows, seed, epoch), first)


@given(
    rows=st.integers(100, 5000),
    one=st.tuples(SEED, EPOCH, st.integers(0, 99), st.integers(0, 99)),
    other=st.tuples(SEED, EPOCH, st.integers(0, 99), st.integers(0, 99)),
)
def test_another_seed_epoch_or_stream_gives_another_order(rows: int, one: list[int], other: list[int]) -> None:
    assert np.array_equal(permutation(rows, *one), permutation(rows, *other)) == (one == other)


@given(total=st.integers(0, 5000), world=WORLD)
def test_shares_lie_end_to_end_and_differ_by_one_at_most_with_none_above_the_first(total: int, world: int) -> None:
    shares = [share(total, rank, world) for rank in range(world)]
    assert shares[0][0] == 0
    assert shares[-1][1] == total
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(shares))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)


@settings(max_examples=60)
@given(order=orders(), world=WORLD, data=st.data())
def test_the_ranks_slices_put_together_are_the_same_global_batch_for_any_world_size(
    order: ShuffledOrder | StreamedOrder, world: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, steps_of(order) - 1))
    together = global_batch(order, step, world)
    assert together == global_batch(order, step, 1)
    assert len(together) == batch_at(step, order.rows, order.global_batch_size)


@settings(max_examples=40)
@given(order=orders(), worlds=st.lists(WORLD, min_size=1, max_size=4), data=st.data())
def test_an_epoch_that_goes_on_with_other_workers_at_any_steps_visits_each_row_once(
    order: ShuffledOrder | StreamedOrder, worlds: list[int], data: st.DataObject
) -> None:
    steps = steps_of(order)
    stops = sorted(data.draw(st.lists(st.integers(0, steps), min_size=len(worlds) - 1, max_size=len(worlds) - 1)))
    visits = np.zeros(order.rows, int)
    for world, (first, stop) in zip(worlds, itertools.pairwise([0, *stops, steps]), strict=True):
        for step in range(first, stop):
            for rank in range(world):
                visits[rows_of(order, step, rank, world)] += 1
    assert np.array_equal(visits, np.ones(order.rows))


@given(order=orders(), world=WORLD)
def test_every_step_but_the_last_is_full_and_none_is_empty(order: ShuffledOrder | StreamedOrder, world: int) -> None:
    sizes = [batch_at(step, order.rows, order.global_batch_size) for step in range(steps_of(order))]
    assert sum(sizes) == order.rows
    assert set(sizes[:-1]) <= {order.global_batch_size}
    assert 0 < sizes[-1] <= order.global_batch_size


@settings(max_examples=60)
@given(shards=SHARDS, batch=BATCH, seed=SEED)
def test_lanes_lie_end_to_end_over_all_shards(shards: tuple[int, ...], batch: int, seed: int) -> None:
    order = StreamedOrder(shards, seed, 1, batch)
    assert order.lanes == min(LANES, len(shards))
    seen = []
    for lane in range(order.lanes):
        segments = order.segments(lane)
        assert [one.start for one in segments] == [0, *[one.stop for one in segments][:-1]][: len(segments)]
        seen += [(one.shard, one.first_row + row) for one in segments for row in range(one.stop - one.start)]
        for one in segments:
            inside = np.sort(order.shuffled(one)).tolist()
            assert inside == list(range(one.first_row, one.first_row + one.stop - one.start))
    assert sorted(seen) == [(shard, row) for shard, rows in enumerate(shards) for row in range(rows)]


@settings(max_examples=60)
@given(shards=SHARDS, batch=BATCH, seed=SEED, world=WORLD, data=st.data())
def test_what_a_rank_is_told_to_read_is_what_its_slices_need_in_that_order(
    shards: tuple[int, ...], batch: int, seed: int, world: int, data: st.DataObject
) -> None:
    order = StreamedOrder(shards, seed, 1, batch)
    rank = data.draw(st.integers(0, world - 1))
    first_step = data.draw(st.integers(0, steps_of(order) - 1))
    wanted = []
    for step in range(first_step, steps_of(order)):
        for lane, start, stop in order.slice(step, rank, world):
            for segment in order.segments(lane):
                if max(start, segment.start) < min(stop, segment.stop) and segment not in wanted:
                    wanted.append(segment)
    assert order.needed(first_step, rank, world) == wanted


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_up_to_sixteen_workers_read_each_shard_hardly_more_than_once(world: int) -> None:
    order = StreamedOrder((10_000,) * 600, seed=0, epoch=1, global_batch_size=256)
    reads = [segment.shard for rank in range(world) for segment in order.needed(0, rank, world)]
    assert sorted(set(reads)) == list(range(600))
    assert len(reads) <= 600 + LANES


@given(labels=st.lists(st.integers(0, 9), min_size=1, max_size=400), fraction=st.floats(0, 0.5))
def test_the_same_part_of_every_class_is_held_out(labels: list[int], fraction: float) -> None:
    array = np.array(labels, np.uint8)
    held = hold_out(array, fraction)
    assert np.array_equal(held, hold_out(array, fraction))
    for label in set(labels):
        total, out = labels.count(label), int(held[array == label].sum())
        assert out < total
        assert abs(out - total * fraction) <= 1


def test_nothing_is_held_out_unless_asked_for() -> None:
    assert not hold_out(np.array([0, 0, 1, 1], np.uint8), 0).any()
