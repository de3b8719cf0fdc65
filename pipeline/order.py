"""The order of training as a pure function: (rows, seed, epoch, global batch size) to global batches, and a rank's
slice of each. Nothing here depends on the number of workers but the slice, so every world size sees the same batches.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def epoch_order(rows: int, seed: int, epoch: int) -> Rows:
    """A permutation of 0..rows-1, int64 (rows,), the same on every machine and in every numpy release.

    It sorts the raw output of the counter-based generator Philox (Salmon et al., 2011), keyed by seed and epoch:
    numpy promises that stream never to change, and does not promise it for Generator.permutation.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(rows)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def share(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """Start and stop of rank's share of `total` things in a row; the shares differ by one at most."""
    return total * rank // world_size, total * (rank + 1) // world_size


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """Number of global batches in an epoch, the short last one included."""
    return -(-rows // global_batch_size)


def rank_batches(rows: int, global_batch_size: int, rank: int, world_size: int) -> Iterator[tuple[int, int, int]]:
    """For each global batch of an epoch of `rows` rows: start and stop, in the epoch's order, of this rank's slice
    (maybe empty), and the size of the whole batch."""
    for first in range(0, rows, global_batch_size):
        batch = min(global_batch_size, rows - first)
        start, stop = share(batch, rank, world_size)
        yield first + start, first + stop, batch
