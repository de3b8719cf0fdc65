"""Proves that a document in the store is what was written, or one line that names it."""

import pytest
from pydantic import BaseModel

from pipeline.documents import find_document, keep_document, read_document
from pipeline.errors import StorageError
from pipeline.storage import Store
from tests.conftest import refusal


class Point(BaseModel):
    x: int
    name: str


def test_what_was_kept_first_stays_and_is_read_back(store: Store) -> None:
    assert find_document(store, "a/p.json", Point) is None
    with pytest.raises(StorageError, match=r"p\.json"):
        read_document(store, "a/p.json", Point)
    first = Point(x=1, name="one")
    assert keep_document(store, "a/p.json", first) == first
    assert keep_document(store, "a/p.json", Point(x=2, name="two")) == first
    assert read_document(store, "a/p.json", Point) == find_document(store, "a/p.json", Point) == first


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "Invalid JSON"),
        (b'{"x": 1, "na', "Invalid JSON"),
        (b"[]", "Input should be an object"),
        (b'{"x": 1}', "name: Field required"),
        (b'{"x": "much", "name": "n"}', "x: Input should be a valid integer"),
        (b"\xff\xfe\x00", "Invalid JSON"),
    ],
)
def test_a_damaged_one_is_a_line_with_its_key(store: Store, data: bytes, problem: str) -> None:
    store.put("a/p.json", data)
    for read in (
        lambda: read_document(store, "a/p.json", Point),
        lambda: find_document(store, "a/p.json", Point),
        lambda: keep_document(store, "a/p.json", Point(x=1, name="one")),
    ):
        message = refusal(read)
        assert message.startswith(f"{store.locate('a/p.json')}: damaged, or of another version (")
        assert problem in message
