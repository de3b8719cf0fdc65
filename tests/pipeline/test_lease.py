"""Proves that a run has one writer: others wait, take over from the dead at once and from the silent after a while, and
whoever was superseded hears of it. Real processes, on disk and on S3."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline import lease
from pipeline.lease import Hold, Lease, Process, Watchman, ask_to_stop, held, read_lease
from pipeline.storage import Store
from tests.conftest import wait_for

KEY = "staging/r/lease.json"
HOLDER = """
import sys, time
from pipeline import lease
from pipeline.storage import open_store
lease.BEAT_S = 0.5  # whoever stops it as soon as it has the lease does not hit a beat, which others would wait for
with lease.held(open_store(sys.argv[1]), "staging/r/lease.json", lambda: False) as hold:
    print("held", hold.lease.token, flush=True)
    while not hold.lost:
        time.sleep(0.01)
print("lost", flush=True)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "EXPIRES_S", 1.5)


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lease expires, so whoever has one has not waited for that."""
    monkeypatch.setattr(lease, "EXPIRES_S", 600)
    monkeypatch.setattr(lease, "BEAT_S", 2)  # as long as giving back waits for a beat that is under way


def never() -> bool:
    return False


def start_holder(store: Store) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, store.url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("held")
    return process


@pytest.mark.usefixtures("_patient")
def test_a_lease_given_back_is_had_at_once(store: Store) -> None:
    for token in (1, 2, 3):
        with held(store, KEY, never) as hold:
            assert hold is not None
            assert (hold.lease.token, hold.lease.holder) == (token, Process.current())
    found = read_lease(store, KEY)
    assert found is not None
    assert found.holder is None


@pytest.mark.usefixtures("_patient")
def test_a_killed_holder_is_followed_at_once(store: Store) -> None:
    holder = start_holder(store)
    os.kill(holder.pid, signal.SIGKILL)  # and not buried: its parent does not wait for it
    with held(store, KEY, never) as hold:
        assert hold is not None
        assert hold.lease.token == 2
    holder.communicate()


def test_a_stopped_holder_is_followed_when_its_lease_has_expired_and_learns_of_it(store: Store) -> None:
    holder = start_holder(store)
    holder.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with held(store, KEY, never) as hold:
        assert hold is not None
        assert 1.5 <= time.monotonic() - started < 30
        holder.send_signal(signal.SIGCONT)
        out, _ = holder.communicate(timeout=600)
        assert out == "lost\n"
        time.sleep(0.2)
        assert not hold.lost


def test_a_living_holder_is_waited_for_until_the_work_is_finished(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRES_S", 5)  # on a busy machine, a holder may be late for a second or two
    holder = start_holder(store)
    finished = threading.Event()
    threading.Timer(6, finished.set).start()  # longer than a lease lasts unrenewed
    started = time.monotonic()
    with held(store, KEY, finished.is_set) as hold:
        assert hold is None
    assert time.monotonic() - started >= 6
    found = read_lease(store, KEY)
    assert found is not None
    assert found.token == 1
    holder.kill()
    holder.communicate()


def test_of_many_at_once_one_has_it_at_a_time(store: Store) -> None:
    inside, most, entered = 0, 0, []
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with held(store, KEY, never) as hold:
            assert hold is not None
            with guard:
                inside += 1
                most = max(most, inside)
                entered.append(hold.lease.token)
            time.sleep(0.05)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert entered == [1, 2, 3, 4, 5, 6]


def test_workers_hear_of_the_end_and_of_another_holder(store: Store) -> None:
    first = Lease(token=1, holder=Process.current())
    store.create(KEY, first.encode())
    hold = Hold(store, KEY, first)
    watchman, other = Watchman(store, KEY, 1), Watchman(store, KEY, 2)
    assert watchman.look() == "go on"
    assert other.look() == "fenced"
    hold.ask_stop()
    wait_for(lambda: watchman.verdict == "stop")
    hold.give_back()
    with held(store, KEY, never):
        assert watchman.look() == "fenced"


def test_anybody_can_ask_for_the_end_and_the_holder_keeps_its_lease(store: Store) -> None:
    assert not ask_to_stop(store, KEY, "a job")  # of nobody
    with held(store, KEY, never, "a job") as hold:
        assert hold is not None
        assert not ask_to_stop(store, KEY, "another, which waits")
        assert not hold.superseded()
        assert not read_lease(store, KEY).stop  # type: ignore[union-attr]
        assert ask_to_stop(store, KEY, "a job")
        wait_for(lambda: hold.stop_asked)
        assert Watchman(store, KEY, 1).look() == "stop"
        time.sleep(0.3)  # and it is not forgotten with the next beats
        assert (hold.lost, read_lease(store, KEY).stop) == (False, True)  # type: ignore[union-attr]
    with held(store, KEY, never) as hold:  # the next holder was not asked
        assert hold is not None
        assert not hold.stop_asked


def test_a_lease_that_cannot_be_read_for_a_while_is_renewed_and_looked_at_again(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than it lasts: nobody can have taken what nobody can read."""
    monkeypatch.setattr(lease, "EXPIRES_S", 0.3)
    with held(local_store, KEY, never) as hold:
        assert hold is not None
        watchman = Watchman(local_store, KEY, 1)
        attempts = local_store.attempts(KEY)
        while not local_store.replace(KEY, b"torn", next(attempts)):  # and not put: a beat may come between
            pass
        time.sleep(0.6)
        assert local_store.read(KEY) == b"torn"
        assert not hold.lost
        whole = hold.lease
        assert local_store.replace(KEY, whole.encode(), b"torn")
        wait_for(lambda: hold.lease.beat > whole.beat)
        hold.ask_stop()
        wait_for(lambda: watchman.verdict == "stop")
        assert not hold.lost


def test_while_the_store_is_away_no_lease_expires(local_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRES_S", 0.6)
    elsewhere = Process.current().model_copy(update={"host": "another"})
    local_store.create(KEY, Lease(token=1, holder=elsewhere).encode())
    read, answered = local_store.read, list[float]()

    def away_at_the_third_look(key: str) -> bytes:
        if len(answered) == 2:
            time.sleep(0.8)
        found = read(key)
        answered.append(time.monotonic())
        return found

    monkeypatch.setattr(local_store, "read", away_at_the_third_look)
    with held(local_store, KEY, never) as hold:
        assert hold is not None
        assert time.monotonic() - answered[2] > 0.6


def test_a_process_is_known_by_more_than_its_number_and_whatever_the_clock_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: time.time())  # a clock that is being put right
    me = Process.current()
    assert not me.is_dead()
    before = me.model_copy(update={"started": me.started - 1})
    assert before.is_dead()
    assert not before.model_copy(update={"host": "another"}).is_dead()  # nobody here can know
    assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() in me.host
