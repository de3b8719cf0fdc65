"""Proves that folders and buckets keep the same promises: whole objects, conditional writes, one-line errors."""

import json
import pickle
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.errors import ConfigError, StorageError
from pipeline.storage import Store, open_store, split_url
from tests import conftest
from tests.conftest import free_ports

if TYPE_CHECKING:
    from tests.conftest import S3Server

OUTAGE_S = 3
THREADS = 10

OPERATIONS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("k"),
    "put": lambda store: store.put("k", b"x"),
    "create": lambda store: store.create("k", b"x"),
    "replace": lambda store: store.replace("k", b"x", b"y"),
    "exists": lambda store: store.exists("k"),
    "keys": lambda store: store.keys("k"),
    "delete": lambda store: store.delete("k"),
    "check_writable": lambda store: store.check_writable(),
}


refusal = partial(conftest.refusal, kind=StorageError)


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    """Results of `work(0)` to `work(count - 1)`, begun together."""
    together = threading.Barrier(count)

    def begin(index: int) -> object:
        together.wait()
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


# What holds for folders and buckets alike.


def test_an_object_is_read_back_as_it_was_put(store: Store) -> None:
    store.put("a/b", b"one")
    assert store.read("a/b") == b"one"
    store.put("a/b", b"two")
    assert store.read("a/b") == b"two"


def test_exists_knows_objects_only(store: Store) -> None:
    store.put("a/b", b"")
    assert store.exists("a/b")
    assert not store.exists("a")
    assert not store.exists("a/b/c")
    assert not store.exists("other")


def test_keys_are_those_under_the_folder_sorted(store: Store) -> None:
    for key in ("d/z", "d/a", "d/e/f", "dd/x", "other"):
        store.put(key, b"x")
    assert store.keys("d") == ["d/a", "d/e/f", "d/z"]
    assert store.keys("nothing") == []


def test_delete_removes_an_object_a_folder_and_minds_nothing_missing(store: Store) -> None:
    for key in ("a/1", "a/b/2", "c", "ab/3"):
        store.put(key, b"x")
    store.delete("a")
    store.delete("c")
    store.delete("never-there")
    assert [store.exists(key) for key in ("a/1", "a/b/2", "c", "ab/3")] == [False, False, False, True]


def test_delete_takes_no_key_for_a_pattern(store: Store) -> None:
    for key in ("a[1]/k", "a1/k", "b*", "bc"):
        store.put(key, b"x")
    store.delete("a[1]")
    store.delete("b*")
    assert store.keys("") == ["a1/k", "bc"]


def test_delete_knows_more_than_a_page_of_keys(store: Store) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda number: store.create(f"a/{number}", b""), range(1001)))
    store.delete("a")
    assert store.keys("") == []


def test_a_missing_object_is_named(store: Store) -> None:
    message = refusal(lambda: store.read("a/b"))
    assert message.startswith(f"{store.locate('a/b')}: not found")
    assert "check" in message


def test_the_probe_leaves_nothing_behind(store: Store) -> None:
    store.check_writable()
    assert store.keys("") == []


