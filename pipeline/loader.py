"""Bringing a rank its slice of every global batch: two loaders behind one interface.

`ResidentLoader` keeps the training split in memory, on the worker's device. `StreamingLoader` reads shards as they
are needed, a few ahead, in a thread of its own. Both begin at any step of any epoch, so training that stopped there
goes on there.
"""

import itertools
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lenet.augment import Augment, augment
from pipeline.ahead import in_order
from pipeline.order import Segment, ShuffledOrder, StreamedOrder, batch_at, steps_per_epoch
from pipeline.shards import Manifest, read_rows, read_shard
from pipeline.storage import Store

Loading = Literal["resident", "streaming"]

MIB = 2**20
# Segments read but not yet needed: at 8 MiB each, enough to hide a slow read, little enough to forget.
READ_AHEAD = 4
# Images to augment at once, by the device's type; elsewhere a batch: on a CPU it is still in the cache then.
AUGMENTED_AT_ONCE = {"cuda": 8192}


class LoadConfig(BaseModel):
    """How training images come to the workers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loading: Literal["auto", "resident", "streaming"] = Field(
        "auto",
        description="Keep the training images in every worker's memory (resident), read them as they are needed "
        "(streaming), or decide by memory_budget_mib (auto).",
    )
    memory_budget_mib: int = Field(
        2048, ge=1, le=2**24, description="Training images that may be resident in each worker, in MiB."
    )


def choose_loading(manifest: Manifest, config: LoadConfig) -> Loading:
    """Decide by the data and the configuration alone, never by the machine: the order of training depends on it."""
    if config.loading != "auto":
        return config.loading
    return "resident" if manifest.pixel_bytes("train") <= config.memory_budget_mib * MIB else "streaming"


@dataclass(frozen=True)
class Batch:
    """A rank's slice of a global batch of `size` images: images uint8 (b, height, width), labels uint8 (b,), and row
    numbers in the split int64 (b,), all on the worker's device; b may be 0."""

    images: Tensor
    labels: Tensor
    rows: Tensor
    size: int


@dataclass(frozen=True)
class Place:
    """What a loader loads: the split's images in the order that seed and global batch size make, one rank's slices."""

    store: Store
    manifest: Manifest
    split: str
    seed: int
    global_batch_size: int
    rank: int
    world_size: int
    device: torch.device

    @property
    def steps(self) -> int:
        """Global batches in an epoch."""
        return steps_per_epoch(self.manifest.rows(self.split), self.global_batch_size)


class Loader(Protocol):
    """Gives rank's slices of an epoch's global batches, from a step on."""

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The slices of steps first_step.. of `epoch`, counted from 0."""
        ...


def open_loader(loading: Loading, place: Place) -> Loader:
    """The loader of that kind."""
    return ResidentLoader(place) if loading == "resident" else StreamingLoader(place)


def augmented(batches: Iterator[Batch], config: Augment, seed: int, epoch: int) -> Iterator[Batch]:
    """The batches with their images augmented; on a GPU many at once, for that takes a hundred launches each time."""
    if not config.active:
        yield from batches
        return
    for batch in batches:
        more = AUGMENTED_AT_ONCE.get(batch.images.device.type, 0) // (len(batch.rows) + 1)
        some = [batch, *itertools.islice(batches, more)]
        images, rows = torch.cat([one.images for one in some]), torch.cat([one.rows for one in some])
        parts = torch.split(augment(images, rows, config, seed, epoch), [len(one.rows) for one in some])
        yield from (replace(one, images=part) for one, part in zip(some, parts, strict=True))


class ResidentLoader:
    """The whole split as uint8 tensors on the device, for a row may fall to any rank in the next epoch."""

    def __init__(self, place: Place) -> None:
        self.place = place
        images, labels = read_rows(place.store, place.manifest, place.split)
        self.images = torch.from_numpy(images).to(place.device)
        self.labels = torch.from_numpy(labels).to(place.device)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """As Loader says; each epoch one permutation of all rows."""
        place = self.place
        order = ShuffledOrder(len(self.labels), place.seed, epoch, place.global_batch_size)
        # All of it at once: the host waits for a GPU at every copy from its ordinary memory.
        every_row = torch.from_numpy(order.order).to(place.device)
        for step in range(first_step, place.steps):
            start, stop = order.slice(step, place.rank, place.world_size)
            rows = every_row[start:stop]
            size = batch_at(step, order.rows, place.global_batch_size)
            yield Batch(self.images.index_select(0, rows), self.labels.index_select(0, rows), rows, size)


@dataclass(frozen=True)
class _Loaded:
    """A segment's rows in the order of training, in memory."""

    segment: Segment
    images: Tensor
    labels: Tensor
    rows: Tensor


