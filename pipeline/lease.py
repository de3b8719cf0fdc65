"""One writer for each run: a lease in the store, which the training process renews while it lives.

    staging/<run id>/lease.json     conditional create, then conditional replace: who trains the run, and its last beat

Whoever comes second waits: until the first has finished, or has died. A holder that was only cut off finds, when it
comes back, that the lease has another token; its workers look before they write, so a run has never two writers.
"""

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field

from pipeline.documents import find_document, parse_document
from pipeline.errors import StorageError
from pipeline.storage import Store

log = logging.getLogger(__name__)

BEAT_S = 2.0  # how often a holder renews its lease, and its workers look at it
EXPIRES_S = 15.0  # a lease that has not changed for so long, by the clock of whoever looks on, is nobody's


class Process(BaseModel):
    """A process, so that others of its machine can tell whether it lives: a number alone may be given out again."""

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> "Process":
        """This one. Containers of one machine, which number their processes anew, are hosts of their own, and so are
        machines that were cloned with their name."""
        boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        kernel = f"{boot.read_text().strip()}/{space.stat().st_ino}" if space.exists() else str(uuid.getnode())
        return cls(host=f"{socket.gethostname()}/{kernel}", pid=os.getpid(), started=_started(os.getpid()))

    def is_dead(self) -> bool:
        """True if it is known to have ended; False if it lives, or is of another machine."""
        if self.host != Process.current().host:
            return False
        try:
            # Of a process that waits to be buried, too.
            return _started(self.pid) != self.started or psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return True


def _started(pid: int) -> float:
    """When a process was started: by the kernel's ticks, which a clock that is put right does not change, or else by
    the clock."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        return float(stat.read_text().rpartition(")")[2].split()[19])
    return float(psutil.Process(pid).create_time())


class Lease(BaseModel):
    """Who trains the run, and as which Ray job, if as one. `token` grows with each holder; `stop` asks its workers to
    end with a checkpoint.

    `name` differs with every attempt to take the lease, as `Store.replace` wants of writers.
    """

    model_config = ConfigDict(frozen=True)

    token: int
    holder: Process | None
    job: str | None = None
    name: str = Field(default_factory=lambda: uuid.uuid4().hex)
    beat: int = 0
    stop: bool = False

    def encode(self) -> bytes:
        """As it is stored."""
        return self.model_dump_json().encode()


class Hold:
    """A lease that this process has: it renews it, in a thread of its own, until it is given back or lost."""

    def __init__(self, store: Store, key: str, lease: Lease) -> None:
        self.store, self.key, self.lease = store, key, lease
        self.lost = False
        self._wake = threading.Event()
        self._ended = threading.Event()
        self.ended_here = False  # this process is to end, whatever the workers have heard of it
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def ask_stop(self) -> None:
        """Let the workers end with a checkpoint. Safe to call from a signal handler."""
        self.ended_here = True
        self._wake.set()

    @property
    def stop_asked(self) -> bool:
        """Whether the workers were asked to end, by this process or another."""
        return self.ended_here or self.lease.stop

    def superseded(self) -> bool:
        """Whether another process has the lease, as the store says now, before this one's next beat may say so."""
        return self.lost or self._taken()

    def give_back(self) -> None:
        """Let the next one in at once."""
        self._ended.set()
        self._wake.set()
        self._thread.join(BEAT_S)
        if not self.lost and not self._thread.is_alive():  # it waits for a store that is away: the lease will expire
            with contextlib.suppress(StorageError):
                self._replace(self.lease.model_copy(update={"holder": None}))

    def _beat(self) -> None:
        renewed = time.monotonic()
        while True:
            self._wake.wait(BEAT_S)
            self._wake.clear()
            if self._ended.is_set():
                return
            try:
                self.lost = not self._replace(self._next())
                renewed = time.monotonic()
            except Exception as error:  # in a thread that ended, no SIGTERM would be passed on, and the lease expire
                log.warning("the lease could not be renewed: %r", error)
                self.lost = time.monotonic() - renewed > EXPIRES_S and self._taken()
            if self.lost:
                log.error("%s: another process has taken over this run", self.store.locate(self.key))
                return

    def _next(self) -> Lease:
        return self.lease.model_copy(update={"beat": self.lease.beat + 1, "stop": self.stop_asked})

    def _replace(self, new: Lease) -> bool:
        if self.store.replace(self.key, new.encode(), expected=self.lease.encode()):
            self.lease = new
            return True
        # Somebody may have asked for the end, which changes the lease but not its holder.
        found = read_lease(self.store, self.key)
        if found is None or found.token != self.lease.token:
            return False
        self.lease = found
        return self._replace(new.model_copy(update={"beat": found.beat + 1, "stop": found.stop or new.stop}))

    def _taken(self) -> bool:
        try:
            found = read_lease(self.store, self.key)
        except Exception:
            return False  # nobody can have taken what nobody can reach, or read
        return found is None or found.token != self.lease.token


