"""IDX, the format MNIST and its followers are published in (described at the end of LeCun's MNIST page).

Files are mapped, not read, and written a few rows at a time, so that memory stays small however large they are.
"""

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

Pixels = npt.NDArray[np.uint8]

# The third byte of a file, and the numbers it announces: big-endian, as all of IDX.
_UINT8 = (0x08, np.dtype(np.uint8))
_INT32 = (0x0C, np.dtype(">i4"))


def open_idx(file: Path, ndim: int) -> Pixels:
    """The uint8 array of `ndim` dimensions in an IDX file, mapped read-only.

    Raises DataError for a wrong magic number, a header or body cut short, and bytes left over; FileNotFoundError.
    """
    return _open(file, ndim, *_UINT8)


def open_int_idx(file: Path, ndim: int) -> npt.NDArray[np.int32]:
    """As `open_idx`, for big-endian int32: QMNIST's labels."""
    return _open(file, ndim, *_INT32)


def _open(file: Path, ndim: int, code: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    name, magic, header = file.name, bytes([0, 0, code, ndim]), 4 + 4 * ndim
    with file.open("rb") as stream:
        head = stream.read(header)
        found = stream.seek(0, 2)
    if head[:4] != magic:
        raise DataError(
            f"{name}: its first bytes are 0x{head[:4].hex()}, not the IDX magic 0x{magic.hex()} of a "
            f"{ndim}-dimensional {dtype.name} array; point source at the original IDX files"
        )
    if len(head) < header:
        raise DataError(f"{name}: truncated inside its header ({len(head)} of {header} bytes); fetch it again")
    shape = struct.unpack(f">{ndim}I", head[4:])
    expected = header + math.prod(shape) * dtype.itemsize
    if found < expected:
        raise DataError(f"{name}: truncated, {found} bytes where its header promises {expected}; fetch it again")
    if found > expected:
        raise DataError(
            f"{name}: {found - expected} bytes more than the {expected} its header promises; fetch it again"
        )
    try:
        if 0 in shape:  # nothing to map
            return np.zeros(shape, dtype)
        return np.memmap(file, dtype, "r", offset=header, shape=shape)
    except ValueError:  # a size of 0 beside sizes that numpy cannot count
        raise DataError(f"{name}: its header claims the impossible shape {shape}; fetch it again") from None


def read_pair(images_file: Path, labels_file: Path, n_classes: int) -> tuple[Pixels, Pixels]:
    """The images uint8 (N, height, width) and labels uint8 (N,) of one split, mapped and checked against each other.

    Raises DataError for files that are not IDX, for counts that disagree, and for a label outside 0..n_classes-1.
    """
    images, labels = open_idx(images_file, 3), open_idx(labels_file, 1)
    if len(images) != len(labels):
        raise DataError(
            f"{images_file.name} holds {len(images)} images but {labels_file.name} {len(labels)} labels; "
            "fetch both from the same place"
        )
    if len(images) == 0:
        raise DataError(f"{images_file.name} holds no image; fetch it again")
    wrong = np.flatnonzero(labels >= n_classes)
    if len(wrong):
        raise DataError(
            f"{labels_file.name}: label {labels[wrong[0]]} at row {wrong[0]} is outside 0..{n_classes - 1}; "
            "use the labels that belong to this dataset"
        )
    return images, labels


class IdxWriter:
    """Writes an IDX file of uint8, its whole shape known ahead, some rows at a time and in any order.

    It writes with seek and write rather than to a mapping: on a full disk that is an OSError, not a SIGBUS.
    """

    def __init__(self, file: Path, shape: Sequence[int]) -> None:
        self._row = math.prod(shape[1:])
        self._header = 4 + 4 * len(shape)
        self._next = 0
        self._stream = file.open("wb")
        self._stream.write(struct.pack(f">BBBB{len(shape)}I", 0, 0, _UINT8[0], len(shape), *shape))
        self._stream.truncate(self._header + math.prod(shape))

    def __enter__(self) -> "IdxWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def append(self, rows: Pixels) -> None:
        """Write rows uint8 (n, …) after those appended before."""
        self._stream.seek(self._header + self._next * self._row)
        self._stream.write(np.ascontiguousarray(rows).data)
        self._next += len(rows)

    def put(self, rows: Pixels, at: npt.NDArray[np.int64]) -> None:
        """Write each of the rows uint8 (n, …) at its row number in `at` (n,)."""
        for row, number in zip(np.ascontiguousarray(rows), at.tolist(), strict=True):
            self._stream.seek(self._header + number * self._row)
            self._stream.write(row.data)
