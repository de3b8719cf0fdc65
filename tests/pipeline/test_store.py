"""Proves that a folder keeps a store's promises when a disk fails, a process is killed, or a folder is not readable."""

import errno
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StorageError
from pipeline.storage import Store, open_store
from tests import conftest

refusal = partial(conftest.refusal, kind=StorageError)
OPERATIONS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("k"),
    "put": lambda store: store.put("k", b"x"),
    "create": lambda store: store.create("k", b"x"),
    "check_writable": lambda store: store.check_writable(),
}


@pytest.mark.parametrize("name", ["plain", "with space", "per%20cent", "häuser#1?", "a@b"])
def test_a_folders_url_opens_the_same_folder(tmp_path: Path, name: str) -> None:
    by_path = open_store(str(tmp_path / name))
    by_path.put("k", b"x")
    assert (tmp_path / name / "k").read_bytes() == b"x"
    assert open_store(by_path.url).read("k") == b"x"


def test_a_key_is_located_where_a_person_finds_it(tmp_path: Path) -> None:
    assert open_store(str(tmp_path)).locate("a/b") == str(tmp_path / "a/b")
    assert open_store("s3://bucket/prefix/").locate("a/b") == "s3://bucket/prefix/a/b"


@pytest.mark.parametrize("operation", ["put", "create", "replace"])
def test_a_write_that_fails_at_its_last_step_leaves_nothing(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    local_store.put("k", b"y")
    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(Path, "replace", fail)
    target = "k" if operation == "replace" else "new"
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: local_store.put(target, b"x"),
        "create": lambda: local_store.create(target, b"x"),
        "replace": lambda: local_store.replace(target, b"x", b"y"),
    }
    with pytest.raises(
        StorageError, match=re.escape("store failed (No space left on device); check the disk")
    ) as raised:
        calls[operation]()
    assert not pickle.loads(pickle.dumps(raised.value)).may_pass  # noqa: S301  # as Ray sends it from a worker
    assert local_store.keys("") == ["k"]
    assert local_store.read("k") == b"y"


@pytest.mark.parametrize("operation", ["create", "check_writable"])
def test_a_file_system_without_hard_links_is_named_before_any_work(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")  # Linux, of exFAT

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StorageError, match=r": its file system makes no hard links \(Operation .*\), by") as raised:
        OPERATIONS[operation](local_store)
    assert not raised.value.may_pass
    assert local_store.keys("") == []


@pytest.mark.parametrize(("operation", "last"), [("put", "replace"), ("create", "link")])
def test_an_object_is_on_the_disk_before_it_has_its_name(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, operation: str, last: str
) -> None:
    done: list[str] = []

    def noted(step: Callable[..., object]) -> Callable[..., object]:
        return lambda *given: (done.append(step.__name__), step(*given))[1]

    for where, name in ((os, "fsync"), (os, "link"), (Path, "replace")):
        monkeypatch.setattr(where, name, noted(getattr(where, name)))
    OPERATIONS[operation](local_store)
    assert done == ["fsync", last]


@pytest.mark.parametrize("operation", ["put", "keep"])
def test_a_disk_that_keeps_other_bytes_is_named(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: os.ftruncate(file, 1))
    message = refusal(lambda: getattr(local_store, operation)("k", b"whole"))
    where = local_store.locate("k")
    assert message == f"{where}: read back other bytes than were written; check the disk or server"


@pytest.mark.parametrize("operation", ["put", "create", "replace"])
def test_a_process_killed_before_the_last_step_leaves_nothing_visible(local_store: Store, operation: str) -> None:
    local_store.put("a/k", b"y")
    calls = {"put": 'put("a/n", b"x")', "create": 'create("a/n", b"x")', "replace": 'replace("a/k", b"x", b"y")'}
    program = f"""
import os, sys
from pathlib import Path
from pipeline.storage import open_store
os.link = Path.replace = lambda *_: os._exit(9)
open_store(sys.argv[1]).{calls[operation]}
"""
    assert subprocess.run([sys.executable, "-c", program, local_store.url], check=False).returncode == 9
    assert local_store.keys("") == ["a/k"]
    assert local_store.read("a/k") == b"y"
    assert local_store.replace("a/k", b"z", b"y"), "nor does it hold a lock"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, operation: str) -> None:
    """Below a regular file, since the tests may run as root, who may write anywhere else."""
    (tmp_path / "file").write_bytes(b"")
    below = open_store(str(tmp_path / "file" / "store"))
    message = refusal(lambda: OPERATIONS[operation](below))
    where = f"storage='{tmp_path}/file/store'" if operation == "check_writable" else f"{tmp_path}/file/store/k"
    assert message == f"{where}: not found (Not a directory); check that the store's folder is there, or can be made"


def test_whoever_gave_the_folder_by_another_parameter_hears_of_that(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    message = refusal(lambda: open_store(str(tmp_path / "file" / "out")).check_writable("output"))
    assert message.startswith(f"output='{tmp_path}/file/out': not found (Not a directory); check ")


def test_a_folder_that_cannot_be_looked_into_is_not_taken_for_empty(local_store: Store) -> None:
    """With no file left to open, since the tests may run as root, who may look into any folder."""
    local_store.put("a/b/k", b"x")
    program = """
import os, resource, sys
from pipeline.storage import open_store
store = open_store(sys.argv[1])
assert store.keys("") == ["a/b/k"]
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
store.keys("a")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, local_store.url], check=False, capture_output=True, text=True
    )
    said = f"StorageError: {local_store.locate('a')}: store failed (Too many open files); check the disk"
    assert ended.stderr.splitlines()[-1].endswith(said)


def test_a_folder_that_another_still_writes_to_is_deleted_all_the_same(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_store.put("a/b/k", b"x")
    remove, written = os.rmdir, []

    def written_to_before(path: str, **options: Any) -> None:
        if not written:
            written.append(local_store.create("a/b/late", b"x"))
        remove(path, **options)

    monkeypatch.setattr(os, "rmdir", written_to_before)
    local_store.delete("a")
    assert written == [True]
    assert local_store.keys("") == []


def test_what_a_file_system_keeps_at_its_root_is_nobodys(local_store: Store) -> None:
    local_store.put("a/k", b"x")
    local_store.put("lost+found/#12", b"x")
    assert local_store.keys("") == ["a/k"]


def test_links_are_not_listed(local_store: Store, tmp_path: Path) -> None:
    local_store.put("a/k", b"x")
    Path(local_store.path("a/file")).symlink_to(local_store.path("a/k"))
    Path(local_store.path("a/folder")).symlink_to(tmp_path)
    assert local_store.keys("") == ["a/k"]
