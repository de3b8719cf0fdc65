"""Images to predict, as many as there may be: found wherever they lie, cut into units, and read a unit at a time.

Only names are ever held for all of a source: of the pictures in a folder, or of Parquet files with their row groups.
"""

import contextlib
import fnmatch
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pipeline.errors import ConfigError, DataError, StorageError, first_line
from pipeline.idx import Pixels
from pipeline.own import THREADS, check_inside, shown
from pipeline.pictures import MAX_PIXELS, SUFFIXES
from pipeline.predict import Form, prepare_batch
from pipeline.storage import LocalStore, Store, open_store
from pipeline.tables import BUFFER, check_images, is_encoded

TABLE = ".parquet"
ACCEPTED = f"a source is a folder or s3://bucket/prefix with {', '.join(SUFFIXES)} or {TABLE}, or one such file"
# Rows of a unit: a second or two of work, and a file of predictions. Row groups are not cut: a unit may have more.
UNIT_PIXELS, UNIT_PICTURES = 16_384, 4_096
READ_PIXELS, READ_PICTURES = 1_000, 256  # in memory at once
RESIZE = "give encoded pictures, which are resized to the model's"
LARGEST = 8 * MAX_PIXELS  # bytes of a picture: four channels of 16 bits, not compressed


class Unit(BaseModel):
    """What is read in one go: some pictures, or some row groups of a Parquet file, whose first row is `first_row`.
    Those in `huge` are too large to be pictures."""

    model_config = ConfigDict(frozen=True)

    number: int
    keys: tuple[str, ...]
    huge: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    first_row: int = 0
    rows: int


@dataclass(frozen=True)
class Feed:
    """A source: where it is, its units, and a digest (sha256, hex) of its files' names, sizes and times of change: it
    tells one state of the source from another, with nothing read."""

    store: Store
    whole: bool  # all that the store holds, not a single file or a pattern
    units: list[Unit]
    digest: str

    @property
    def images(self) -> int:
        """Rows in all of it."""
        return sum(unit.rows for unit in self.units)


class Slice(NamedTuple):
    """Images uint8 (n, size, size) of a unit: the file of each and its row there, 0 for a picture. Those that cannot be
    read are black, and in `bad` by index, with the reason."""

    paths: list[str]
    rows: npt.NDArray[np.uint64]
    images: Pixels
    bad: dict[int, str]


class _File(NamedTuple):
    key: str
    size: int
    stamp: str


def find_feed(source: str, column: str, size: int) -> Feed:
    """Recognise a source by what it holds, for a model of images (size, size).

    Raises ConfigError for one that is not there or holds nothing to predict, DataError for Parquet whose `column` holds
    no images that fit.
    """
    store, whole, names, huge, digest = _survey(source)
    if names[0].lower().endswith(TABLE):
        with ThreadPoolExecutor(THREADS) as pool:
            parts = [part for found in pool.map(partial(_groups, store, column, size), names) for part in found]
    else:
        parts = [
            Unit(number=0, keys=keys, huge=tuple(filter(huge.__contains__, keys)), rows=len(keys))
            for keys in _chunks(names, UNIT_PICTURES)
        ]
    if not parts:
        raise ConfigError("source", source, "its Parquet files have no rows", "name one that has images")
    units = [part.model_copy(update={"number": number}) for number, part in enumerate(parts)]
    return Feed(store, whole, units, digest)


def source_digest(source: str) -> str:
    """The digest that `find_feed` would give now."""
    return _survey(source)[-1]


def read_unit(store: Store, unit: Unit, column: str, size: int, form: Form, pool: Executor) -> Iterator[Slice]:
    """The images of a unit, a few in memory at a time. Raises DataError for a file that is torn."""
    if not unit.groups:

        def read(key: str) -> bytes:
            if key in unit.huge:
                raise DataError(f"more than {LARGEST:,} bytes")
            return store.read(key)

        for keys in _chunks(unit.keys, READ_PICTURES):
            images, bad = prepare_batch(pool, keys, read, size, form)
            yield Slice(list(keys), np.zeros(len(keys), np.uint64), images, bad)
        return
    (key,) = unit.keys
    row = unit.first_row
    with _opened(store, key) as file:
        encoded = is_encoded(file.schema_arrow.field(column).type)
        batches = file.iter_batches(
            READ_PICTURES if encoded else READ_PIXELS, row_groups=list(unit.groups), columns=[column], use_threads=False
        )
        for values in _to_its_end(store, key, batches):
            images, bad = read_column(values.column(0), size, form, pool)
            rows = np.arange(row, row + len(images), dtype=np.uint64)
            yield Slice([key] * len(images), rows, images, bad)
            row += len(images)


