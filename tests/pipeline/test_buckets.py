"""Proves that answers of S3 which SeaweedFS does not give are understood: a proxy before the real server gives them."""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.errors import ConfigError, StorageError
from pipeline.feed import find_feed, read_unit
from pipeline.storage import Store, open_store
from tests.conftest import refusal

if TYPE_CHECKING:
    from tests.conftest import S3Server


class Proxy(ThreadingHTTPServer):
    """Passes requests on, all but those that `instead` has an answer to: status and body; None breaks off in a body."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.asked: list[str] = []
        self.stall_s = 0.0  # before a body breaks off
        self.instead: Callable[[str, str], tuple[int, str | None] | None] = lambda _method, _path: None

    def at_first(self, times: int, method: str, status: int, body: str | None) -> None:
        """Give this answer so many times to requests of the method; then pass them on."""
        left = [times]

        def instead(asked: str, path: str) -> tuple[int, str | None] | None:
            if asked != method or left[0] == 0:
                return None
            left[0] -= 1
            return status, body

        self.instead = instead


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.command)
        self.close_connection = True
        if (answer := self.server.instead(self.command, self.path)) is not None:
            status, body = answer
            self._answer(status, {"Content-Length": "1000"}, b"abc") if body is None else self._answer(
                status, {"Content-Type": "application/xml", "Content-Length": str(len(body))}, body.encode()
            )
            return
        connection = http.client.HTTPConnection(self.server.upstream)
        connection.request(self.command, self.path, sent, dict(self.headers))
        response = connection.getresponse()
        hop = ("connection", "transfer-encoding", "content-length")
        headers = {name: value for name, value in response.getheaders() if name.lower() not in hop}
        body_of = response.read()
        length = response.headers["Content-Length"] if self.command == "HEAD" else len(body_of)
        self._answer(response.status, {**headers, "Content-Length": str(length or 0)}, body_of)
        connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if len(body) < int(headers["Content-Length"]):
            time.sleep(self.server.stall_s)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(s3_server: "S3Server", s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between the store and the server that tests share."""
    with Proxy(s3_server.endpoint) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        yield proxy
        proxy.shutdown()


@pytest.fixture
def behind(proxy: Proxy, s3_store: Store) -> Store:
    """An empty prefix of the bucket, reached through the proxy."""
    return s3_store


def error(code: str) -> str:
    return f"<Error><Code>{code}</Code><Message>said the proxy</Message></Error>"


def test_a_server_that_errs_while_it_starts_is_waited_for(proxy: Proxy, behind: Store) -> None:
    """500 at first, as of a server whose disks are not up yet."""
    proxy.at_first(8, "PUT", 500, error("InternalError"))
    behind.put("k", b"whole")
    assert behind.read("k") == b"whole"
    assert proxy.asked.count("PUT") == 9


def test_what_is_not_deleted_is_told(proxy: Proxy, behind: Store) -> None:
    """As AWS answers who may write but not delete: 200, with an error for each key."""
    for key in ("a/1", "a/2"):
        behind.put(key, b"x")
    name = behind.path("a/1").partition("/")[2]
    wrong = f"<Key>{name}</Key><Code>%s</Code><Message>said the proxy</Message>"
    proxy.at_first(2, "POST", 200, f"<DeleteResult><Error>{wrong % 'AccessDenied'}</Error></DeleteResult>")
    with pytest.raises(StorageError) as raised:
        behind.delete("a")
    assert str(raised.value) == (
        f"{behind.locate('a/1')}: not deleted (AccessDenied: said the proxy); "
        "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE and its login"
    )
    assert not raised.value.may_pass
    assert "AccessDenied" in refusal(behind.check_writable, StorageError)
    proxy.at_first(1, "POST", 200, f"<DeleteResult><Error>{wrong % 'InternalError'}</Error></DeleteResult>")
    with pytest.raises(StorageError, match="InternalError") as raised:
        behind.delete("a")
    assert raised.value.may_pass
    behind.delete("a")
    assert behind.keys("a") == []


def test_a_body_that_breaks_off_is_read_again(proxy: Proxy, behind: Store) -> None:
    behind.put("k", b"whole")
    proxy.at_first(5, "GET", 200, None)
    assert behind.read("k") == b"whole"