def lease_key(folder: str) -> str:
    """Key of the lease on the run whose folder this is."""
    return f"{folder}/lease.json"


def read_lease(store: Store, key: str) -> Lease | None:
    """The lease as it stands; None before the first holder."""
    return find_document(store, key, Lease)


def ask_to_stop(store: Store, key: str, job: str | None) -> bool:
    """Ask the holder of the lease, from any machine, to end with a checkpoint, if it is this job, or none; whether it
    is."""
    while (lease := read_lease(store, key)) is not None and lease.holder is not None and lease.job == job:
        stopping = lease.model_copy(update={"stop": True})
        if lease.stop or store.replace(key, stopping.encode(), expected=lease.encode()):
            return True
    return False


@contextlib.contextmanager
def held(store: Store, key: str, finished: Callable[[], bool], job: str | None = None) -> Iterator[Hold | None]:
    """Hold the lease while the block runs, once nobody else does. None if the work has meanwhile finished."""
    lease = _take(store, key, finished, job)
    if lease is None:
        yield None
        return
    hold = Hold(store, key, lease)
    try:
        yield hold
    finally:
        hold.give_back()


def _take(store: Store, key: str, finished: Callable[[], bool], job: str | None) -> Lease | None:
    seen: bytes | None = None
    unchanged_since = looked = time.monotonic()
    while not finished():
        current = store.read(key) if store.exists(key) else None
        if time.monotonic() - looked > EXPIRES_S / 2:
            unchanged_since = time.monotonic()  # the store was away: the holder could not renew its lease either
        looked = time.monotonic()
        lease = None if current is None else parse_document(store, key, Lease, current)
        if current != seen:
            if seen is None and lease is not None and lease.holder is not None:
                log.info("%s process %d trains this run already: waiting", lease.holder.host, lease.holder.pid)
            seen, unchanged_since = current, time.monotonic()
        expired = time.monotonic() - unchanged_since > EXPIRES_S
        if lease is None or lease.holder is None or expired or lease.holder.is_dead():
            mine = Lease(token=1 + (lease.token if lease else 0), holder=Process.current(), job=job)
            if store.replace(key, mine.encode(), expected=current):
                return mine
            continue
        time.sleep(BEAT_S / 2)
    return None


Verdict = Literal["go on", "stop", "fenced"]


class Watchman:
    """Looks at the lease for a worker, in a thread of its own, so that no step waits for the store."""

    def __init__(self, store: Store, key: str, token: int) -> None:
        self.store, self.key, self.token = store, key, token
        self.verdict: Verdict = "go on"
        threading.Thread(target=self._watch, name="watchman", daemon=True).start()

    def look(self) -> Verdict:
        """What the lease says now. Raises StorageError when the store cannot be asked."""
        lease = read_lease(self.store, self.key)
        if lease is None or lease.token != self.token:
            self.verdict = "fenced"
        elif lease.stop and self.verdict == "go on":
            self.verdict = "stop"
        return self.verdict

    def _watch(self) -> None:
        while self.verdict == "go on":
            time.sleep(BEAT_S)
            # A store that cannot be read lets nobody else take over either; and the next look may succeed.
            with contextlib.suppress(Exception):
                self.look()
