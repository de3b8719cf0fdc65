"""One object store behind one URL: a folder (file://) or a bucket (s3://).

Whatever the pipeline keeps goes through a Store, and Parquet and Ray Train use the same filesystem object through
`Store.arrow`.
"""

import asyncio
import logging
import mimetypes
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

import aiohttp
import botocore.exceptions
import fsspec.asyn
import s3fs
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import ConfigError, StorageError
from pipeline.store import Listed as Listed
from pipeline.store import LocalStore as LocalStore
from pipeline.store import Store as Store
from pipeline.store import sha256 as sha256

# The one place for S3's patience.
S3_CONNECT_TIMEOUT_S = 5
S3_READ_TIMEOUT_S = 15
S3_ATTEMPTS = 2  # by s3fs, when a server breaks off or errs in the middle of a call; botocore retries once in each
S3_OUTAGE_S = 30  # how long a server that is not there is waited for, a restart; LENET_S3_OUTAGE_S says otherwise
MOST_OUTAGE_S = 86_400  # infinity is a float, too, and no whole number of seconds
SILENT_S, BEYOND_OUTAGE_S = 120, 60
S3_OUTAGE_POLL_S = 0.5

CONFLICTS = 6  # tries of a conditional write that meets another, 3 s in all
DELETE_AT_ONCE = 1000  # keys, S3's limit

# botocore's rule, wider than AWS's own: other servers have other ones.
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")


class StorageConfig(BaseModel):
    """Where everything is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    storage: str = Field(
        "./store",
        description="Object store for shards, checkpoints and reports: a folder, file:///path or s3://bucket/prefix. "
        "S3's endpoint and credentials come from the usual AWS variables or profile.",
        min_length=1,
    )


class S3Store(Store):
    """A bucket, or a prefix in one. An object appears whole, as S3 promises of a single PUT."""

    fs: s3fs.S3FileSystem
    _denied = (
        PermissionError,
        botocore.exceptions.NoCredentialsError,
        botocore.exceptions.PartialCredentialsError,
        botocore.exceptions.CredentialRetrievalError,
        botocore.exceptions.ProfileNotFound,
        botocore.exceptions.SSOError,
        botocore.exceptions.TokenRetrievalError,
    )
    _failed = (OSError, botocore.exceptions.BotoCoreError, aiohttp.ClientError)  # aiohttp's: bodies that break off
    _missing_remedy = "the bucket, the key and storage"
    _access_remedy = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE and its login"
    _reach_remedy = "AWS_ENDPOINT_URL and that the server is up"

    def listing(self, prefix: str) -> dict[str, Listed]:
        with self._explained(prefix):
            found = self.fs.find(self.path(prefix), detail=True)
        return {
            path.removeprefix(self.root + "/"): Listed(info["size"], info["LastModified"].astimezone(UTC))
            for path, info in found.items()
            if info["type"] == "file"  # SeaweedFS lists a folder that has been emptied
        }

    def delete(self, prefix: str) -> None:
        # Not fs.rm: it takes the path for a pattern, and what the server refuses to delete for deleted.
        bucket, _, name = self.path(prefix).partition("/")
        with self._explained(prefix):
            keys = [*self._names(bucket, f"{name}/"), name]
            for start in range(0, len(keys), DELETE_AT_ONCE):
                named = {"Objects": [{"Key": key} for key in keys[start : start + DELETE_AT_ONCE]], "Quiet": True}
                for error in self.fs.call_s3("delete_objects", Bucket=bucket, Delete=named).get("Errors", ()):
                    denied = error["Code"] == "AccessDenied"
                    raise StorageError(
                        f"s3://{bucket}/{error['Key']}: not deleted ({error['Code']}: {error.get('Message', '')}); "
                        f"check {self._access_remedy if denied else self._reach_remedy}",
                        may_pass=not denied,
                    )

    def _names(self, bucket: str, prefix: str) -> Iterator[str]:
        """The bucket's own keys that begin so."""
        more: dict[str, str] = {}
        while True:
            page = self.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            yield from (found["Key"] for found in page.get("Contents", ()))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

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
        for attempt in range(1, CONFLICTS + 1):
            try:
                self._put_object(key, data, **condition)
            except OSError as error:
                status, code = _answer(error)
                if status == 412 or (code == "NoSuchKey" and "IfMatch" in condition):  # the condition does not hold
                    return False
                if status != 409 or attempt == CONFLICTS:  # another conditional write is under way, and may yet fail
                    raise
                time.sleep(0.2 * attempt)
            else:
                return True
        raise AssertionError("the last attempt returns or raises")

    def _put_object(self, key: str, data: bytes, **condition: str) -> None:
        bucket, _, name = self.path(key).partition("/")
        # A browser shows a page only if the server calls it one; of any other object it makes a download.
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        self.fs.call_s3("put_object", Bucket=bucket, Key=name, Body=data, ContentType=kind, **condition)


