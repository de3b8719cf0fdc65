"""What every object store promises, and the one that is a folder. `pipeline.storage` opens them.

Keys are relative, slash-separated. Objects are written whole or not at all; `create` and `replace` are the
conditional writes that publishing rests on.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import fsspec
import pyarrow.fs
from filelock import FileLock

from pipeline.errors import StorageError

# What a person has to see to before it is worth trying again: no room, no quota, no writing at all.
LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# As file systems answer that have no hard links: FAT and exFAT, many of FUSE, some shares of other machines.
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}

# Where file systems keep what they mend, at their root, and nobody but root may look.
LOST_AND_FOUND = "lost+found"
DELETE_ATTEMPTS, ATTEMPTS = 10, 50
COPIED = 2**20  # bytes at a time
_TEMPORARY = re.compile(r"(^|/)\.[^/]+\.(tmp|lock)$")


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

    def __str__(self) -> str:
        return self.locate("").rstrip("/")

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

    def fetch(self, key: str, file: Path) -> None:
        """Copy the object to a file of this machine. Raises StorageError when there is none, or it changes."""
        # Not fs.get_file: on S3 it reads what is large in several parts, be they of one object or of two.
        with self._explained(key), self.fs.open(self.path(key)) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, COPIED)

    def keys(self, prefix: str) -> list[str]:
        """All keys under the folder `prefix`, sorted; none when it does not exist."""
        return sorted(self.listing(prefix))

    def listing(self, prefix: str) -> dict[str, Listed]:
        """All files under the folder `prefix`, those of writers that were killed too, at the cost of a listing."""
        raise NotImplementedError

    def last_written(self, *folders: str) -> datetime:
        """When anything in these folders was; the beginning of time if nothing is there."""
        found = [file.written for folder in folders for file in self.listing(folder).values()]
        return max(found, default=datetime.min.replace(tzinfo=UTC))

    def leftovers(self) -> list[str]:
        """Keys of what is no object: probes and temporary files of writers that were killed."""
        return [key for key in self.keys("") if key.startswith(".probe-")]

    def delete(self, prefix: str) -> None:
        """Remove the object or folder, if it is there. Raises StorageError when any of it stays."""
        raise NotImplementedError

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

    def attempts(self, key: str) -> Iterator[bytes | None]:
        """What the object holds, None where there is none: for `replace`, again as long as another is quicker."""
        for _ in range(ATTEMPTS):
            yield self.read(key) if self.exists(key) else None
        raise StorageError(f"{self.locate(key)}: changed under every one of {ATTEMPTS} attempts; run again")

    def check_writable(self, parameter: str = "storage") -> None:
        """Create, read and delete a small object, so that a store out of reach, or one that knows no conditional
        writes, is found before any work starts. The error is about the parameter that named the store."""
        key = f".probe-{uuid.uuid4().hex}"
        try:
            self.keep(key, b"lenet-pipeline")
            ignored = self.create(key, b"written over")
            self.delete(key)
            if ignored:
                what = "the server does not mind If-None-Match, by which nothing that is published is written over"
                raise StorageError(f"{what}; use one that does, as AWS and SeaweedFS", may_pass=False)
        except StorageError as error:
            what = str(error).removeprefix(f"{self.locate(key)}: ")  # a key of ours, which says nothing to anybody
            raise StorageError(f"{parameter}={str(self)!r}: {what}", may_pass=error.may_pass) from error

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
        except (FileNotFoundError, NotADirectoryError) as error:
            remedy = f"check {self._missing_remedy}"
            raise StorageError(f"{where}: not found ({_short(error)}); {remedy}", may_pass=False) from error
        except self._denied as error:
            remedy = f"check {self._access_remedy}"
            raise StorageError(f"{where}: access denied ({_short(error)}); {remedy}", may_pass=False) from error
        except self._failed as error:
            remedy, may_pass = f"check {self._reach_remedy}", getattr(error, "errno", None) not in LASTING
            raise StorageError(f"{where}: store failed ({_short(error)}); {remedy}", may_pass=may_pass) from error

    _denied: tuple[type[Exception], ...] = (PermissionError,)
    _failed: tuple[type[Exception], ...] = (OSError,)
    _missing_remedy = "that the store's folder is there, or can be made"
    _access_remedy = "the folder's owner and mode"
    _reach_remedy = "the disk"


class LocalStore(Store):
    """A folder. Writes go to a temporary file beside the target, are synced, and then take its name."""

    def listing(self, prefix: str) -> dict[str, Listed]:
        # Not fs.find: to it a folder that cannot be read is empty, and retention deletes what nobody seems to hold.
        found: dict[str, Listed] = {}
        folders = [self.path(prefix)]
        while folders:
            folder = folders.pop()
            missing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
            with self._explained(folder.removeprefix(self.root + "/")), missing, os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name != LOST_AND_FOUND:
                            folders.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):
                            stat = entry.stat()
                            written = datetime.fromtimestamp(stat.st_mtime, UTC)
                            found[entry.path.removeprefix(self.root + "/")] = Listed(stat.st_size, written)
        return found

    def delete(self, prefix: str) -> None:
        path = Path(self.path(prefix))
        with self._explained(prefix):
            attempt = 0
            while path.is_dir() and not path.is_symlink():
                attempt += 1
                try:
                    shutil.rmtree(path)
                except FileNotFoundError:
                    pass  # another was quicker with a part of it
                except OSError as error:
                    # Another still writes there; or the folder is on NFS, which keeps what somebody has open.
                    if error.errno != errno.ENOTEMPTY or attempt == DELETE_ATTEMPTS:
                        raise
            path.unlink(missing_ok=True)

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
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                raise StorageError(
                    f"{self.locate(key)}: its file system makes no hard links ({_short(error)}), by which an object is "
                    "created once; use a folder on another, or s3://bucket/prefix",
                    may_pass=False,
                ) from error
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


def _short(error: BaseException) -> str:
    """An error's first line, without its class's noise."""
    text = str(error.args[1] if isinstance(error, OSError) and len(error.args) > 1 else error).strip()
    return text.splitlines()[0] if text else type(error).__name__
