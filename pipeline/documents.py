"""JSON documents in the store, each of one pydantic model: a damaged one is one line, with its key."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import DataError
from pipeline.storage import Store

Document = TypeVar("Document", bound=BaseModel)


def parse_document(store: Store, key: str, kind: type[Document], data: bytes) -> Document:
    """What the bytes at this key say. Raises DataError when that is no document of this kind."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        problem = f"{where}: {first['msg']}" if where else first["msg"]
        raise DataError(f"{store.locate(key)}: damaged, or of another version ({problem})") from None


def read_document(store: Store, key: str, kind: type[Document]) -> Document:
    """The document at this key. Raises StorageError when there is none, DataError when it is damaged."""
    return parse_document(store, key, kind, store.read(key))


def find_document(store: Store, key: str, kind: type[Document]) -> Document | None:
    """The document at this key, None while there is none. Raises DataError when it is damaged."""
    return read_document(store, key, kind) if store.exists(key) else None


def keep_document(store: Store, key: str, document: Document) -> Document:
    """Create it, or leave the one that is there: what the store then holds. DataError when that is damaged."""
    kept = store.keep(key, document.model_dump_json(indent=2).encode())
    return parse_document(store, key, type(document), kept)