def split_url(url: str, field: str) -> SplitResult:
    """The parts of a URL or path. Raises ConfigError, which names `field`, for one that is none or has credentials."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(field, url, f"not a URL ({error})", "check its host and brackets") from None
    # A secret may hold a "/", "?" or "#", so the "@" after it need not be in what urlsplit takes for the host. After
    # the port of a web server, it is one of the path.
    _, colon, port = parts.netloc.rpartition(":")
    has_port = parts.scheme in ("http", "https") and port.isdigit()
    if "@" in parts.netloc or (colon and not has_port and "@" in url):
        hidden = f"{parts.scheme}://…@{url.rpartition('@')[2]}"
        remedy = "use AWS_*" if parts.scheme == "s3" else "use a URL without"
        raise ConfigError(field, hidden, "credentials do not belong in a URL", remedy)
    return parts


def open_store(url: str, field: str = "storage") -> Store:
    """The store at `url`: a folder path, file://…, or s3://bucket[/prefix].

    S3 credentials, region and endpoint are read by botocore from the environment (AWS_ACCESS_KEY_ID,
    AWS_ENDPOINT_URL, …) or the AWS profile, never from the URL. Raises ConfigError for any other URL, and an
    environment that cannot be meant; `field` is what it calls the URL.
    """
    parts = split_url(url, field)
    meant_otherwise = {"s3": r"[*?\[\]#]", "file": "[?#]"}.get(parts.scheme)
    if meant_otherwise and (wrong := re.search(meant_otherwise, url)):
        remedy = "use another prefix" if parts.scheme == "s3" else f"write {quote(wrong[0])}, or the path alone"
        raise ConfigError(field, url, f"{wrong[0]!r} has a meaning of its own in URLs", remedy)
    if parts.scheme in ("", "file"):
        if parts.netloc:
            remedy = f"write file:///{parts.netloc}{parts.path}"
            raise ConfigError(field, url, "a file URL has three slashes", remedy)
        try:
            root = Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute()
        except RuntimeError:
            raise ConfigError(field, url, "no such user", "write the path in full") from None
        if root.is_file():
            raise ConfigError(field, url, "is a file", "name a folder, or s3://bucket/prefix")
        return LocalStore(root.as_uri(), LocalFileSystem(auto_mkdir=True), str(root))
    if parts.scheme == "s3" and parts.netloc:
        if not _BUCKET.fullmatch(parts.netloc):
            rule = f"{parts.netloc!r} is no bucket's name, which has letters, digits, '.', '-' and '_'"
            raise ConfigError(field, url, rule, "write s3://bucket/prefix")
        if parts.path.rstrip("/").startswith("//"):  # s3fs writes and reads by it, but lists without
            raise ConfigError(field, url, "its prefix begins with a slash", "write s3://bucket/prefix")
        _check_environment()
        root_path = (parts.netloc + parts.path).rstrip("/")
        return S3Store(f"s3://{root_path}", _s3_filesystem(), root_path)
    raise ConfigError(field, url, "the store is a folder, file:///path or s3://bucket/prefix", "use one of these")


def _check_environment() -> None:
    outage_s()
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if (endpoint := os.environ.get(name)) and not re.match(r"(?i)https?://[^/]", endpoint):
            raise ConfigError(name, endpoint, "no http:// or https:// URL", f"write http://{endpoint}")


def outage_s() -> float:
    """Seconds for which a server that is away is waited for. ConfigError when LENET_S3_OUTAGE_S is no such number."""
    said = os.environ.get("LENET_S3_OUTAGE_S", str(S3_OUTAGE_S))
    try:
        seconds = float(said)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= MOST_OUTAGE_S:
        rule = f"a number of seconds from 0 to {MOST_OUTAGE_S}"
        raise ConfigError("LENET_S3_OUTAGE_S", said, rule, f"use {S3_OUTAGE_S}")
    return seconds


def patience_s() -> int:
    """Seconds after which nobody waits any longer for another process, which may be waiting for the store."""
    return round(max(SILENT_S, outage_s() + BEYOND_OUTAGE_S))


class PatientS3FileSystem(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """s3fs that waits for a server to come back, or to have done with starting.

    botocore's own retries draw on a quota per client that an outage empties: of 40 calls at once, 33 failed in an
    outage of 3 s and all 40 in the next. With this, none of 120 did.
    """

    retries = S3_ATTEMPTS
    # A copy that comes with a task would be given one of before, which still speaks to the server of then.
    cachable = False

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return await _patiently(super()._call_s3, method, *args, **kwargs)

    # The parent's is bound to the parent's _call_s3.
    call_s3 = fsspec.asyn.sync_wrapper(_call_s3)

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        part = {} if start is None and end is None else {"Range": await self._process_limits(path, start, end)}
        return await self._read(path, part)

    async def _read(self, path: str, asked: dict[str, str]) -> Any:
        return await _patiently(self._read_once, path, asked)

    # For file objects, which are no coroutines.
    read = fsspec.asyn.sync_wrapper(_read)

    async def _read_once(self, path: str, asked: dict[str, str]) -> Any:
        # The parent asks for the size first, and tries again what _call_s3 has tried again.
        bucket, key, _ = self.split_path(path)
        answer = await self._call_s3("get_object", Bucket=bucket, Key=key, **asked)
        try:
            return await answer["Body"].read()
        finally:
            answer["Body"].close()

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, block_size, **kwargs)
        return _PatientFile(self, path, mode, block_size or self.default_block_size, **kwargs)


class _PatientFile(s3fs.core.S3File):  # type: ignore[misc]
    """A file whose parts are read as patiently as whole objects; the parent tries each twice."""

    def _fetch_range(self, start: int, end: int) -> Any:
        if start == end:
            return b""
        # With `read_kw`, which has the ETag: of a file that changes meanwhile nothing more is read.
        return self.fs.read(self.path, {**self.read_kw, "Range": f"bytes={start}-{end - 1}"})


async def _patiently(call: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    give_up = time.monotonic() + outage_s()
    while True:
        try:
            return await call(*args, **kwargs)
        except (OSError, botocore.exceptions.BotoCoreError, aiohttp.ClientError) as error:
            if not _may_pass(error) or time.monotonic() > give_up:
                raise
            await asyncio.sleep(S3_OUTAGE_POLL_S)


def _answer(error: Exception) -> tuple[int | None, str | None]:
    """Status and code of what the server said, if it did."""
    cause = error.__cause__
    if not isinstance(cause, botocore.exceptions.ClientError):  # what s3fs makes an OSError of
        return None, None
    return cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode"), cause.response.get("Error", {}).get("Code")


def _may_pass(error: Exception) -> bool:
    """Whether the server is away, starting or out of breath, rather than the request wrong."""
    return _answer(error)[0] in (500, 502, 503, 504) or isinstance(
        error,
        botocore.exceptions.EndpointConnectionError
        | botocore.exceptions.ConnectTimeoutError
        | botocore.exceptions.ConnectionClosedError
        | botocore.exceptions.ResponseStreamingError
        | TimeoutError  # of a body; a call that gets no answer is botocore's own, and not worth waiting for
        | aiohttp.ClientPayloadError
        | aiohttp.ClientConnectionError,
    )


def _s3_filesystem() -> PatientS3FileSystem:
    config: dict[str, Any] = {
        "connect_timeout": S3_CONNECT_TIMEOUT_S,
        "read_timeout": S3_READ_TIMEOUT_S,
        "retries": {"mode": "standard", "max_attempts": 1},
    }
    for name in ("credentials", "tokens"):
        logging.getLogger(f"aiobotocore.{name}").setLevel(logging.CRITICAL)  # of pages; what it raises is told
    # Listings are never cached: another process writes to the same bucket (fsspec/s3fs#851).
    return PatientS3FileSystem(use_listings_cache=False, config_kwargs=config)