def test_a_server_that_ignores_conditions_is_named_before_any_work(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = storage.S3Store._put_object
    with monkeypatch.context() as patch:
        patch.setattr(storage.S3Store, "_put_object", lambda store, key, data, **condition: put(store, key, data))
        with pytest.raises(
            StorageError, match="^storage='s3://.*': the server does not mind If-None-Match, by"
        ) as raised:
            s3_store.check_writable()
    assert not raised.value.may_pass
    assert s3_store.keys("") == []


def test_create_never_overwrites(store: Store) -> None:
    assert store.create("a/k", b"mine")
    assert store.create("a/k", b"mine"), "the same bytes again: a retry after a lost answer"
    assert not store.create("a/k", b"yours")
    assert store.read("a/k") == b"mine"
    assert store.keys("a") == ["a/k"]


def test_of_many_creators_exactly_one_wins(store: Store) -> None:
    won = in_threads(THREADS, lambda index: store.create("k", b"%d" % index))
    assert won.count(True) == 1
    assert store.read("k") == b"%d" % won.index(True)


def test_replace_writes_only_over_what_was_expected(store: Store) -> None:
    assert store.replace("a/k", b"one", None)
    assert not store.replace("a/k", b"two", None)
    assert not store.replace("a/k", b"two", b"something else")
    assert store.read("a/k") == b"one"
    assert store.replace("a/k", b"two", b"one")
    assert store.replace("a/k", b"two", b"one"), "already there: a retry after a lost answer"
    assert store.read("a/k") == b"two"
    assert store.keys("a") == ["a/k"]


def test_replace_of_a_missing_object_is_false(store: Store) -> None:
    assert store.replace("a/k", b"one", b"expected") is False
    assert not store.exists("a/k")


def test_no_update_is_lost_between_many_writers(store: Store) -> None:
    store.put("counter", json.dumps({"count": 0}).encode())

    def increment(writer: int) -> None:
        for update in range(3):
            while True:
                seen = store.read("counter")
                # No two updates write the same bytes, which `replace` would take for one of them tried again.
                after = {"count": json.loads(seen)["count"] + 1, "update": f"{writer}-{update}"}
                if store.replace("counter", json.dumps(after).encode(), seen):
                    break

    in_threads(4, increment)
    assert json.loads(store.read("counter"))["count"] == 12


def test_a_store_works_in_another_process(store: Store) -> None:
    store.put("k", b"written here")
    copy: Store = pickle.loads(pickle.dumps(store))  # noqa: S301 - as Ray sends it
    assert copy.read("k") == b"written here"
    assert open_store(store.url).read("k") == b"written here"


def test_a_copy_speaks_to_the_server_of_now(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_store.put("k", b"written here")
    sent = pickle.dumps(s3_store)
    [nobody] = free_ports(1)
    with monkeypatch.context() as before:
        before.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody}")
        before.setenv("LENET_S3_OUTAGE_S", "0")
        with pytest.raises(StorageError, match="Could not connect"):
            pickle.loads(sent).read("k")  # noqa: S301 - as Ray sends it
    assert pickle.loads(sent).read("k") == b"written here"  # noqa: S301


def test_arrow_reads_and_writes_parquet_in_the_same_place(store: Store) -> None:
    table = pa.table({"x": range(1000)})
    store.put("made/by-store", b"the folder is there")
    pq.write_table(table, store.path("made/x.parquet"), filesystem=store.arrow)
    assert pq.read_table(store.path("made/x.parquet"), filesystem=store.arrow).equals(table)
    assert pq.read_table(pa.BufferReader(store.read("made/x.parquet"))).equals(table)


# URLs.


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("file://relative/path", "write file:///relative/path"),
        ("file:///data/c#/store", "write %23, or the path alone"),
        ("file:///data/what?", "write %3F, or the path alone"),
        ("s3://", "use one of these"),
        ("gs://bucket/x", "use one of these"),
        ("http://host/x", "use one of these"),
        ("~nobody-of-that-name/x", "write the path in full"),
        ("s3://[x", "check its host and brackets"),
        ("s3://bucket/exp[1]", "use another prefix"),
        ("s3://bucket/run#1", "use another prefix"),
        ("s3://bucket/run?", "use another prefix"),
        ("s3://bucket*/run", "use another prefix"),
        ("s3://my bucket/x", "write s3://bucket/prefix"),
        ("s3://bucket//prefix", "write s3://bucket/prefix"),
    ],
)
def test_other_urls_are_refused_with_a_remedy(url: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"^storage='{re.escape(url)}': .*; {re.escape(remedy)}$"):
        open_store(url)


@pytest.mark.parametrize("secret", ["hunter2", "hun/ter2", "hun?ter2", "hun#ter2", "hun@ter2"])
def test_credentials_in_a_url_are_refused_and_not_repeated(secret: str) -> None:
    with pytest.raises(ConfigError, match="credentials do not belong in a URL; use AWS_") as raised:
        open_store(f"s3://AKIAXYZ:{secret}@bucket/prefix")
    assert "AKIAXYZ" not in str(raised.value)
    assert not re.search("hun|ter2", str(raised.value))


