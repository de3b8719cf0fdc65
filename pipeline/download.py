"""Bring a catalogued dataset's IDX files to this machine, from wherever they can be had, and prove them real.

Whatever the source, a file counts only once its decompressed bytes have the published sha256. What is torn or
tampered with is dropped and the next source is asked; nothing is ever made up in its place.
"""

import gzip
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import platformdirs
import pooch
import requests.exceptions
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pipeline.catalog import CATALOG, SPLITS, Dataset
from pipeline.errors import ConfigError, DataError
from pipeline.idx import Pixels, read_pair
from pipeline.storage import sha256

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
RETRIES = 2  # per file and mirror, one and two seconds apart (pooch's pauses)

Bring = Callable[[Path], None]


def _known_dataset(name: str) -> str:
    if name not in CATALOG:
        raise ValueError(f"no such dataset; use one of {', '.join(CATALOG)}")
    return name


class SourceConfig(BaseModel):
    """Which dataset, and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: Annotated[str, AfterValidator(_known_dataset)] = Field(
        "fashion-mnist", description="Name of the dataset in the catalogue.", json_schema_extra={"enum": list(CATALOG)}
    )
    source: str = Field(
        "auto",
        description="Where its IDX files come from: auto (the local cache, the published mirrors, then Debian's "
        "package), a folder, or the http(s) URL of a mirror.",
        min_length=1,
    )


def cache_folder() -> Path:
    """Where verified files are kept between runs: the user's cache folder (XDG_CACHE_HOME moves it)."""
    return platformdirs.user_cache_path("lenet-pipeline")


def check_source(config: SourceConfig) -> None:
    """Before any work: ConfigError for a source that is neither auto, a URL nor an existing folder."""
    if config.source == "auto" or _is_url(config.source):
        return
    if not Path(config.source).expanduser().is_dir():
        raise ConfigError("source", config.source, "no such folder", "use auto, a folder with IDX files, or a URL")


def fetch(config: SourceConfig) -> Path:
    """The folder with the dataset's verified IDX files.

    With source=auto the local cache is used when it holds good files. Raises DataError when no source gives them,
    with the reason for each.
    """
    check_source(config)
    dataset = CATALOG[config.dataset]
    folder = cache_folder() / dataset.name
    if config.source == "auto" and folder.is_dir():
        try:
            read_verified(dataset, folder)
        except DataError as error:
            log.warning("cached %s dropped: %s", dataset.name, error)
        else:
            log.info("%s: verified in %s", dataset.name, folder)
            return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cache {folder.parent} cannot be made ({error.strerror}); point XDG_CACHE_HOME at a folder of yours"
        ) from None
    failures = []
    for name, bring in _sources(config.source, dataset):
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{dataset.name}-") as temporary:
            try:
                bring(Path(temporary))
                unpacked = _unpack(dataset, Path(temporary))
                read_verified(dataset, unpacked)
            except (DataError, OSError, ValueError, requests.exceptions.RequestException) as error:
                failures.append(f"{name}: {_reason(error)}")
                log.info("%s not had from %s", dataset.name, failures[-1])
                continue
            folder.mkdir(exist_ok=True)
            for file in dataset.files:
                (unpacked / file.name).replace(folder / file.name)
        log.info("%s: fetched from %s and verified", dataset.name, name)
        return folder
    raise DataError(
        f"{dataset.name}: no source could give it ({'; '.join(failures)}); "
        "connect to the network, or name a folder or mirror with source"
    )


def read_verified(dataset: Dataset, folder: Path) -> dict[str, tuple[Pixels, Pixels]]:
    """Images uint8 (N, 28, 28) and labels uint8 (N,) by split, from IDX files proven to be the published ones.

    Raises DataError for a missing, malformed or altered file.
    """
    for file in dataset.files:
        if not (folder / file.name).is_file():
            raise DataError(f"{file.name} is missing in {folder}; fetch it again")
    pairs = {
        split: read_pair(folder / dataset.images[split].name, folder / dataset.labels[split].name, len(dataset.classes))
        for split in SPLITS
    }
    # The structure is looked at first: "truncated" says more than "another sha256".
    for file in dataset.files:
        found = sha256((folder / file.name).read_bytes())
        if found != file.sha256:
            raise DataError(
                f"{file.name}: sha256 {found[:12]}… is not the published {file.sha256[:12]}…; "
                "the file was altered, fetch it again"
            )
    return pairs


def _is_url(source: str) -> bool:
    return urlsplit(source).scheme in ("http", "https")


def _sources(source: str, dataset: Dataset) -> list[tuple[str, Bring]]:
    """Names of the places to ask, in order, each with the function that brings its files, packed or not."""
    if _is_url(source):
        archives: dict[str, str | None] = {f"{file.name}.gz": None for file in dataset.files}
        return [(source, partial(_from_mirror, source, archives))]
    if source != "auto":
        return [(source, partial(_from_folder, Path(source).expanduser(), dataset))]
    import torchvision.datasets  # here, since it takes 1.8 s and only a download needs it

    published = getattr(torchvision.datasets, dataset.torchvision_class)
    md5 = {name: f"md5:{digest}" for name, digest in published.resources}
    places: list[tuple[str, Bring]] = [(url, partial(_from_mirror, url, md5)) for url in published.mirrors]
    return [*places, (f"Debian's {dataset.debian_package}", partial(_from_debian, dataset))]


def _from_mirror(url: str, archives: Mapping[str, str | None], into: Path) -> None:
    """Download .gz files, by name and known hash; a torn or altered one is dropped by pooch and fetched anew."""
    pooch.get_logger().setLevel(logging.ERROR)
    mirror = pooch.create(path=into, base_url=url.rstrip("/") + "/", registry=dict(archives), retry_if_failed=RETRIES)
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
    for name in archives:
        mirror.fetch(name, downloader=downloader)


def _from_folder(folder: Path, dataset: Dataset, into: Path) -> None:
    for file in dataset.files:
        for name in (file.name, f"{file.name}.gz"):
            if (folder / name).is_file():
                (into / name).write_bytes((folder / name).read_bytes())
                break
        else:
            raise DataError(f"{file.name} (or .gz) is missing in {folder}; name the folder that holds all four files")


def _from_debian(dataset: Dataset, into: Path) -> None:
    """Take the files of Debian's package: installed, or else downloaded and unpacked here, which needs no root."""
    installed = Path("/") / dataset.debian_folder
    if not installed.is_dir():
        # Lists of our own: a fresh container has none, and a user may not refresh the system's.
        apt = ["apt-get", "-qq", "-o", f"Dir::State={into}", "-o", f"Dir::Cache={into}", "-o", "APT::Sandbox::User="]
        _run([*apt, "update"], into)
        _run([*apt, "download", dataset.debian_package], into)
        for package in into.glob(f"{dataset.debian_package}_*.deb"):
            _run(["dpkg-deb", "-x", str(package), str(into)], into)
        installed = into / dataset.debian_folder
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


def _unpack(dataset: Dataset, folder: Path) -> Path:
    """Decompress what came as .gz, next to the archive."""
    for file in dataset.files:
        archive = folder / f"{file.name}.gz"
        if archive.is_file():
            try:
                data = gzip.decompress(archive.read_bytes())
            except (EOFError, OSError) as error:
                raise DataError(f"{archive.name}: torn gzip file ({error}); fetch it again") from None
            (folder / file.name).write_bytes(data)
    return folder


def _reason(error: Exception) -> str:
    """The innermost cause of a network error in a few words; our own errors as they are."""
    if isinstance(error, requests.exceptions.ConnectionError):
        return "cannot be reached"
    return str(error).splitlines()[0]
