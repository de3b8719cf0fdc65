"""Bring a dataset to this machine as verified IDX files, from wherever it can be had.

A published file counts only once it has the published checksum: the sha256 of its decompressed bytes where that is
known, else the md5 of the archive. What is torn or tampered with is dropped and the next source is asked; nothing is
ever made up in its place. Data of the user's own is converted (`pipeline.convert`).
"""

import gzip
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import platformdirs
import pooch
import requests.exceptions

from pipeline.catalog import CATALOG, Dataset
from pipeline.convert import bring_own, recognisable
from pipeline.errors import ConfigError, DataError
from pipeline.idx import IdxWriter, Pixels, open_idx, open_int_idx, read_pair
from pipeline.source import (
    FACTS,
    FILES,
    IMAGES,
    LABELS,
    SPLITS,
    SourceFacts,
    file_sha256,
    leave,
    open_source,
    write_facts,
)
from pipeline.source import SourceConfig as SourceConfig
from pipeline.storage import open_store

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
RETRIES = 2  # per file and mirror, one and two seconds apart (pooch's pauses)
ROWS = 4096  # converted at a time, 3 MiB

Bring = Callable[[Path], None]


def cache_folder() -> Path:
    """Where datasets are kept between runs: the user's cache folder (XDG_CACHE_HOME moves it)."""
    return platformdirs.user_cache_path("lenet-pipeline")


def identity(config: SourceConfig) -> dict[str, str] | None:
    """What a published dataset is made of, known before it is fetched; None for data of the user's own."""
    return CATALOG[config.dataset].made_of if config.dataset in CATALOG else None


def check_source(config: SourceConfig) -> None:
    """Before any work: ConfigError for a dataset that is not known, and a source that cannot be one."""
    source, published = config.source, config.dataset in CATALOG
    if not published and source == "auto":
        raise ConfigError(
            "dataset", config.dataset, f"not one of {', '.join(CATALOG)}", "use one, or name your own data with source"
        )
    parts = urlsplit(source)
    if parts.scheme in ("http", "https", "s3"):
        if "@" in parts.netloc:
            hidden = f"{parts.scheme}://…@{source.rpartition('@')[2]}"
            raise ConfigError("source", hidden, "credentials do not belong in a URL", "use a URL without")
        if published and parts.scheme == "s3":
            raise ConfigError("source", source, f"{config.dataset} is not read from S3", "use auto, a folder or a URL")
        if not published and parts.scheme != "s3":
            raise ConfigError(
                "source", source, "your own data is not fetched over HTTP", "use a folder, Parquet, or s3://"
            )
        if not published:
            try:
                open_store(source)
            except ConfigError as error:
                _, value, rule, remedy = error.args
                raise ConfigError("source", value, rule, remedy) from None
    elif published and source != "auto" and not Path(source).expanduser().is_dir():
        raise ConfigError("source", source, "no such folder", "use auto, a folder with IDX files, or a URL")
    elif not published:
        recognisable(source)


def fetch(config: SourceConfig) -> Path:
    """The folder with the dataset's verified IDX files and its facts, ready for `open_source`.

    A published dataset is taken from the local cache, if source=auto and the cache is good. Raises DataError when no
    source gives it, with the reason for each, and for data of the user's own that cannot be used.
    """
    check_source(config)
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cache {cache} cannot be made ({error.strerror}); point XDG_CACHE_HOME at a folder of yours"
        ) from None
    if config.dataset in CATALOG:
        return _fetch_published(CATALOG[config.dataset], config.source, cache)
    try:
        return bring_own(config, cache)
    except OSError as error:
        raise DataError(
            f"{config.dataset}: {error.filename or cache}: {error.strerror}; check the disk and the folder's mode"
        ) from error


def read_verified(dataset: Dataset, folder: Path) -> dict[str, tuple[Pixels, Pixels]]:
    """Images uint8 (N, height, width) and labels uint8 (N,) by split, mapped, from a folder that `fetch` left."""
    open_source(folder)
    n = len(dataset.classes)
    return {split: read_pair(folder / IMAGES[split], folder / LABELS[split], n) for split in SPLITS}


