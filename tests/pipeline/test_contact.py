"""Proves that a contact sheet shows real images of every class and the true counts, and escapes every name."""

import io
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pipeline.contact import GAP, LABEL_WIDTH, contact_sheet, render_html, render_png
from pipeline.shards import Manifest
from pipeline.storage import Store

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def manifest(local_store: Store, small_manifest: Callable[[Store], Manifest]) -> Manifest:
    return small_manifest(local_store)


def test_it_has_the_first_images_of_each_class(local_store: Store, manifest: Manifest, small_splits: Splits) -> None:
    images, labels = small_splits["train"]
    sheet = contact_sheet(local_store, manifest, 4)
    assert [samples.name for samples in sheet] == list(manifest.classes)
    for label, samples in enumerate(sheet):
        assert np.array_equal(samples.images, images[labels == label][:4])
        assert samples.counts == {split: int((small_splits[split][1] == label).sum()) for split in ("test", "train")}


def test_a_class_with_fewer_images_shows_all_it_has(
    local_store: Store, manifest: Manifest, small_splits: Splits
) -> None:
    sheet = contact_sheet(local_store, manifest, 100)
    assert [len(samples.images) for samples in sheet] == np.bincount(small_splits["train"][1]).tolist()


def test_no_more_shards_are_read_than_it_takes(local_store: Store, manifest: Manifest) -> None:
    local_store.delete(f"{manifest.folder}/{manifest.splits['train'][3].name}")
    assert len(contact_sheet(local_store, manifest, 4)) == 10


def test_the_picture_holds_the_pixels(local_store: Store, manifest: Manifest) -> None:
    sheet = contact_sheet(local_store, manifest, 3)
    fewer = [replace(sheet[0], images=sheet[0].images[:1]), *sheet[1:]]
    picture = np.asarray(Image.open(io.BytesIO(render_png(manifest, fewer))))
    assert picture.shape == (10 * (28 + GAP) + GAP, LABEL_WIDTH + 3 * (28 + GAP) + GAP)
    for row, samples in enumerate(fewer):
        for column in range(3):
            top, left = row * (28 + GAP) + GAP, LABEL_WIDTH + column * (28 + GAP) + GAP
            cell = picture[top : top + 28, left : left + 28]
            assert np.array_equal(cell, samples.images[column]) if column < len(samples.images) else (cell == 255).all()
    assert (picture[:, :LABEL_WIDTH] < 128).any(), "the names"


def test_the_page_names_counts_and_shows_every_class(local_store: Store, manifest: Manifest) -> None:
    page = render_html(manifest, contact_sheet(local_store, manifest, 3)).decode()
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    Tags().feed(page)
    pictures = [attributes for tag, attributes in tags if tag == "img"]
    assert len(pictures) == 30
    assert all(str(picture["src"]).startswith("data:image/png;base64,") and picture["alt"] for picture in pictures)
    assert not [tag for tag, _ in tags if tag in ("script", "link")]
    assert "Ankle boot" in page


def test_a_hostile_class_name_is_text(local_store: Store, manifest: Manifest) -> None:
    hostile = manifest.model_copy(update={"classes": ("<script>alert(1)</script>", *manifest.classes[1:])})
    page = render_html(hostile, contact_sheet(local_store, hostile, 1)).decode()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
