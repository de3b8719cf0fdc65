"""Parquet with a column of images and one of labels, read a batch at a time."""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import pictures
from pipeline.errors import DataError, first_line
from pipeline.idx import Pixels
from pipeline.own import BATCH, MAX_CLASSES, Batch, Found, SourceFile, check_classes, shown
from pipeline.source import SourceConfig

LABELS_BATCH = 65536
# Bytes of a column read at once. By itself pyarrow reads all that a row group has of it: 347 MiB where it is now 50. On
# S3, s3fs reads 50 MiB ahead, so these are no more requests: 8 for 299 MiB.
BUFFER = 2**20
IMAGES_ACCEPTED = (
    "encoded PNG or JPEG (binary, or a struct with bytes), or raw uint8 pixels (fixed_size_binary, list, tensor)"
)


def find_tables(files: Sequence[SourceFile], config: SourceConfig, pool: Executor) -> Found:
    """The images and labels in Parquet files, by the splits that their names or folders tell: train… and test….

    Integer labels are classes 0 to n-1, by the names that Hugging Face's metadata has for them, if any; text labels
    are classes in the order of their names. Raises DataError for a wrong schema or value, with file and row.
    """
    parts = _split(files)
    for file in parts["train"] + parts.get("test", []):
        _check_schema(file, config)
    classes, labels = _read_labels(parts, config.label_column)
    kind = _schema(parts["train"][0]).field(config.image_column).type
    conversion: dict[str, str | int | float] = {
        "form": "Parquet",
        "image_size": config.image_size,
        "image_column": config.image_column,
        "label_column": config.label_column,
    }
    if is_encoded(kind):
        conversion |= pictures.CONVERSION

    def batches(split: str) -> Iterator[Batch]:
        for file in parts[split]:
            for row, column in _columns(file, config.image_column, BATCH):
                yield _decode(column, config.image_size, pool, f"{shown(file.name)}, {config.image_column}", row)

    return Found([file for split in parts for file in parts[split]], classes, labels, batches, conversion)


def _split(files: Sequence[SourceFile]) -> dict[str, list[SourceFile]]:
    """The files of each split; what belongs to neither is left out. All are train when none says so."""
    found: dict[str, list[SourceFile]] = {"train": [], "test": []}
    for file in files:
        *folders, name = file.name.lower().split("/")
        said = [folder for folder in folders if folder in found]
        prefix = re.match(r"(train|test)(?![a-z])", name)
        if said or prefix:
            found[said[0] if said else str(prefix and prefix[1])].append(file)
    if not found["train"]:
        if found["test"] and len(files) > 1:
            raise DataError(f"{shown(found['test'][0].name)}: a test split, but none to train on; add train*.parquet")
        return {"train": list(files)}
    return {split: members for split, members in found.items() if members}


def _open(file: SourceFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file.path, pre_buffer=False, buffer_size=BUFFER)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{shown(file.name)}: no readable Parquet file ({first_line(error)})") from None


def _schema(file: SourceFile) -> pa.Schema:
    with _open(file) as table:
        return table.schema_arrow


def _check_schema(file: SourceFile, config: SourceConfig) -> None:
    schema, where = _schema(file), shown(file.name)
    check_images(schema, config.image_column, config.image_size, where, _other_size(config.image_size))
    label = _column_type(schema, config.label_column, "label_column", where)
    plain = label.value_type if pa.types.is_dictionary(label) else label
    if not (pa.types.is_integer(plain) or _is_text(plain)):
        raise DataError(f"{where}, {config.label_column}: {label} is no label; it has to be integers or text")


def _read_labels(parts: dict[str, list[SourceFile]], column: str) -> tuple[tuple[str, ...], dict[str, Pixels]]:
    """Classes, and labels uint8 (N,) by split, checked."""
    first = _schema(parts["train"][0])
    kind = first.field(column).type
    text = _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind)
    known: dict[str, int] = {}  # text labels by their order of appearance
    labels: dict[str, Pixels] = {}
    names = None if text else _names(first, column)
    for split, files in parts.items():
        read = [np.zeros(0, np.uint8)]
        for file in files:
            where = f"{shown(file.name)}, {column}"
            for row, values in _columns(file, column, LABELS_BATCH):
                try:
                    values.validate(full=True)
                except pa.ArrowInvalid as error:
                    reason = first_line(error)
                    raise DataError(f"{where}: unreadable from row {row} on ({reason}); store text as UTF-8") from None
                values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
                if values.null_count:
                    raise DataError(f"{where}: null at row {row + _first(values.is_null())}; give every image a label")
                if _is_text(values.type) is not text:
                    raise DataError(f"{where}: {values.type}, but {kind} in {shown(parts['train'][0].name)}; use one")
                if text:
                    read.append(_number(values, known, where, row, may_add=split == "train"))
                else:
                    read.append(_check_integers(values, None if names is None else len(names), where, row))
        labels[split] = np.concatenate(read)
        if not len(labels[split]):
            raise DataError(f"{shown(files[0].name)}: no rows in the {split} split; add images")
        if names is None and not text:  # those of train, which comes first
            names = [str(number) for number in range(int(labels["train"].max()) + 1)]
    where = shown(parts["train"][0].name)
    if names is not None:
        check_classes(names, where)
        return tuple(names), labels
    classes = sorted(known)
    check_classes(classes, where)
    final = np.zeros(len(classes), np.uint8)
    final[[known[name] for name in classes]] = np.arange(len(classes), dtype=np.uint8)
    return tuple(classes), {split: final[numbers] for split, numbers in labels.items()}


