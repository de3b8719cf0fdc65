"""One object store behind one URL: a folder (file://) or a bucket (s3://).

Whatever the pipeline keeps goes through a Store, and Parquet and Ray Train use the same filesystem object through
`Store.arrow`. Keys are relative, slash-separated. Objects are written whole or not at all; `create` and `replace`
are the conditional writes that publishing rests on.
"""

import asyncio
import contextlib
import errno
import hashlib
import mimetypes
import os
import re
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import botocore.exceptions
import fsspec
import fsspec.asyn
import pyarrow.fs
import s3fs
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import ConfigError, StorageError

# The one place for S3's patience.
S3_CONNECT_TIMEOUT_S = 5
S3_READ_TIMEOUT_S = 15
S3_ATTEMPTS = 2  # by s3fs, when a server breaks off or errs in the middle of a call; botocore retries once in each
S3_OUTAGE_S = 30  # how long a server that is not there is waited for, a restart; LENET_S3_OUTAGE_S says otherwise
S3_OUTAGE_POLL_S = 0.5

# What a person has to see to before it is worth trying again: no room, no quota, no writing at all.
LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

_TEMPORARY = re.compile(r"(^|/)\.[^/]+\.(tmp|lock)$")


class StorageConfig(BaseModel):
    """Where everything is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    storage: str = Field(
        "./store",
        description="Object store for shards, checkpoints and reports: a folder, file:///path or s3://bucket/prefix. "
        "S3's endpoint and credentials come from the usual AWS variables or profile.",
        min_length=1,
    )


def sha256(data: bytes) -> str:
    """Hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


class Listed(NamedTuple):
    """A file as a listing shows it: its size in bytes, and when it was written, in UTC."""

    size: int
    written: datetime