def _fetch_published(dataset: Dataset, source: str, cache: Path) -> Path:
    folder = cache / dataset.name
    if source == "auto" and folder.is_dir():
        try:
            _check_cached(dataset, folder)
        except DataError as error:
            log.warning("cached %s dropped: %s", dataset.name, error)
        else:
            log.info("%s: verified in %s", dataset.name, folder)
            return folder
    failures = []
    for name, bring in _sources(source, dataset):
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{dataset.name}-") as temporary:
            brought, raw, whole = (Path(temporary) / step for step in ("brought", "raw", "whole"))
            for step in (brought, raw, whole):
                step.mkdir()
            try:
                bring(brought)
                _unpack(dataset, brought, raw)
                _check_published(dataset, raw)
                _convert(dataset, raw, whole)
                _write_facts(dataset, whole)
            except (DataError, OSError, ValueError, requests.exceptions.RequestException) as error:
                failures.append(f"{name}: {_reason(error)}")
                log.info("%s not had from %s", dataset.name, failures[-1])
                continue
            leave(whole, folder)
        log.info("%s: fetched from %s and verified", dataset.name, name)
        return folder
    raise DataError(
        f"{dataset.name}: no source could give it ({'; '.join(failures)}); connect to the network, or name a folder "
        "or mirror with source; for data of your own, give it a name with dataset"
    )


def _check_cached(dataset: Dataset, folder: Path) -> None:
    """DataError unless the cache holds what the catalogue says. Facts that are not there yet are written."""
    if dataset.pinned and not dataset.conversion and not (folder / FACTS).exists():
        _check_published(dataset, folder)
        _write_facts(dataset, folder)
    facts = open_source(folder).facts
    if (facts.made_of, facts.conversion) != (dataset.made_of, dataset.conversion):
        raise DataError(f"{folder} was made of other files, or otherwise")
    if dataset.pinned and not dataset.conversion and facts.sha256 != {n: f.sha256 for n, f in dataset.files.items()}:
        raise DataError(f"{folder} holds other files than were published")


def _is_url(source: str) -> bool:
    return urlsplit(source).scheme in ("http", "https")


def _sources(source: str, dataset: Dataset) -> list[tuple[str, Bring]]:
    """Names of the places to ask, in order, each with the function that brings its files, packed or not."""
    md5 = {name: f"md5:{digest}" for name, digest in dataset.archives.items()}
    if _is_url(source):
        # A mirror may have compressed the files anew, if their content can be verified.
        archives = dict.fromkeys(md5) if dataset.pinned else md5
        return [(source, partial(_from_mirror, source, archives))]
    if source != "auto":
        return [(source, partial(_from_folder, Path(source).expanduser(), dataset))]
    places: list[tuple[str, Bring]] = [(url, partial(_from_mirror, url, md5)) for url in dataset.mirrors]
    if dataset.debian_package and dataset.debian_folder:
        debian = partial(_from_debian, dataset, dataset.debian_package, dataset.debian_folder)
        places.append((f"Debian's {dataset.debian_package}", debian))
    return places


def _from_mirror(url: str, archives: Mapping[str, str | None], into: Path) -> None:
    """Download archives, by name and known hash; a torn or altered one is dropped by pooch and fetched anew."""
    pooch.get_logger().setLevel(logging.ERROR)
    mirror = pooch.create(path=into, base_url=url.rstrip("/") + "/", registry=dict(archives), retry_if_failed=RETRIES)
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
    for name in archives:
        mirror.fetch(name, downloader=downloader)


def _from_folder(folder: Path, dataset: Dataset, into: Path) -> None:
    for archive in dataset.archives:
        plain = archive.removesuffix(".gz")
        names = [plain, archive] if dataset.pinned else [archive]
        for name in names:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, into / name)
                break
        else:
            if dataset.pinned:
                raise DataError(f"{plain} (or .gz) is missing in {folder}; name the folder that holds all four files")
            raise DataError(
                f"{archive} is missing in {folder}; it has to be that file, for nothing but its md5 is published"
            )


def _from_debian(dataset: Dataset, package: str, unpacked: str, into: Path) -> None:
    """Take the files of Debian's package: installed, or else downloaded and unpacked here, which needs no root."""
    installed = Path("/") / unpacked
    if not installed.is_dir():
        # Lists of our own: a fresh container has none, and a user may not refresh the system's.
        apt = ["apt-get", "-qq", "-o", f"Dir::State={into}", "-o", f"Dir::Cache={into}", "-o", "APT::Sandbox::User="]
        _run([*apt, "update"], into)
        _run([*apt, "download", package], into)
        for file in into.glob(f"{package}_*.deb"):
            _run(["dpkg-deb", "-x", str(file), str(into)], into)
        installed = into / unpacked
    _from_folder(installed, dataset, into)


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise DataError(f"{command[0]} is not on this machine") from None
    except subprocess.TimeoutExpired:
        raise DataError(f"{command[0]} gave no answer in 300 s") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise DataError(f"{' '.join(command[-2:])}: {lines[0]}") from None