def _number(values: pa.Array, known: dict[str, int], where: str, row: int, may_add: bool) -> Pixels:
    encoded = values.dictionary_encode()
    words = encoded.dictionary.to_pylist()
    for index, word in enumerate(words):
        if word in known:
            continue
        at = row + _first(pc.equal(encoded.indices, index))
        if not may_add:
            raise DataError(f"{where}: class {shown(word)[:100]!r} at row {at} is not in train; add it there")
        if len(known) == MAX_CLASSES:
            raise DataError(f"{where}: more than {MAX_CLASSES} classes at row {at}; is this the column of labels?")
        known[word] = len(known)
    numbers = np.array([known[word] for word in words], np.uint8)
    return np.asarray(numbers[encoded.indices.to_numpy(zero_copy_only=False)])


def _check_integers(values: pa.Array, count: int | None, where: str, row: int) -> Pixels:
    numbers = values.to_numpy(zero_copy_only=False)
    last = MAX_CLASSES - 1 if count is None else count - 1
    wrong = (numbers < 0) | (numbers > last)
    if wrong.any():
        at = int(wrong.argmax())
        raise DataError(f"{where}: label {numbers[at]} at row {row + at} is outside 0..{last}; number classes from 0")
    return np.asarray(numbers.astype(np.uint8))


def _names(schema: pa.Schema, column: str) -> list[str] | None:
    """The classes' names in the metadata that Hugging Face's datasets writes, if they are there and usable."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    usable = isinstance(told, list) and all(isinstance(name, str) for name in told) and len(set(told)) == len(told)
    return told if usable and len(told) <= MAX_CLASSES else None


def _columns(file: SourceFile, column: str, rows: int) -> Iterator[tuple[int, Any]]:
    """Row number of the first value, counted from 0 in the file, and the values, a batch at a time."""
    with _open(file) as table:
        row = 0
        try:
            for batch in table.iter_batches(rows, columns=[column], use_threads=False):
                values = batch.column(batch.schema.get_field_index(column))
                yield row, values
                row += len(values)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{shown(file.name)}: cannot be read after row {row} ({first_line(error)})") from None


def _decode(values: Any, size: int, pool: Executor, where: str, row: int) -> Batch:
    """The images of a batch whose first row has number `row`. Raises DataError for nulls and wrong pixel counts."""
    if pa.types.is_struct(values.type):
        values = pc.struct_field(values, "bytes")  # null where the struct is
    if values.null_count:
        raise DataError(f"{where}: null at row {row + _first(values.is_null())}; give every label an image")
    if is_encoded(values.type):
        return pictures.decode_batch(pool, values.to_pylist(), size)
    if pa.types.is_fixed_size_binary(values.type):
        width = size * size
        pixels = np.frombuffer(values.buffers()[1], np.uint8)[values.offset * width :][: len(values) * width]
        return Batch(pixels.reshape(-1, size, size), {})
    if isinstance(values.type, pa.FixedShapeTensorType):
        values = values.storage
    lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
    wrong = lengths != size * size
    if wrong.any():
        at = int(wrong.argmax())
        raise DataError(
            f"{where}: {lengths[at]} pixels at row {row + at} where {size}x{size} are {size * size}; "
            f"{_other_size(size)}"
        )
    flat = values.flatten()
    if flat.null_count:
        raise DataError(f"{where}: a null pixel at row {row + _first(flat.is_null()) // (size * size)}")
    return Batch(flat.to_numpy(zero_copy_only=False).reshape(-1, size, size), {})


def check_images(schema: pa.Schema, column: str, size: int, where: str, resize: str) -> bool:
    """Whether a column's images are encoded. Raises DataError for a column that is missing, or holds no images of size
    x size as far as its type tells; `resize` is what to do about another size."""
    kind = _column_type(schema, column, "image_column", where)
    where = f"{where}, {column}"
    if is_encoded(kind):
        return True
    if not _is_raw(kind):
        raise DataError(f"{where}: {kind} is not images; they have to be {IMAGES_ACCEPTED}")
    pixels = size * size
    if pa.types.is_fixed_size_binary(kind):
        pixels = kind.byte_width
    elif pa.types.is_fixed_size_list(kind):
        pixels = kind.list_size
    elif isinstance(kind, pa.FixedShapeTensorType):
        # A channel of 1 may stand anywhere, in how the values lie and in how they are meant.
        axes = zip(kind.shape, kind.permutation or range(len(kind.shape)), strict=True)
        kept = [(side, axis) for side, axis in axes if side != 1]
        if [side for side, _ in kept] not in ([size, size], [size * size]):
            raise DataError(f"{where}: tensors of shape {kind.shape}, not {size}x{size}; {resize}")
        if kept[0][1] > kept[-1][1]:
            raise DataError(f"{where}: tensors with rows and columns exchanged; store them row by row")
    if pixels != size * size:
        raise DataError(f"{where}: {pixels} pixels where {size}x{size} are {size * size}; {resize}")
    return False


def _column_type(schema: pa.Schema, column: str, option: str, where: str) -> pa.DataType:
    if schema.names.count(column) != 1:
        has = ", ".join(map(shown, schema.names)) or "none"
        raise DataError(f"{where}: has no column {column!r} (but {has}); name it with {option}")
    return schema.field(column).type


def is_encoded(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold encoded pictures."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_encoded(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_raw(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold raw uint8 pixels."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return bool(kind.value_type == pa.uint8())
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(pa.types.is_fixed_size_binary(kind) or (lists and kind.value_type == pa.uint8()))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _first(mask: Any) -> int:
    return int(np.argmax(mask.to_numpy(zero_copy_only=False)))


def _other_size(size: int) -> str:
    return f"set image_size to {60 - size}, or give encoded pictures, which are resized"