class StreamingLoader:
    """Holds one shard's rows for each lane that the rank's slices lie in, and a few more, read ahead."""

    def __init__(self, place: Place) -> None:
        self.place = place
        shards = place.manifest.splits[place.split]
        self.shard_rows = tuple(shard.rows for shard in shards)
        self.first_rows = np.concatenate([[0], np.cumsum(self.shard_rows)])

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """As Loader says; each epoch the shards shuffled, and the rows inside them."""
        place = self.place
        order = StreamedOrder(self.shard_rows, place.seed, epoch, place.global_batch_size)
        ahead = self._read_ahead(order, first_step)
        held: dict[int, list[_Loaded]] = {}
        try:
            for step in range(first_step, place.steps):
                parts = [
                    part
                    for lane, start, stop in order.slice(step, place.rank, place.world_size)
                    for part in _take(held, ahead, lane, start, stop)
                ]
                yield self._joined(parts, batch_at(step, order.rows, place.global_batch_size))
        finally:
            ahead.close()

    def _read_ahead(self, order: StreamedOrder, first_step: int) -> Generator[_Loaded, None, None]:
        """The rank's segments in the order they are needed, the next few being read meanwhile."""
        needed = order.needed(first_step, self.place.rank, self.place.world_size)
        pool = ThreadPoolExecutor(1, "read-ahead")
        try:
            yield from in_order(
                lambda segment: pool.submit(self._load, order, segment), Future.result, needed, READ_AHEAD
            )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, order: StreamedOrder, segment: Segment) -> _Loaded:
        place = self.place
        images, labels = read_shard(place.store, place.manifest, place.split, segment.shard)
        inside = order.shuffled(segment)
        return _Loaded(
            segment,
            torch.from_numpy(images[inside]),
            torch.from_numpy(labels[inside]),
            torch.from_numpy(inside + self.first_rows[segment.shard]),
        )

    def _joined(self, parts: list[tuple[Tensor, Tensor, Tensor]], size: int) -> Batch:
        device = self.place.device
        if not parts:
            none = torch.empty(0, *self.place.manifest.image_shape, dtype=torch.uint8, device=device)
            return Batch(none, none[:, 0, 0], none[:, 0, 0].long(), size)
        images, labels, rows = (_sent(torch.cat(columns), device) for columns in zip(*parts, strict=True))
        return Batch(images, labels, rows, size)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on its way to the device. To a GPU it goes from pinned memory: the host does not wait for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _take(
    held: dict[int, list[_Loaded]], ahead: Iterator[_Loaded], lane: int, start: int, stop: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and rows of positions start..stop of a lane; what lies before them is let go."""
    mine = held.setdefault(lane, [])
    while mine and mine[0].segment.stop <= start:
        del mine[0]
    while not mine or mine[-1].segment.stop < stop:
        loaded = next(ahead)
        held.setdefault(loaded.segment.lane, []).append(loaded)
    for loaded in mine:
        first, last = max(start, loaded.segment.start), min(stop, loaded.segment.stop)
        part = slice(first - loaded.segment.start, last - loaded.segment.start)
        yield loaded.images[part], loaded.labels[part], loaded.rows[part]
