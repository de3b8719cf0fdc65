"""The user's own data, a folder of pictures or IDX files or Parquet, converted to the IDX files that all else reads.

Images pass through a batch at a time. Nothing is seen in the cache before it is whole; unchanged data is not converted
again.
"""

import contextlib
import gzip
import json
import logging
import os
import re
import shutil
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from tqdm import tqdm  # type: ignore[import-untyped]

from pipeline.errors import ConfigError, DataError
from pipeline.idx import IdxWriter, open_idx, read_pair
from pipeline.order import Rows, hold_out, permutation
from pipeline.own import (
    BATCH,
    THREADS,
    Batch,
    Found,
    SourceFile,
    check_classes,
    check_inside,
    check_no_class_is_empty,
    shown,
    walk,
)
from pipeline.pictures import SUFFIXES, find_pictures
from pipeline.source import (
    FILES,
    IMAGES,
    LABELS,
    SPLITS,
    SourceConfig,
    SourceFacts,
    file_sha256,
    leave,
    open_source,
    read_facts,
    write_facts,
)
from pipeline.storage import open_store, sha256
from pipeline.tables import find_tables

log = logging.getLogger(__name__)

KEPT_S = 3 * 24 * 3600
SHUFFLE = 1  # the stream of random numbers for the order of rows, next to hold_out's
ACCEPTED = (
    "a source is a folder with <class>/*.png (or .jpg), alone or in train/ and test/, with *.parquet, or with "
    "train-images-idx3-ubyte and so on; a .parquet file; or s3://bucket/prefix with *.parquet"
)
TOLD = 5  # kinds of files that are passed over
IDX_NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")


class Plan(NamedTuple):
    """Where a split's rows come from: the source's split, and its rows int64 (n,) in their order."""

    split: str
    rows: Rows


def recognisable(config: SourceConfig) -> None:
    """ConfigError for a path that can be no source of the user's own data, before any work."""
    source, path = config.source, config.path
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise ConfigError("source", source, "a file, but not a .parquet file", ACCEPTED)
    if not path.exists():
        raise ConfigError("source", source, "no such file or folder", ACCEPTED)