def read_column(values: Any, size: int, form: Form, pool: Executor) -> tuple[Pixels, dict[int, str]]:
    """Images uint8 (n, size, size) of an Arrow array of encoded pictures, prepared, or of raw pixels, as they are; and
    by index what is wrong with those that are none, which are black."""
    if pa.types.is_struct(values.type):
        values = pc.struct_field(values, "bytes")  # null where the struct is
    if isinstance(values.type, pa.FixedShapeTensorType):
        values = values.storage
    wrong = {int(index): "null" for index in np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))}
    if is_encoded(values.type):
        images, bad = prepare_batch(pool, values, lambda value: value.as_py() or b"", size, form)
        return images, bad | wrong
    if not pa.types.is_fixed_size_binary(values.type):
        lengths = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
        other = np.flatnonzero(lengths != size * size)
        wrong = {int(index): f"{lengths[index]} pixels, not {size}x{size}" for index in other} | wrong
    good = np.ones(len(values), np.bool_)
    good[list(wrong)] = False
    if wrong:
        values = values.filter(pa.array(good))
    images = np.zeros((len(good), size, size), np.uint8)
    if pa.types.is_fixed_size_binary(values.type):
        start, stop = values.offset * size * size, (values.offset + len(values)) * size * size
        flat = np.frombuffer(values.buffers()[1] or b"", np.uint8)[start:stop]
    else:
        flat = values.flatten()
        if flat.null_count:
            holed = flat.is_null().to_numpy(zero_copy_only=False).reshape(-1, size * size).any(axis=1)
            wrong |= {int(index): "a null pixel" for index in np.flatnonzero(good)[holed]}
        flat = flat.fill_null(0).to_numpy(zero_copy_only=False)
    images[good] = flat.reshape(-1, size, size)
    images[list(wrong)] = 0
    return images, dict(sorted(wrong.items()))


def _survey(source: str) -> tuple[Store, bool, list[str], set[str], str]:
    """Where a source is, whether it is all there is, the names of its files in their order and of those that are too
    large to be pictures, and its digest."""
    store, whole, files = _list(source)
    digest, names, huge, kinds = hashlib.sha256(), [], set(), set()
    for file in files:
        suffix = file.key[file.key.rfind(".") :].lower()
        if suffix in (TABLE, *SUFFIXES):
            kinds.add(suffix == TABLE)
            names.append(file.key)
            if file.size > LARGEST:
                huge.add(file.key)
            try:
                digest.update(f"{file.key}\0{file.stamp}\0".encode())
            except UnicodeEncodeError:  # nor could Parquet hold it
                raise DataError(f"{shown(store.locate(file.key))}: its name is not UTF-8; give it another") from None
    if not names:
        raise ConfigError("source", source, "there is nothing to predict", ACCEPTED)
    if len(kinds) > 1:
        raise ConfigError("source", source, "it holds both pictures and Parquet", "name a folder that holds one kind")
    return store, whole, names, huge, digest.hexdigest()


def _list(source: str) -> tuple[Store, bool, Iterator[_File]]:
    """The store that a source is in; whether it is all of that, not a single file or a pattern; its files in order."""
    try:
        parent, slash, name = source.rstrip("/").rpartition("/")
        pattern = any(sign in name for sign in "*?")
        name = unquote(name) if source.startswith("file:") else name  # as open_store does of what is above
        whole = parent.endswith(":/")  # a bucket
        above = open_store(parent or slash or ".", "source") if not whole and (pattern or "." in name) else None
        if above is not None and (pattern or above.exists(name)):
            return above, False, _files(above, name, pattern)
        store = open_store(source, "source")
    except ConfigError as error:
        if error.args[0] != "source":
            raise
        raise ConfigError("source", source, error.args[2], ACCEPTED) from None
    if isinstance(store, LocalStore) and not Path(store.root).is_dir():
        raise ConfigError("source", source, "no such file or folder", ACCEPTED)
    return store, True, _files(store)