class Store:
    """A folder or bucket prefix. Picklable, so Ray's workers open the same one. Use `open_store` to make one."""

    def __init__(self, url: str, fs: fsspec.AbstractFileSystem, root: str) -> None:
        self.url = url
        self.fs = fs
        self.root = root

    @property
    def arrow(self) -> pyarrow.fs.FileSystem:
        """The same filesystem as pyarrow and Ray Train take it; give it `path(key)`."""
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self.fs))

    def path(self, key: str) -> str:
        """The key as the filesystem object knows it."""
        return f"{self.root}/{key}"

    def locate(self, key: str) -> str:
        """The key as a person would type it: a path on disk or an s3:// URL."""
        return f"{self.url}/{key}"

    def exists(self, key: str) -> bool:
        with self._explained(key):
            # Not fs.isfile: it takes any error for "no", a server that is down or a wrong secret too.
            try:
                return bool(self.fs.info(self.path(key))["type"] == "file")
            except (FileNotFoundError, NotADirectoryError):
                return False

    def read(self, key: str) -> bytes:
        """The whole object. Raises StorageError when there is none."""
        with self._explained(key):
            return bytes(self.fs.cat_file(self.path(key)))

    def keys(self, prefix: str) -> list[str]:
        """All keys under the folder `prefix`, sorted; none when it does not exist."""
        return sorted(self.listing(prefix))

    def listing(self, prefix: str) -> dict[str, "Listed"]:
        """All files under the folder `prefix`, those of writers that were killed too, at the cost of a listing."""
        with self._explained(prefix):
            found = self.fs.find(self.path(prefix), detail=True)
        return {
            path.removeprefix(self.root + "/"): Listed(info["size"], _written(info))
            for path, info in found.items()
            if info["type"] == "file"  # SeaweedFS lists a folder that has been emptied
        }

    def modified(self, key: str) -> datetime:
        """When the object was written, in UTC."""
        with self._explained(key):
            modified: datetime = self.fs.modified(self.path(key))
        return modified.astimezone(UTC)

    def leftovers(self) -> list[str]:
        """Keys of what is no object: probes and temporary files of writers that were killed."""
        return [key for key in self.keys("") if key.startswith(".probe-")]

    def delete(self, prefix: str) -> None:
        """Remove the object or folder, if it is there."""
        with self._explained(prefix), contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(prefix), recursive=True)

    def put(self, key: str, data: bytes) -> None:
        """Write an object whole, replacing any other, then read it back and compare.

        For run-private keys only: what others read is written with `create` and `replace`.
        """
        with self._explained(key):
            self._put(key, data)
        if self.read(key) != data:  # byte for byte: says more than a digest, and costs a tenth of two
            raise StorageError(f"{self.locate(key)}: read back other bytes than were written; check the disk or server")

    def create(self, key: str, data: bytes) -> bool:
        """Write `data` only if there is no such object. False if one with other content is there already.

        True also when the very same bytes are there: a retry after a lost answer has then succeeded before.
        """
        with self._explained(key):
            if self._create(key, data):
                return True
        return self.read(key) == data

    def keep(self, key: str, data: bytes) -> bytes:
        """Create the object, or leave the one that is there; what the store then holds, read back.

        For receipts: of several attempts, whichever is first has written for all.
        """
        created = self.create(key, data)
        found = self.read(key)
        if created and found != data:
            raise StorageError(f"{self.locate(key)}: read back other bytes than were written; check the disk or server")
        return found

    def replace(self, key: str, data: bytes, expected: bytes | None) -> bool:
        """Write `data` only if the object still holds `expected` (None: does not exist). False if it does not.

        As with `create`, True also when it holds `data` already. So let what two writers write differ.
        """
        if expected is None:
            return self.create(key, data)
        with self._explained(key):
            if self._replace(key, data, expected):
                return True
        return self.exists(key) and self.read(key) == data

    def check_writable(self) -> None:
        """Write, read and delete a small object, so that a store out of reach is found before any work starts."""
        key = f".probe-{uuid.uuid4().hex}"
        self.put(key, b"lenet-pipeline")
        self.delete(key)

    def _put(self, key: str, data: bytes) -> None:
        raise NotImplementedError

    def _create(self, key: str, data: bytes) -> bool:
        raise NotImplementedError

    def _replace(self, key: str, data: bytes, expected: bytes) -> bool:
        raise NotImplementedError

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn what the filesystem raises into one line that says where, what and what to do."""
        where = self.locate(key)
        try:
            yield
        except FileNotFoundError as error:
            remedy = "check the bucket, the key and storage"
            raise StorageError(f"{where}: not found ({_short(error)}); {remedy}", may_pass=False) from error
        except (PermissionError, botocore.exceptions.NoCredentialsError) as error:
            remedy = f"check {self._access_remedy}"
            raise StorageError(f"{where}: access denied ({_short(error)}); {remedy}", may_pass=False) from error
        except (OSError, botocore.exceptions.BotoCoreError) as error:
            remedy, may_pass = f"check {self._reach_remedy}", getattr(error, "errno", None) not in LASTING
            raise StorageError(f"{where}: store failed ({_short(error)}); {remedy}", may_pass=may_pass) from error

    _access_remedy = "the folder's owner and mode"
    _reach_remedy = "the disk"


class LocalStore(Store):
    """A folder. Writes go to a temporary file beside the target, are synced, and then take its name."""

    def keys(self, prefix: str) -> list[str]:
        # A killed writer leaves its temporary file or its lock behind: neither is an object.
        return [key for key in super().keys(prefix) if not _TEMPORARY.search(key)]

    def leftovers(self) -> list[str]:
        # Locks stay: another writer may hold one that is old.
        return [*super().leftovers(), *(key for key in super().keys("") if re.search(r"(^|/)\.[^/]+\.tmp$", key))]

    def _put(self, key: str, data: bytes) -> None:
        with self._written(key, data) as (temporary, target):
            temporary.replace(target)

    def _create(self, key: str, data: bytes) -> bool:
        with self._written(key, data) as (temporary, target):
            try:
                # A hard link is the one rename that refuses to overwrite.
                os.link(temporary, target)
            except FileExistsError:
                return False
            return True

    def _replace(self, key: str, data: bytes, expected: bytes) -> bool:
        target = Path(self.path(key))
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.exists() or target.read_bytes() != expected:
                return False
            self._put(key, data)
            return True

    @contextlib.contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        target = Path(self.path(key))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary, target
        finally:
            temporary.unlink(missing_ok=True)

    def locate(self, key: str) -> str:
        return self.path(key)


class S3Store(Store):
    """A bucket, or a prefix in one. An object appears whole, as S3 promises of a single PUT."""

    fs: s3fs.S3FileSystem
    _access_remedy = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    _reach_remedy = "AWS_ENDPOINT_URL and that the server is up"

    def _put(self, key: str, data: bytes) -> None:
        self._put_object(key, data)

    def _create(self, key: str, data: bytes) -> bool:
        return self._put_if(key, data, IfNoneMatch="*")

    def _replace(self, key: str, data: bytes, expected: bytes) -> bool:
        # The ETag is asked for first: if the object changes between this and the PUT, the PUT is refused.
        try:
            info = self.fs.info(self.path(key))
            if self.fs.cat_file(self.path(key)) != expected:
                return False
        except FileNotFoundError:
            return False
        return self._put_if(key, data, IfMatch=info["ETag"])

    def _put_if(self, key: str, data: bytes, **condition: str) -> bool:
        try:
            self._put_object(key, data, **condition)
        except OSError as error:
            cause = error.__cause__
            if isinstance(cause, botocore.exceptions.ClientError):
                status = cause.response["ResponseMetadata"]["HTTPStatusCode"]
                if status in (409, 412):  # a concurrent conditional write, a condition that does not hold
                    return False
            raise
        return True

    def _put_object(self, key: str, data: bytes, **condition: str) -> None:
        bucket, _, name = self.path(key).partition("/")
        # A browser shows a page only if the server calls it one; of any other object it makes a download.
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        self.fs.call_s3("put_object", Bucket=bucket, Key=name, Body=data, ContentType=kind, **condition)


def open_store(url: str) -> Store:
    """The store at `url`: a folder path, file://…, or s3://bucket[/prefix].

    S3 credentials, region and endpoint are read by botocore from the environment (AWS_ACCESS_KEY_ID,
    AWS_ENDPOINT_URL, …) or the AWS profile, never from the URL. Raises ConfigError for any other URL.
    """
    parts = urlsplit(url)
    # A secret may hold a "/", "?" or "#", so the "@" after it need not be in what urlsplit takes for the host.
    if "@" in parts.netloc or (":" in parts.netloc and "@" in url):
        hidden = url.rpartition("@")[2]
        raise ConfigError("storage", f"{parts.scheme}://…@{hidden}", "credentials do not belong in a URL", "use AWS_*")
    if parts.scheme in ("", "file"):
        if parts.netloc:
            raise ConfigError(
                "storage", url, "a file URL has three slashes", f"write file:///{parts.netloc}{parts.path}"
            )
        root = Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute()
        return LocalStore(root.as_uri(), LocalFileSystem(auto_mkdir=True), str(root))
    if parts.scheme == "s3" and parts.netloc:
        root_path = (parts.netloc + parts.path).rstrip("/")
        return S3Store(f"s3://{root_path}", _s3_filesystem(), root_path)
    raise ConfigError("storage", url, "the store is a folder, file:///path or s3://bucket/prefix", "use one of these")


class PatientS3FileSystem(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """s3fs that waits for a server to come back, or to have done with starting.

    botocore's own retries draw on a quota per client that an outage empties: of 40 calls at once, 33 failed in an
    outage of 3 s and all 40 in the next. With this, none of 120 did.
    """

    retries = S3_ATTEMPTS
    # A copy that comes with a task would be given one of before, which still speaks to the server of then.
    cachable = False

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        give_up = time.monotonic() + float(os.environ.get("LENET_S3_OUTAGE_S", S3_OUTAGE_S))
        while True:
            try:
                return await super()._call_s3(method, *args, **kwargs)
            except (OSError, botocore.exceptions.BotoCoreError) as error:
                if not _may_pass(error) or time.monotonic() > give_up:
                    raise
                await asyncio.sleep(S3_OUTAGE_POLL_S)

    # The parent's is bound to the parent's _call_s3.
    call_s3 = fsspec.asyn.sync_wrapper(_call_s3)


def _may_pass(error: Exception) -> bool:
    """Whether the server is away, starting or out of breath, rather than the request wrong."""
    cause = error.__cause__
    if isinstance(cause, botocore.exceptions.ClientError):  # what s3fs makes an OSError of
        return cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (500, 502, 503, 504)
    return isinstance(
        error,
        botocore.exceptions.EndpointConnectionError
        | botocore.exceptions.ConnectTimeoutError
        | botocore.exceptions.ConnectionClosedError,
    )


def _s3_filesystem() -> PatientS3FileSystem:
    config: dict[str, Any] = {
        "connect_timeout": S3_CONNECT_TIMEOUT_S,
        "read_timeout": S3_READ_TIMEOUT_S,
        "retries": {"mode": "standard", "max_attempts": 1},
    }
    # Listings are never cached: another process writes to the same bucket (fsspec/s3fs#851).
    return PatientS3FileSystem(use_listings_cache=False, config_kwargs=config)


def _written(info: dict[str, Any]) -> datetime:
    """When a file was written, of what S3 or a disk says of it."""
    when: datetime = info["LastModified"] if "LastModified" in info else datetime.fromtimestamp(info["mtime"], UTC)
    return when.astimezone(UTC)


def _short(error: BaseException) -> str:
    """An error's first line, without its class's noise."""
    text = str(error.args[1] if isinstance(error, OSError) and len(error.args) > 1 else error).strip()
    return text.splitlines()[0] if text else type(error).__name__