def bring_own(config: SourceConfig, cache: Path) -> Path:
    """The folder below `cache` with the converted data. Raises DataError for what cannot be used, OSError for a disk
    that fails."""
    with (
        tempfile.TemporaryDirectory(dir=cache, prefix=f".{config.dataset}-") as temporary,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        found = _find(config, Path(temporary), pool)
        check_no_class_is_empty(found.labels["train"], found.classes, shown(config.source))
        if config.path.is_dir():
            _tell_passed_over(config, _names_below(config.path), found)
        made_of = {"files": f"sha256:{_content(found.files, pool)}"}
        conversion = found.conversion | {"order": "train shuffled"}
        if "test" not in found.labels:
            conversion["test_fraction"] = config.test_fraction
        version = sha256(json.dumps([made_of, conversion, config.bad_images], sort_keys=True).encode())
        folder = cache / f"{config.dataset}-{version[:12]}"
        if folder.is_dir():
            try:
                open_source(folder)
            except DataError as error:
                log.warning("cached %s dropped: %s", config.dataset, error)
            else:
                log.info("%s: unchanged, verified in %s", config.dataset, folder)
                with contextlib.suppress(OSError):  # another user's
                    os.utime(folder)  # it is in use
                return folder
        whole = Path(temporary) / "whole"
        whole.mkdir()
        conversion["skipped"] = _write(found, config, whole)
        if any(file.has_changed() for file in found.files):
            raise _changed(config)
        facts = SourceFacts(
            dataset=config.dataset,
            classes=found.classes,
            image_shape=(config.image_size, config.image_size),
            made_of=made_of,
            conversion=conversion,
            sha256={name: file_sha256(whole / name) for name in FILES},
            licence="not stated",
            homepage="",
            citation="",
        )
        write_facts(whole, facts)
        leave(whole, folder)
    log.info("%s: converted to %s", config.dataset, folder)
    _drop_unused(cache, folder, config.dataset)
    return folder


def _drop_unused(cache: Path, used: Path, dataset: str) -> None:
    """Remove what the dataset's source was converted to before it changed, once nobody has asked for it for days."""
    name = re.compile(rf"{dataset}-[0-9a-f]{{12}}")
    for folder in cache.iterdir():
        # By its facts too: a dataset may itself be called so, or begin with another's name.
        with contextlib.suppress(OSError, DataError):
            old = name.fullmatch(folder.name) and time.time() - folder.stat().st_mtime > KEPT_S
            if old and folder != used and read_facts(folder).dataset == dataset:
                shutil.rmtree(folder, ignore_errors=True)


def _find(config: SourceConfig, temporary: Path, pool: Executor) -> Found:
    """Recognise the source by what it holds."""
    if urlsplit(config.source).scheme == "s3":
        files = _download(config.source, temporary)
        found = find_tables(files, config, pool)
        _tell_passed_over(config, (file.name for file in files), found)
        return found
    root = config.path
    if root.is_file():
        return find_tables([SourceFile(root.name, root)], config, pool)
    # Kaggle's MNIST unpacks to these files, and to folders of almost the same names that hold them again.
    idx = {path.name: path for path in root.iterdir() if IDX_NAME.fullmatch(path.name) and path.is_file()}
    if idx:
        for path in idx.values():
            check_inside(path, root)
        return _find_idx(idx, config.image_size, temporary)
    kinds = {file.path.suffix.lower() == ".parquet" for file in walk(root, (".parquet", *SUFFIXES))}
    if not kinds:
        raise DataError(f"{shown(str(root))}: holds no data that is known; {ACCEPTED}")
    if len(kinds) > 1:
        raise DataError(f"{shown(str(root))}: holds both pictures and Parquet; name a folder that holds one kind")
    if True in kinds:
        return find_tables(walk(root, (".parquet",)), config, pool)
    return find_pictures(root, config.image_size, pool)


def _names_below(root: Path) -> Iterator[str]:
    """Names, relative to `root`, of all files that are not hidden."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        yield from ((below / name).as_posix() for name in names if not name.startswith("."))


def _tell_passed_over(config: SourceConfig, names: Iterable[str], found: Found) -> None:
    """Say in one line what the source holds that is not used, by kind: a folder for validation, say."""
    used = {file.name for file in found.files}
    left: Counter[str] = Counter()
    for name in map(PurePosixPath, sorted(set(names) - used)):
        kind = f"*{name.suffix}" if name.suffix else name.name
        left[kind if len(name.parts) == 1 else f"{name.parts[0]}/{kind}"] += 1
    if left:
        kinds = ", ".join(f"{shown(kind)} ({count})" for kind, count in left.most_common(TOLD))
        more = f", and {len(left) - TOLD} more kinds" if len(left) > TOLD else ""
        log.info("%s: passed over: %s%s", config.dataset, kinds, more)


def _find_idx(files: dict[str, Path], size: int, temporary: Path) -> Found:
    """IDX files of the user's own: labels 0 to n-1, images as large as they are to be."""
    used: list[SourceFile] = []
    arrays = {}
    for split, prefixes in (("train", ("train",)), ("test", ("t10k", "test"))):
        paths = []
        for kind in ("images", "labels"):
            named = [name for name in sorted(files) if name.startswith(tuple(f"{p}-{kind}" for p in prefixes))]
            paths += [files[name] for name in named[:1]]
        if not paths and split == "test":
            continue
        if len(paths) < 2:
            raise DataError(f"{split}: images or labels are missing; both have to be there, as {', '.join(FILES)}")
        used += [SourceFile(path.name, path) for path in paths]
        arrays[split] = read_pair(_plain(paths[0], temporary), _plain(paths[1], temporary), 256)
        if arrays[split][0].shape[1:] != (size, size):
            shape = "x".join(map(str, arrays[split][0].shape[1:]))
            raise DataError(
                f"{paths[0].name}: images of {shape}, not {size}x{size}; set image_size to 28 or 32, "
                "or give pictures, which are resized"
            )
    classes = tuple(str(number) for number in range(int(arrays["train"][1].max()) + 1))
    check_classes(classes, used[1].name)
    if "test" in arrays and (beyond := np.flatnonzero(arrays["test"][1] >= len(classes))).size:
        raise DataError(f"{used[3].name}: label at row {beyond[0]} is not in train, which has 0..{len(classes) - 1}")

    def batches(split: str) -> Iterator[Batch]:
        for start in range(0, len(arrays[split][0]), BATCH):
            yield Batch(arrays[split][0][start : start + BATCH], {})

    labels = {split: labels for split, (_, labels) in arrays.items()}
    return Found(used, classes, labels, batches, {"form": "IDX", "image_size": size})


def _plain(file: Path, temporary: Path) -> Path:
    """The file, decompressed if need be."""
    if file.suffix != ".gz":
        return file
    target = temporary / file.name.removesuffix(".gz")
    try:
        with gzip.open(file) as stream, target.open("wb") as plain:
            shutil.copyfileobj(stream, plain)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file.name}: torn gzip file ({error}); compress it again") from None
    return target


def _download(url: str, temporary: Path) -> list[SourceFile]:
    """The Parquet files below an s3:// URL, or the one it names, brought here under names of our own."""
    single = urlsplit(url).path.lower().endswith(".parquet")
    above, _, name = url.rpartition("/")
    store = open_store(above if single else url)
    if single and not store.exists(name):  # a "folder" by that name, as Spark and Dask write them
        single, store = False, open_store(url)
    keys = [name] if single else [key for key in store.keys("") if key.lower().endswith(".parquet")]
    keys = [key for key in keys if not any(part.startswith(".") for part in PurePosixPath(key).parts)]
    if not keys:
        raise DataError(f"{url}: holds no *.parquet; {ACCEPTED}")
    files = []
    for number, key in enumerate(keys):
        path = temporary / f"{number}.parquet"
        store.fetch(key, path)
        files.append(SourceFile(key, path))
    return files


