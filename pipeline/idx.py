"""Reading IDX, the format MNIST and its followers are published in (described at the end of LeCun's MNIST page)."""

import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

Pixels = npt.NDArray[np.uint8]

_UINT8 = 0x08


def parse_idx(data: bytes, ndim: int, name: str) -> Pixels:
    """Decode the bytes of an IDX file of unsigned bytes with `ndim` dimensions; `name` is for the error.

    Raises DataError for a wrong magic number, a header or body cut short, and bytes left over.
    """
    magic = bytes([0, 0, _UINT8, ndim])
    if data[:4] != magic:
        raise DataError(
            f"{name}: its first bytes are 0x{data[:4].hex()}, not the IDX magic 0x{magic.hex()} of a "
            f"{ndim}-dimensional uint8 array; point source at the original IDX files"
        )
    header = 4 + 4 * ndim
    if len(data) < header:
        raise DataError(f"{name}: truncated inside its header ({len(data)} of {header} bytes); fetch it again")
    shape = struct.unpack(f">{ndim}I", data[4:header])
    expected, found = header + math.prod(shape), len(data)
    if found < expected:
        raise DataError(f"{name}: truncated, {found} bytes where its header promises {expected}; fetch it again")
    if found > expected:
        raise DataError(
            f"{name}: {found - expected} bytes more than the {expected} its header promises; fetch it again"
        )
    try:
        return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
    except ValueError:  # a size of 0 beside sizes that numpy cannot count
        raise DataError(f"{name}: its header claims the impossible shape {shape}; fetch it again") from None


def read_pair(images_file: Path, labels_file: Path, n_classes: int) -> tuple[Pixels, Pixels]:
    """The images uint8 (N, height, width) and labels uint8 (N,) of one split, checked against each other.

    Raises DataError for files that are not IDX, for counts that disagree, and for a label outside 0..n_classes-1.
    """
    images = parse_idx(images_file.read_bytes(), 3, images_file.name)
    labels = parse_idx(labels_file.read_bytes(), 1, labels_file.name)
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
