"""Bring a dataset to this machine as verified IDX files, from wherever it can be had.

A published file counts only once it has the published checksum: the sha256 of its decompressed bytes where that is
known, else the md5 of the archive. What is torn or tampered with is dropped and the next source is asked; nothing is
ever made up in its place. Data of the user's own is converted (`pipeline.convert`).
"""

import contextlib
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import platformdirs
import pooch
import requests.exceptions

from pipeline.catalog import CATALOG, Dataset
from pipeline.convert import bring_own, recognisable
from pipeline.errors import ConfigError, DataError, first_line
from pipeline.published import check_published, convert, describe, unpack
from pipeline.source import FACTS, SourceConfig, leave, open_source
from pipeline.storage import open_store, split_url

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
RETRIES = 2  # per file and mirror, one and two seconds apart (pooch's pauses)

LEFT = re.compile(r"\.[a-z0-9-]+-[a-z0-9_]{8}")  # as `tempfile` names what is not whole yet
LEFT_S = 24 * 3600

Bring = Callable[[Path], None]


def cache_folder() -> Path:
    """Where datasets are kept between runs: the user's cache folder (XDG_CACHE_HOME moves it)."""
    return platformdirs.user_cache_path("lenet-pipeline")


def check_source(config: SourceConfig) -> None:
    """Before any work: ConfigError for a dataset that is not known, and a source that cannot be one."""
    source, published = config.source, config.dataset in CATALOG
    if not published and source == "auto":
        raise ConfigError(
            "dataset", config.dataset, f"not one of {', '.join(CATALOG)}", "use one, or name your own data with source"
        )
    if published and config.image_size != 28:
        raise ConfigError(
            "image_size",
            config.image_size,
            f"{config.dataset} has 28x28 pixels",
            "leave it out; it is for your own data",
        )
    parts = split_url(source, "source")
    if parts.scheme in ("http", "https", "s3"):
        if published and parts.scheme == "s3":
            raise ConfigError("source", source, f"{config.dataset} is not read from S3", "use auto, a folder or a URL")
        if not published and parts.scheme != "s3":
            raise ConfigError(
                "source", source, "your own data is not fetched over HTTP", "use a folder, Parquet, or s3://"
            )
        if not published:
            open_store(source, "source")
        return
    try:
        if published and source != "auto" and not config.path.is_dir():
            raise ConfigError("source", source, "no such folder", "use auto, a folder with IDX files, or a URL")
        if published and source != "auto" and not _has_any_of(CATALOG[config.dataset], config.path):
            raise ConfigError(
                "source",
                source,
                f"holds no file of {config.dataset}",
                "for data of your own, give it a name with dataset",
            )
        if not published:
            recognisable(config)
    except OSError as error:  # no right to look, a name that is too long
        raise ConfigError("source", source, str(error.strerror), "use a path that you may read") from None


def _has_any_of(dataset: Dataset, folder: Path) -> bool:
    names = {name for archive in dataset.archives for name in (archive, archive.removesuffix(".gz"))}
    return any((folder / name).is_file() for name in names)


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
    try:
        _clear(cache)
        if config.dataset in CATALOG:
            return _fetch_published(CATALOG[config.dataset], config, cache)
        return bring_own(config, cache)
    except OSError as error:
        raise DataError(
            f"{config.dataset}: {error.filename or cache}: {error.strerror}; check the disk and the folder's mode"
        ) from error


def _clear(cache: Path) -> None:
    """Remove what processes that were killed have left: for days nobody converts."""
    for left in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):  # of a process that has just finished
            if LEFT.fullmatch(left.name) and time.time() - left.stat().st_mtime > LEFT_S:
                shutil.rmtree(left, ignore_errors=True)


def _fetch_published(dataset: Dataset, config: SourceConfig, cache: Path) -> Path:
    folder = cache / dataset.name
    if config.source == "auto" and folder.is_dir():
        try:
            _check_cached(dataset, folder)
        except DataError as error:
            log.warning("cached %s dropped: %s", dataset.name, error)
        else:
            log.info("%s: verified in %s", dataset.name, folder)
            return folder
    failures = []
    for name, bring in _sources(config, dataset):
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{dataset.name}-") as temporary:
            brought, raw, whole = (Path(temporary) / step for step in ("brought", "raw", "whole"))
            for step in (brought, raw, whole):
                step.mkdir()
            try:
                bring(brought)
                unpack(dataset, brought, raw)
                check_published(dataset, raw)
                convert(dataset, raw, whole)
                describe(dataset, whole)
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
        check_published(dataset, folder)
        describe(dataset, folder)
    facts = open_source(folder).facts
    if (facts.made_of, facts.conversion) != (dataset.made_of, dataset.conversion):
        raise DataError(f"{folder} was made of other files, or otherwise")
    if dataset.pinned and not dataset.conversion and facts.sha256 != {n: f.sha256 for n, f in dataset.files.items()}:
        raise DataError(f"{folder} holds other files than were published")


def _sources(config: SourceConfig, dataset: Dataset) -> list[tuple[str, Bring]]:
    """Names of the places to ask, in order, each with the function that brings its files, packed or not."""
    md5 = {name: f"md5:{digest}" for name, digest in dataset.archives.items()}
    source = config.source
    if urlsplit(source).scheme in ("http", "https"):
        # A mirror may have compressed the files anew, if their content can be verified.
        archives = dict.fromkeys(md5) if dataset.pinned else md5
        return [(source, partial(_from_mirror, source, archives))]
    if source != "auto":
        return [(source, partial(_from_folder, config.path, dataset))]
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


def _reason(error: Exception) -> str:
    """The innermost cause of a network error in a few words; our own errors as they are."""
    if isinstance(error, requests.exceptions.ConnectionError):
        return "cannot be reached"
    return first_line(error)
