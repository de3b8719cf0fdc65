"""The order of training as pure functions: (rows or shards, seed, epoch, global batch size) to global batches, and a
rank's slice of each. Nothing here depends on the number of workers but the slice, so every world size sees the same
batches, and training that stops after any step goes on at the next one with any other number of workers.

There are two orders. `ShuffledOrder` is one permutation of all rows, for data that is resident. `StreamedOrder` is for
data that is read as it is needed: few shards at a time, each by as few workers as can be.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

# Up to so many workers each read shards of their own. Each lane has one shard in memory: 16 lanes of 8 MiB shards
# are 128 MiB for a worker that is alone, and 170,000 images of 28x28 that every batch is drawn from.
LANES = 16


def permutation(count: int, seed: int, epoch: int, *stream: int) -> Rows:
    """A permutation of 0..count-1, int64 (count,), the same on every machine and in every numpy release.

    It sorts the raw output of the counter-based generator Philox (Salmon et al., 2011), keyed by seed and epoch, with
    up to three numbers from 0 to 2**64 - 1 of `stream` in the upper words of the counter: numpy promises that output
    never to change, and does not promise it for Generator.permutation.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.zeros(4, dtype=np.uint64)
    counter[1 : 1 + len(stream)] = stream
    keys = np.random.Philox(key=key, counter=counter).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def share(total: int, index: int, parts: int) -> tuple[int, int]:
    """Start and stop of the share of part `index` of `total` things in a row. The shares differ by one at most; the
    first is among the largest: rank 0, which speaks for all, has an image of every batch."""
    return -(-total * index // parts), -(-total * (index + 1) // parts)


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """Number of global batches in an epoch, the short last one included."""
    return -(-rows // global_batch_size)


def batch_at(step: int, rows: int, global_batch_size: int) -> int:
    """Number of images in the global batch of `step`, counted from 0: less than the others' in the last, perhaps."""
    return min(global_batch_size, rows - step * global_batch_size)


def hold_out(labels: npt.NDArray[np.uint8], fraction: float) -> npt.NDArray[np.bool_]:
    """Which of the rows with these labels (N,) are held out, bool (N,): the same `fraction` of each class, at random
    but always the same. Each class keeps a row, and gives one if it has two and the fraction is above 0."""
    held = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * fraction), int(fraction > 0)), len(members) - 1)
        held[members[permutation(len(members), int(label), 0)[:count]]] = True
    return held


@dataclass(frozen=True)
class ShuffledOrder:
    """All rows of a split in one permutation for each epoch."""

    rows: int
    seed: int
    epoch: int
    global_batch_size: int

    @cached_property
    def order(self) -> Rows:
        """Row numbers, int64 (rows,), in the order of training."""
        return permutation(self.rows, self.seed, self.epoch)

    def slice(self, step: int, rank: int, world_size: int) -> tuple[int, int]:
        """Start and stop in the order of rank's slice, maybe empty, of the global batch of `step`."""
        start, stop = share(batch_at(step, self.rows, self.global_batch_size), rank, world_size)
        first = step * self.global_batch_size
        return first + start, first + stop


@dataclass(frozen=True)
class Segment:
    """The part of a lane that lies in one shard: positions start..stop of the lane are, shuffled, the rows from
    `first_row` on of shard number `shard`."""

    lane: int
    start: int
    stop: int
    shard: int
    first_row: int


@dataclass(frozen=True)
class StreamedOrder:
    """Lanes side by side, each a walk through shards.

    The shards are shuffled and put in a row, and the row is cut into lanes; each global batch takes the next few
    rows of every lane. A lane's rows are shuffled inside each shard. So a batch mixes rows from as many places as
    there are lanes, whatever the number of workers, while a rank's slice of it lies in few lanes, always the same.
    """

    shard_rows: tuple[int, ...]
    seed: int
    epoch: int
    global_batch_size: int

    @cached_property
    def rows(self) -> int:
        """Rows in the epoch."""
        return sum(self.shard_rows)

    @cached_property
    def lanes(self) -> int:
        """Number of lanes: a property of the data, not of the cluster."""
        return min(LANES, len(self.shard_rows))

    @cached_property
    def _shards(self) -> tuple[Rows, Rows]:
        """The shards' numbers in the order of the epoch, and where each begins in the row of all."""
        order = permutation(len(self.shard_rows), self.seed, self.epoch)
        return order, np.concatenate([[0], np.cumsum(np.array(self.shard_rows, dtype=np.int64)[order])])

    def _lane_start(self, lane: int) -> int:
        """Where a lane begins in the row of all shards: before it lie the shares of the lanes before it."""
        steps, rest = divmod(self.rows, self.global_batch_size)
        return steps * share(self.global_batch_size, lane, self.lanes)[0] + share(rest, lane, self.lanes)[0]

    def segments(self, lane: int) -> list[Segment]:
        """The lane from its start to its end, shard by shard."""
        order, edges = self._shards
        begin, end = self._lane_start(lane), self._lane_start(lane + 1)
        first = int(np.searchsorted(edges, begin, side="right")) - 1
        last = int(np.searchsorted(edges, end, side="left"))
        return [
            Segment(
                lane,
                start=max(begin, int(edges[place])) - begin,
                stop=min(end, int(edges[place + 1])) - begin,
                shard=int(order[place]),
                first_row=max(begin - int(edges[place]), 0),
            )
            for place in range(first, last)
        ]

    def shuffled(self, segment: Segment) -> Rows:
        """The rows of the segment's shard, counted from the shard's first, in the order of training."""
        count = segment.stop - segment.start
        inside = permutation(count, self.seed, self.epoch, 1 + segment.lane, segment.start)
        return segment.first_row + inside

    def slice(self, step: int, rank: int, world_size: int) -> list[tuple[int, int, int]]:
        """Rank's slice of the global batch of `step`: (lane, start, stop) in positions of the lane, none empty."""
        batch = batch_at(step, self.rows, self.global_batch_size)
        first, last = share(batch, rank, world_size)
        parts = []
        for lane in range(self.lanes):
            begin, end = share(batch, lane, self.lanes)
            start, stop = max(first, begin), min(last, end)
            if start < stop:
                full_begin, full_end = share(self.global_batch_size, lane, self.lanes)
                before = step * (full_end - full_begin)
                parts.append((lane, before + start - begin, before + stop - begin))
        return parts

    def needed(self, first_step: int, rank: int, world_size: int) -> list[Segment]:
        """The segments that rank's slices from first_step on lie in, in the order in which they are first needed."""
        last_step = steps_per_epoch(self.rows, self.global_batch_size) - 1
        # A rank's place in a lane is the same in every step but the last, which may be short.
        every = {lane: (start, stop) for lane, start, stop in self.slice(0, rank, world_size)} if last_step else {}
        last = {lane: (start, stop) for lane, start, stop in self.slice(last_step, rank, world_size)}
        found = []
        for lane in every.keys() | last.keys():
            begin, end = share(self.global_batch_size, lane, self.lanes)
            for segment in self.segments(lane):
                if lane in every:
                    start, stop = every[lane]
                    step = max(first_step, (segment.start - stop) // (end - begin) + 1)
                    if step < last_step and step * (end - begin) + start < segment.stop:
                        found.append((step, segment))
                        continue
                start, stop = last.get(lane, (0, 0))
                if first_step <= last_step and max(start, segment.start) < min(stop, segment.stop):
                    found.append((last_step, segment))
        return [segment for _, segment in sorted(found, key=lambda need: (need[0], need[1].lane, need[1].start))]
