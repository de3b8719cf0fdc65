"""Proves that IDX files come back as they were written, and that each kind of damage has its own one-line error."""

import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pipeline.errors import DataError
from pipeline.idx import IdxWriter, Pixels, open_idx, open_int_idx, read_pair


def idx_bytes(array: Pixels) -> bytes:
    """IDX as the MNIST page describes it: two zeros, type 8, number of dimensions, big-endian sizes, the bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def opened(data: bytes, ndim: int) -> Pixels:
    """What `open_idx` finds in a file named x of these bytes. The mapping outlives the file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x"
        file.write_bytes(data)
        return open_idx(file, ndim)


IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([0, 9, 1], dtype=np.uint8)


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[bytes, bytes], tuple[Path, Path]]:
    def write(images: bytes, labels: bytes) -> tuple[Path, Path]:
        (tmp_path / "images").write_bytes(images)
        (tmp_path / "labels").write_bytes(labels)
        return tmp_path / "images", tmp_path / "labels"

    return write


def message_of(raised: pytest.ExceptionInfo[DataError]) -> str:
    message = str(raised.value)
    assert "\n" not in message
    return message


@given(arrays(np.uint8, array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=20)))
def test_an_array_comes_back_as_it_was_written(array: Pixels) -> None:
    parsed = opened(idx_bytes(array), array.ndim)
    assert parsed.dtype == np.uint8
    assert np.array_equal(parsed, array)
    assert parsed.shape == array.shape


@given(data=st.data())
def test_a_file_cut_short_anywhere_is_refused(data: st.DataObject) -> None:
    whole = idx_bytes(IMAGES)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(DataError, match=r"^x: ") as raised:
        opened(whole[:cut], 3)
    assert ("truncated" in message_of(raised)) == (cut >= 4)  # less than 4 bytes hold no magic number


@given(st.lists(st.integers(1, 2**32 - 1), min_size=3, max_size=3), st.binary(max_size=50))
def test_a_header_that_lies_about_its_size_is_refused(shape: list[int], body: bytes) -> None:
    header = struct.pack(">BBBB3I", 0, 0, 8, 3, *shape)
    size = shape[0] * shape[1] * shape[2]
    if size == len(body):
        assert opened(header + body, 3).size == size
    else:
        with pytest.raises(DataError, match="its header promises"):
            opened(header + body, 3)


def test_a_header_of_more_bytes_than_64_bits_can_count_is_refused() -> None:
    header = struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 4)
    with pytest.raises(DataError, match=r"^x: truncated, 16 bytes where its header promises 18446744073709551632; "):
        opened(header, 3)


def test_a_header_of_no_bytes_in_a_shape_beyond_arrays_is_refused() -> None:
    header = struct.pack(">BBBB3I", 0, 0, 8, 3, 0, 2**32 - 1, 2**32 - 1)
    with pytest.raises(DataError, match=r"^x: its header claims the impossible shape \(0, 4294967295, 4294967295\); "):
        opened(header, 3)


@pytest.mark.parametrize(
    ("data", "ndim", "complaint"),
    [
        (idx_bytes(LABELS), 3, "x: its first bytes are 0x00000801, not the IDX magic 0x00000803"),
        (b"\x1f\x8b\x08\x00rest", 1, "x: its first bytes are 0x1f8b0800, not the IDX magic 0x00000801"),
        (b"", 1, "x: its first bytes are 0x, not the IDX magic"),
        (idx_bytes(IMAGES)[:10], 3, "x: truncated inside its header (10 of 16 bytes); fetch it again"),
        (idx_bytes(IMAGES)[:-1], 3, "x: truncated, 75 bytes where its header promises 76; fetch it again"),
        (idx_bytes(LABELS) + b"ab", 1, "x: 2 bytes more than the 11 its header promises; fetch it again"),
    ],
)
def test_damage_is_named_with_file_and_remedy(data: bytes, ndim: int, complaint: str) -> None:
    with pytest.raises(DataError) as raised:
        opened(data, ndim)
    assert message_of(raised).startswith(complaint)
    assert "; " in message_of(raised)


def test_a_pair_comes_back_as_it_was_written(pair: Callable[[bytes, bytes], tuple[Path, Path]]) -> None:
    images, labels = read_pair(*pair(idx_bytes(IMAGES), idx_bytes(LABELS)), n_classes=10)
    assert np.array_equal(images, IMAGES)
    assert np.array_equal(labels, LABELS)


@pytest.mark.parametrize(
    ("images", "labels", "complaint"),
    [
        (IMAGES[:2], LABELS, "images holds 2 images but labels 3 labels; fetch both from the same place"),
        (IMAGES[:0], LABELS[:0], "images holds no image; fetch it again"),
        (
            IMAGES,
            LABELS + np.uint8(1),
            "labels: label 10 at row 1 is outside 0..9; use the labels that belong to this dataset",
        ),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    pair: Callable[[bytes, bytes], tuple[Path, Path]], images: Pixels, labels: Pixels, complaint: str
) -> None:
    with pytest.raises(DataError) as raised:
        read_pair(*pair(idx_bytes(images), idx_bytes(labels)), n_classes=10)
    assert message_of(raised) == complaint


def test_a_file_is_mapped_and_not_to_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(idx_bytes(IMAGES))
    images = open_idx(tmp_path / "x", 3)
    assert isinstance(images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images[0, 0, 0] = 1


def test_a_file_that_is_not_there_is_no_data_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_idx(tmp_path / "x", 3)


@given(arrays(np.int32, array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9)))
def test_big_endian_integers_come_back_as_they_were_written(array: npt.NDArray[np.int32]) -> None:
    data = struct.pack(f">BBBB{array.ndim}I", 0, 0, 12, array.ndim, *array.shape) + array.astype(">i4").tobytes()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x"
        file.write_bytes(data)
        assert np.array_equal(open_int_idx(file, array.ndim), array)
        file.write_bytes(data + b"a")
        with pytest.raises(DataError, match="^x: 1 bytes more than"):
            open_int_idx(file, array.ndim)
    with pytest.raises(DataError, match=f"not the IDX magic 0x0000080{array.ndim} of a {array.ndim}-dimensional uint8"):
        opened(data, array.ndim)


@given(arrays(np.uint8, array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=20)), st.data())
def test_rows_written_in_any_order_and_portion_come_back(array: Pixels, data: st.DataObject) -> None:
    portion = data.draw(st.integers(1, len(array)))
    order = np.array(data.draw(st.permutations(range(len(array)))))
    with tempfile.TemporaryDirectory() as folder:
        appended, put = Path(folder) / "appended", Path(folder) / "put"
        with IdxWriter(appended, array.shape) as one, IdxWriter(put, array.shape) as other:
            for start in range(0, len(array), portion):
                one.append(array[start : start + portion])
                rows = order[start : start + portion]
                other.put(array[rows], rows)
        assert appended.read_bytes() == put.read_bytes() == idx_bytes(array)


def test_rows_need_not_lie_side_by_side_in_memory(tmp_path: Path) -> None:
    turned = IMAGES.transpose(0, 2, 1)
    with IdxWriter(tmp_path / "x", turned.shape) as writer:
        writer.append(turned[:1])
        writer.put(turned[1:], np.array([1, 2]))
    assert np.array_equal(open_idx(tmp_path / "x", 3), turned)


def test_a_file_that_got_too_many_rows_is_refused(tmp_path: Path) -> None:
    with IdxWriter(tmp_path / "x", IMAGES.shape) as writer:
        writer.append(np.concatenate([IMAGES, IMAGES]))
    with pytest.raises(DataError, match="more than"):
        open_idx(tmp_path / "x", 3)