def test_an_at_sign_in_a_path_is_no_credential() -> None:
    url = "http://mirror:8081/@data/mnist"
    assert split_url(url, "source").hostname == "mirror"
    with pytest.raises(ConfigError, match="credentials do not belong in a URL; use a URL without"):
        split_url("http://me:hunter2@mirror:8081/@data/mnist", "source")


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("AWS_ENDPOINT_URL", "localhost:8333", "write http://localhost:8333"),
        ("AWS_ENDPOINT_URL_S3", "seaweedfs", "write http://seaweedfs"),
        ("LENET_S3_OUTAGE_S", "30s", "use 30"),
        ("LENET_S3_OUTAGE_S", "nan", "use 30"),
        ("LENET_S3_OUTAGE_S", "inf", "use 30"),
        ("LENET_S3_OUTAGE_S", "86401", "use 30"),
        ("LENET_S3_OUTAGE_S", "-1", "use 30"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, remedy: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{name}='{value}': .*; {remedy}$"):
        open_store("s3://bucket/x")


# Buckets in trouble.


def test_wrong_credentials_are_named_by_every_operation(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = open_store(s3_store.url)
    for name, operation in OPERATIONS.items():
        started = time.monotonic()
        message = refusal(lambda operation=operation: operation(refused))
        asked = name == "check_writable"
        assert message.startswith(f"storage='{s3_store.url}': " if asked else f"{s3_store.url}/k: "), name
        assert "access denied" in message
        assert message.endswith("check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE and its login")
        assert time.monotonic() - started < 25


def test_no_credentials_are_named(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "check AWS_ACCESS_KEY_ID" in refusal(open_store(s3_store.url).check_writable)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"AWS_PROFILE": "nosuch"}, r"The config profile \(nosuch\) could not be found"),
        ({"AWS_ACCESS_KEY_ID": "AKIA"}, "Partial credentials found in env, missing: AWS_SECRET_ACCESS_KEY"),
    ],
    ids=["profile", "half"],
)
def test_credentials_that_cannot_be_meant_are_named_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=rf"access denied \({said}\); check AWS_ACCESS_KEY_ID and ") as raised:
        open_store("s3://bucket/prefix").read("k")
    assert not raised.value.may_pass


def test_a_login_that_is_due_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a login is kept
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    (tmp_path / "config").write_text(
        "[profile work]\nsso_session = s\nsso_account_id = 123456789012\nsso_role_name = dev\nregion = us-east-1\n"
        "[sso-session s]\nsso_region = us-east-1\nsso_start_url = https://localhost/start\n"
    )
    message = refusal(lambda: open_store("s3://bucket/prefix").read("k"))
    assert "access denied (Error loading SSO Token: Token for s does not exist); check AWS_" in message
    assert caplog.text == ""


@pytest.mark.parametrize("operation", ["read", "put", "create", "check_writable"])
def test_a_missing_bucket_is_named(s3_env: dict[str, str], operation: str) -> None:
    missing = open_store("s3://no-such-bucket/prefix")
    message = refusal(lambda: OPERATIONS[operation](missing))
    asked = operation == "check_writable"
    assert message.startswith("storage='s3://no-such-bucket/prefix': " if asked else "s3://no-such-bucket/prefix/k: ")
    assert "check the bucket" in message


def test_a_dead_endpoint_is_named_by_every_operation(s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting: what is said must not depend on how long it was tried."""
    monkeypatch.setattr(storage, "S3_OUTAGE_S", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    dead = open_store("s3://bucket/prefix")
    for name, operation in OPERATIONS.items():
        started = time.monotonic()
        message = refusal(lambda operation=operation: operation(dead))
        asked = name == "check_writable"
        assert message.startswith("storage='s3://bucket/prefix': " if asked else "s3://bucket/prefix/k: "), name
        assert message.endswith("check AWS_ENDPOINT_URL and that the server is up")
        assert time.monotonic() - started < 25


@pytest.fixture
def silent_server() -> Iterator[str]:
    """URL of a server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_never_answers_is_given_up(
    s3_env: dict[str, str], silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "S3_OUTAGE_S", 0)
    monkeypatch.setattr(storage, "S3_READ_TIMEOUT_S", 0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", silent_server)
    started = time.monotonic()
    message = refusal(lambda: open_store("s3://bucket/prefix").read("k"))
    assert message.endswith("check AWS_ENDPOINT_URL and that the server is up")
    assert time.monotonic() - started < 10


def test_forty_operations_begun_in_an_outage_of_three_seconds_all_succeed_and_so_do_the_next_forty(
    own_s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in own_s3_server.env.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{own_s3_server.bucket}/outage")
    store.put("before", b"kept")
    for outage in range(2):
        own_s3_server.stop()
        with ThreadPoolExecutor(40) as pool:
            reads = [pool.submit(store.read, "before") for _ in range(20)]
            creates = [pool.submit(store.create, f"{outage}-{number}", b"new") for number in range(20)]
            time.sleep(OUTAGE_S)
            assert not any(operation.done() for operation in reads + creates)
            own_s3_server.start()
            assert all(operation.result() == b"kept" for operation in reads)
            assert all(operation.result() for operation in creates)
    assert len(store.keys("")) == 41