def test_a_body_that_stalls_is_read_again(proxy: Proxy, behind: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    behind.put("k", b"whole")
    monkeypatch.setattr(storage, "S3_READ_TIMEOUT_S", 0.3)
    monkeypatch.setattr(proxy, "stall_s", 60)
    impatient = open_store(behind.url)
    proxy.at_first(2, "GET", 200, None)
    started = time.monotonic()
    assert impatient.read("k") == b"whole"
    assert time.monotonic() - started < 50


def test_a_body_that_always_breaks_off_is_one_line(
    proxy: Proxy, behind: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind.put("k", b"whole")
    monkeypatch.setenv("LENET_S3_OUTAGE_S", "0.5")
    proxy.at_first(10**6, "GET", 200, None)
    for call in (lambda: behind.read("k"), lambda: behind.keys("")):
        started = time.monotonic()
        message = refusal(call, StorageError)
        assert message.endswith("check AWS_ENDPOINT_URL and that the server is up")
        assert time.monotonic() - started < 25  # by default it would be 30


def test_an_object_is_read_whole_by_one_request_however_large(proxy: Proxy, behind: Store) -> None:
    large = bytes(range(256)) * 2**18
    behind.put("k", large)
    proxy.asked.clear()
    assert behind.read("k") == large
    assert proxy.asked == ["GET"]


def test_a_part_that_breaks_off_is_read_again(proxy: Proxy, behind: Store) -> None:
    behind.put("k", b"0123456789")
    with behind.fs.open(behind.path("k")) as file:
        proxy.at_first(5, "GET", 200, None)
        file.seek(4)
        assert file.read(3) == b"456"
        assert file.read() == b"789"
    proxy.at_first(5, "GET", 200, None)
    assert behind.fs.cat_file(behind.path("k"), start=4, end=7) == b"456"
    assert behind.fs.cat_file(behind.path("k"), start=-2) == b"89"


def test_a_file_that_changes_while_it_is_open_is_read_no_more(behind: Store) -> None:
    behind.put("k", b"one")
    with behind.fs.open(behind.path("k")) as file:
        behind.put("k", b"two")
        with pytest.raises(OSError, match="pre-conditions"):
            file.read()


def test_an_object_that_changes_while_it_is_fetched_is_not_mixed_of_two(
    proxy: Proxy, behind: Store, tmp_path: Path
) -> None:
    behind.put("k", bytes(60 * 2**20))

    def replaced_before_the_second(method: str, _path: str) -> None:
        if method == "GET" and proxy.asked.count("GET") == 2:
            behind.fs.pipe_file(behind.path("k"), b"\1" * (60 * 2**20))

    proxy.asked.clear()
    proxy.instead = replaced_before_the_second
    with pytest.raises(StorageError, match=rf"^{behind.locate('k')}: store failed \(.*pre-conditions") as raised:
        behind.fetch("k", tmp_path / "k")
    assert raised.value.may_pass
    proxy.at_first(3, "GET", 200, None)
    behind.fetch("k", tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == b"\1" * (60 * 2**20)


def test_parquet_that_a_server_breaks_off_is_not_torn(
    proxy: Proxy, behind: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": pa.array([bytes(784)] * 100, pa.binary(784))}), sink)
    behind.put("in/x.parquet", bytes(sink.getvalue()))
    found = find_feed(behind.locate("in"), "image", 28)
    monkeypatch.setenv("LENET_S3_OUTAGE_S", "0.5")
    proxy.instead = lambda method, path: (200, None) if method == "GET" and ".parquet" in path else None
    with ThreadPoolExecutor(1) as pool:
        for call in (
            lambda: find_feed(behind.locate("in"), "image", 28),
            lambda: list(read_unit(found.store, found.units[0], "image", 28, "no", pool)),
        ):
            with pytest.raises(
                StorageError, match=r"x.parquet: cannot be read \(.*\); check the disk or server$"
            ) as raised:
                call()
            assert raised.value.may_pass


def test_a_source_that_cannot_be_listed_is_not_empty(
    proxy: Proxy, behind: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind.put("in/x.png", b"x")
    with pytest.raises(ConfigError, match="there is nothing to predict"):
        find_feed(behind.locate("none/*.png"), "image", 28)
    monkeypatch.setenv("LENET_S3_OUTAGE_S", "0")

    def no_listing(_method: str, path: str) -> tuple[int, str] | None:
        """But whether anything is there at all is told."""
        return (500, error("InternalError")) if "list-type" in path and "max-keys=1" not in path else None

    proxy.instead = no_listing
    for source in ("in", "in/*.png"):
        with pytest.raises(StorageError, match=r"/in: cannot be listed \(.*\); check the server$") as raised:
            find_feed(behind.locate(source), "image", 28)
        assert raised.value.may_pass
    assert find_feed(behind.locate("in/x.png"), "image", 28).units[0].keys == ("x.png",)


def test_a_conflict_between_conditional_writes_is_tried_again(proxy: Proxy, behind: Store) -> None:
    """409 is AWS's "somebody else is at it": the other write may fail, so nobody has written yet."""
    conflict = error("ConditionalRequestConflict")
    proxy.at_first(2, "PUT", 409, conflict)
    assert behind.create("k", b"one")
    proxy.at_first(2, "PUT", 409, conflict)
    assert behind.replace("k", b"two", b"one")
    proxy.at_first(2, "PUT", 409, conflict)
    assert behind.keep("k", b"three") == b"two"
    proxy.at_first(10**6, "PUT", 409, conflict)
    with pytest.raises(StorageError, match="said the proxy") as raised:
        behind.create("other", b"one")
    assert raised.value.may_pass


def test_an_object_deleted_while_it_is_replaced_is_false(proxy: Proxy, behind: Store) -> None:
    behind.put("k", b"one")

    def deleted_before_the_put(method: str, path: str) -> tuple[int, str] | None:
        if method == "PUT":
            proxy.instead = lambda _method, _path: None
            behind.delete("k")
            return 404, error("NoSuchKey")
        return None

    proxy.instead = deleted_before_the_put
    assert behind.replace("k", b"two", b"one") is False
    assert not behind.exists("k")