def _changed(config: SourceConfig) -> DataError:
    return DataError(f"{shown(config.source)}: changed while it was read; let it rest and run again")


def _content(files: list[SourceFile], pool: Executor) -> str:
    """One digest over the names and contents of the files, whatever order they were found in."""
    ordered = sorted(files, key=lambda file: os.fsencode(file.name))
    digests = pool.map(lambda file: file_sha256(file.path), ordered)
    pairs = (os.fsencode(file.name) + b"\0" + digest.encode() for file, digest in zip(ordered, digests, strict=True))
    return sha256(b"\0".join(pairs))


def _plan(found: Found, test_fraction: float) -> dict[str, Plan]:
    """Which of the source's rows each split gets. Those to train on are mixed, for sources are often sorted by class;
    those for the test stay as they were."""
    labels = found.labels["train"]
    if "test" in found.labels:
        held = np.zeros(len(labels), np.bool_)
        test = Plan("test", np.arange(len(found.labels["test"])))
    else:
        held = hold_out(labels, test_fraction)
        test = Plan("train", np.flatnonzero(held))
    rows = np.flatnonzero(~held)
    return {"train": Plan("train", rows[permutation(len(rows), 0, 0, SHUFFLE)]), "test": test}


def _write(found: Found, config: SourceConfig, whole: Path) -> int:
    """Write the four IDX files; the number of pictures that were skipped."""
    plan = _plan(found, config.test_fraction)
    size, where = config.image_size, shown(config.source)
    good = {split: np.ones(len(rows), np.bool_) for split, (_, rows) in plan.items()}
    problems: list[str] = []
    for split in SPLITS:
        if not len(plan[split].rows):
            raise DataError(f"{where}: no image left for the {split} split; add images, or change test_fraction")
    writers = {split: IdxWriter(whole / IMAGES[split], (len(rows), size, size)) for split, (_, rows) in plan.items()}
    bar = tqdm(total=sum(map(len, found.labels.values())), desc=config.dataset, unit="image", disable=None)
    with writers["train"], writers["test"], bar:
        for source, labels in found.labels.items():
            # Where each of the source's rows goes: its number there, -1 if it goes to the other split.
            to = {split: np.full(len(labels), -1, np.int64) for split in SPLITS if plan[split].split == source}
            for split, numbers in to.items():
                numbers[plan[split].rows] = np.arange(len(plan[split].rows))
            row = 0
            for images, bad in found.batches(source):
                if row + len(images) > len(labels):
                    raise _changed(config)
                for split, numbers in to.items():
                    here = numbers[row : row + len(images)]
                    writers[split].put(images[here >= 0], here[here >= 0])
                    good[split][[here[index] for index in bad if here[index] >= 0]] = False
                problems += [_problem(found, source, row + index, reason) for index, reason in bad.items()]
                row += len(images)
                bar.update(len(images))
    if problems and config.bad_images == "refuse":
        raise DataError(
            f"{where}: {len(problems)} of {bar.total} pictures cannot be read, the first is {problems[0]}; "
            "mend or remove them, or set bad_images to skip"
        )
    for problem in problems:
        log.info("%s: skipped %s", config.dataset, problem)
    for split, (source, rows) in plan.items():
        labels = found.labels[source][rows[good[split]]]
        if split == "train":
            check_no_class_is_empty(labels, found.classes, where)
        if not len(labels):
            raise DataError(f"{where}: none of the {split} split's pictures can be read; mend them")
        with IdxWriter(whole / LABELS[split], (len(labels),)) as writer:
            writer.append(labels)
        if not good[split].all():
            _keep(whole / IMAGES[split], np.flatnonzero(good[split]))
    return len(problems)


def _problem(found: Found, split: str, row: int, reason: str) -> str:
    """Which picture it is, and why it is none."""
    if found.conversion["form"] == "pictures":
        before = 0 if split == "train" else len(found.labels["train"])
        return f"{shown(found.files[before + row].name)} ({shown(reason)})"
    return f"row {row} of the {split} split ({shown(reason)})"


def _keep(file: Path, rows: npt.NDArray[np.int64]) -> None:
    """Leave only the given rows in a file of images."""
    images = open_idx(file, 3)
    kept = file.with_suffix(".kept")
    with IdxWriter(kept, (len(rows), *images.shape[1:])) as writer:
        for start in range(0, len(rows), BATCH):
            writer.append(images[rows[start : start + BATCH]])
    kept.replace(file)