def _files(store: Store, name: str = "", pattern: bool = False) -> Iterator[_File]:
    """All files of a store, but for hidden ones, with what changes when they do; or of those that lie in no folder of
    it, the one of this name, or all that fit it."""
    fits = partial(fnmatch.fnmatchcase, pat=name) if pattern else name.__eq__
    if isinstance(store, LocalStore):
        yield from _walk(Path(store.root), Path(store.root), "", not name, fits)
        return
    store.exists("")  # explains why, if the store is out of reach
    try:
        if not name:
            found = list(store.fs.find(store.root, detail=True).values())
        else:  # not fs.find with a depth: to it a folder that cannot be listed is empty
            found = store.fs.ls(store.root, detail=True) if pattern else [store.fs.info(store.path(name))]
    except Exception as error:  # botocore's errors are known to pipeline.storage alone
        if name and isinstance(error, FileNotFoundError):
            return
        raise StorageError(f"{store.url}: cannot be listed ({first_line(error)}); check the server") from error
    for info in sorted(found, key=lambda info: str(info["name"])):
        key = info["name"].removeprefix(store.root + "/")
        hidden = any(part.startswith(".") for part in key.split("/"))
        if info["type"] == "file" and not hidden and (not name or fits(key)):
            yield _File(key, info["size"], f"{info['size']} {info.get('ETag')}")


def _walk(root: Path, folder: Path, prefix: str, deep: bool, fits: Callable[[str], bool]) -> Iterator[_File]:
    """As `own.walk`, but a folder's names are all that is held: a million files are no reason for a gigabyte."""
    try:
        for name in sorted((path.name for path in folder.iterdir()), key=os.fsencode):
            path = folder / name
            if name.startswith(".") or (not deep and not fits(name)):
                continue
            if path.is_symlink():
                check_inside(path, root)
            found = path.stat()
            if stat.S_ISDIR(found.st_mode):
                if not deep:
                    continue
                if path.is_symlink():
                    raise DataError(f"{shown(str(path))}: a link to a folder; put the folder there itself")
                yield from _walk(root, path, f"{prefix}{name}/", deep, fits)
            elif stat.S_ISREG(found.st_mode):
                yield _File(prefix + name, found.st_size, f"{found.st_size} {found.st_mtime_ns}")
    except OSError as error:
        raise DataError(f"{shown(str(error.filename))}: {error.strerror}; check its owner and mode") from None


def _groups(store: Store, column: str, size: int, key: str) -> list[Unit]:
    """The units of one Parquet file, once its column is found to hold images that fit."""
    with _opened(store, key) as file:
        encoded = check_images(file.schema_arrow, column, size, shown(store.locate(key)), RESIZE)
        most = UNIT_PICTURES if encoded else UNIT_PIXELS
        counts = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
    units: list[Unit] = []
    row = 0
    for group, rows in enumerate(counts):
        last = units[-1] if units else None
        if last is not None and last.rows + rows <= most:
            units[-1] = last.model_copy(update={"groups": (*last.groups, group), "rows": last.rows + rows})
        elif rows:
            units.append(Unit(number=0, keys=(key,), groups=(group,), first_row=row, rows=rows))
        row += rows
    return units


@contextlib.contextmanager
def _opened(store: Store, key: str) -> Iterator[pq.ParquetFile]:
    with contextlib.ExitStack() as stack:
        with _explained(store, key, "no readable Parquet file"):
            # Not by pyarrow's filesystem, to which a file is not there when the server is not.
            source = stack.enter_context(store.fs.open(store.path(key)))
            file = stack.enter_context(pq.ParquetFile(source, pre_buffer=False, buffer_size=BUFFER))
        yield file


def _to_its_end(store: Store, key: str, batches: Iterator[Any]) -> Iterator[Any]:
    with _explained(store, key, "cannot be read to its end"):
        yield from batches


@contextlib.contextmanager
def _explained(store: Store, key: str, what: str) -> Iterator[None]:
    """Whether it is the file that is torn or the store that failed, for pyarrow lets through what that raises."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        where, reason = shown(store.locate(key)), first_line(error)
        if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):  # pyarrow's own
            raise DataError(f"{where}: {what} ({reason}); write it again") from None
        may_pass = not isinstance(error, FileNotFoundError | PermissionError)
        raise StorageError(
            f"{where}: cannot be read ({reason}); check the disk or server", may_pass=may_pass
        ) from error


def _chunks(names: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(names[start : start + size]) for start in range(0, len(names), size))