def _unpack(dataset: Dataset, brought: Path, raw: Path) -> None:
    """Decompress the published files to their names here. Raises DataError for a torn archive, and one that has not
    the published md5 if that is all there is to go by."""
    if not dataset.pinned:
        for archive, published in dataset.archives.items():
            with (brought / archive).open("rb") as stream:
                found = hashlib.file_digest(stream, "md5").hexdigest()
            if found != published:
                raise DataError(
                    f"{archive}: md5 {found[:12]}… is not the published {published[:12]}…; "
                    "the file was altered, fetch it again"
                )
    for name, file in dataset.files.items():
        plain = brought / file.archive.removesuffix(".gz")
        if file.member is None and plain.is_file():
            plain.replace(raw / name)
            continue
        try:
            if file.member is None:
                with gzip.open(brought / file.archive) as stream, (raw / name).open("wb") as target:
                    shutil.copyfileobj(stream, target)
            else:
                with zipfile.ZipFile(brought / file.archive) as archive_file, archive_file.open(file.member) as packed:
                    with gzip.open(cast(BinaryIO, packed)) as stream, (raw / name).open("wb") as target:
                        shutil.copyfileobj(stream, target)
        except KeyError:
            raise DataError(f"{file.archive}: holds no {file.member}; fetch it again") from None
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
            kind = "gzip" if file.member is None else "zip"
            raise DataError(f"{file.archive}: torn {kind} file ({error}); fetch it again") from None


def _check_published(dataset: Dataset, raw: Path) -> None:
    """DataError unless the decompressed files are well-formed and, where it is known, have the published sha256."""
    for name in FILES:
        if not (raw / name).is_file():
            raise DataError(f"{name} is missing in {raw}; fetch it again")
    # The structure is looked at first: "truncated" says more than "another sha256".
    for split in SPLITS:
        if dataset.int_labels or dataset.first_label:
            open_idx(raw / IMAGES[split], 3)
        else:
            read_pair(raw / IMAGES[split], raw / LABELS[split], len(dataset.classes))
    for name, file in dataset.files.items():
        found = file_sha256(raw / name)
        if file.sha256 and found != file.sha256:
            raise DataError(
                f"{name}: sha256 {found[:12]}… is not the published {file.sha256[:12]}…; "
                "the file was altered, fetch it again"
            )


def _convert(dataset: Dataset, raw: Path, whole: Path) -> None:
    """What has to be done to the published files until they are as all others."""
    for split in SPLITS:
        images, labels = IMAGES[split], LABELS[split]
        if dataset.transposed:
            pixels = open_idx(raw / images, 3)
            count, height, width = pixels.shape
            with IdxWriter(whole / images, (count, width, height)) as writer:
                for start in range(0, count, ROWS):
                    writer.append(pixels[start : start + ROWS].transpose(0, 2, 1))
        else:
            (raw / images).replace(whole / images)
        if dataset.int_labels or dataset.first_label:
            _convert_labels(dataset, raw / labels, whole / labels)
        else:
            (raw / labels).replace(whole / labels)
        read_pair(whole / images, whole / labels, len(dataset.classes))


def _convert_labels(dataset: Dataset, raw: Path, whole: Path) -> None:
    table = open_int_idx(raw, 2)[:, 0] if dataset.int_labels else open_idx(raw, 1)
    numbers = table.astype("int64") - dataset.first_label
    wrong = (numbers < 0) | (numbers >= len(dataset.classes))
    if wrong.any():
        row = int(wrong.argmax())
        first = dataset.first_label
        raise DataError(
            f"{raw.name}: label {table[row]} at row {row} is outside {first}..{len(dataset.classes) - 1 + first}; "
            "use the labels that belong to this dataset"
        )
    with IdxWriter(whole, (len(numbers),)) as writer:
        writer.append(numbers.astype("uint8"))


def _write_facts(dataset: Dataset, folder: Path) -> None:
    _, height, width = open_idx(folder / IMAGES["train"], 3).shape
    facts = SourceFacts(
        dataset=dataset.name,
        classes=dataset.classes,
        image_shape=(height, width),
        made_of=dataset.made_of,
        conversion=dataset.conversion,
        sha256={name: file_sha256(folder / name) for name in FILES},
        licence=dataset.licence,
        homepage=dataset.homepage,
        citation=dataset.citation,
    )
    write_facts(folder, facts)


def _reason(error: Exception) -> str:
    """The innermost cause of a network error in a few words; our own errors as they are."""
    if isinstance(error, requests.exceptions.ConnectionError):
        return "cannot be reached"
    return str(error).splitlines()[0]
