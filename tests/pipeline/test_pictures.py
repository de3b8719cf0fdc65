"""Proves that folders of pictures become the images that are in them, and that what cannot be read is told of."""

import io
import logging
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from pipeline.download import cache_folder
from pipeline.errors import DataError
from pipeline.idx import Pixels
from pipeline.pictures import decode_picture
from pipeline.source import Source

if TYPE_CHECKING:
    from tests.conftest import Splits

Bring = Callable[..., Source]
Refused = Callable[..., str]
Contents = Callable[[Source, str], list[tuple[str, bytes]]]
NAMES = tuple("abcdefghij")


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def save(folder: Path, images: Pixels, labels: Pixels, kind: str = "png") -> None:
    """Each image as <class>/<row>.<kind>."""
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = folder / NAMES[label] / f"{row:05}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(Image.fromarray(image), {"png": "PNG"}.get(kind, "JPEG")))


def expected(images: Pixels, labels: Pixels) -> list[tuple[str, bytes]]:
    return sorted((NAMES[label], image.tobytes()) for image, label in zip(images, labels, strict=True))


@pytest.fixture
def pictures(small_splits: "Splits", tmp_path: Path) -> Path:
    """Folder with train/ and test/ of 120 and 60 real images as PNG."""
    for split, count in (("train", 120), ("test", 60)):
        images, labels = small_splits[split]
        save(tmp_path / "pictures" / split, images[:count], labels[:count])
    return tmp_path / "pictures"


def some_file(folder: Path) -> Path:
    return sorted(folder.rglob("*.png"))[7]


def test_png_comes_back_pixel_by_pixel(
    small_splits: "Splits", pictures: Path, bring: Bring, contents: Contents
) -> None:
    source = bring(pictures)
    assert source.facts.classes == NAMES
    assert source.facts.image_shape == (28, 28)
    for split, count in (("train", 120), ("test", 60)):
        images, labels = small_splits[split]
        assert contents(source, split) == expected(images[:count], labels[:count])
    assert source.facts.conversion["skipped"] == 0
    assert "test_fraction" not in source.facts.conversion
    assert source.folder.parent == cache_folder()
    assert source.folder.name.startswith("mine-")


def test_train_is_mixed_and_test_in_the_order_of_paths(pictures: Path, bring: Bring) -> None:
    source = bring(pictures)
    assert (np.diff(source.labels("train").astype(int)) < 0).sum() > 30
    assert (np.diff(source.labels("test").astype(int)) >= 0).all()


def test_jpeg_comes_back_nearly_so(small_splits: "Splits", tmp_path: Path, bring: Bring) -> None:
    images, labels = small_splits["train"]
    save(tmp_path / "jpeg" / "train", images[:100], labels[:100], "JPG")
    save(tmp_path / "jpeg" / "test", images[:100], labels[:100], "jpeg")
    source = bring(tmp_path / "jpeg")
    found = source.read("test", np.arange(100)).astype(int)
    order = np.argsort(labels[:100], kind="stable")  # paths are sorted by class, then row
    assert np.array_equal(source.labels("test"), labels[:100][order])
    assert np.abs(found - images[:100][order]).mean() < 4


def test_a_source_without_a_test_split_gives_a_part_of_each_class(
    small_splits: "Splits", tmp_path: Path, bring: Bring, contents: Contents
) -> None:
    images, labels = small_splits["train"]
    save(tmp_path / "all", images, labels)
    source = bring(tmp_path / "all", test_fraction=0.25)
    counts = np.bincount(labels)
    assert np.bincount(source.labels("test")).tolist() == [round(count * 0.25) for count in counts]
    assert sorted(contents(source, "train") + contents(source, "test")) == expected(images, labels)
    assert source.facts.conversion["test_fraction"] == 0.25
    assert contents(bring(tmp_path / "all", test_fraction=0.25), "test") == contents(source, "test")
    assert bring(tmp_path / "all", test_fraction=0.3).folder != source.folder


def test_the_result_does_not_depend_on_where_the_folder_is(pictures: Path, tmp_path: Path, bring: Bring) -> None:
    first = bring(pictures)
    moved = pictures.rename(tmp_path / "elsewhere")
    assert bring(moved) == first


def test_a_picture_of_another_size_is_resized_with_antialias(tmp_path: Path) -> None:
    stripes = np.zeros((56 * 4, 28 * 4), np.uint8)
    stripes[:, ::2] = 200
    data = encoded(Image.fromarray(stripes))
    assert decode_picture(data, 28).shape == (28, 28)
    assert np.abs(decode_picture(data, 28)[4:-4, 4:-4].astype(int) - 100).max() <= 1  # not 0 nor 200
    assert decode_picture(data, 32).shape == (32, 32)


@pytest.mark.parametrize(
    ("image", "grey"),
    [
        (Image.new("RGB", (28, 28), (255, 0, 0)), 76),
        (Image.new("L", (28, 28), 77), 77),
        (Image.new("1", (28, 28), 1), 255),
        (Image.new("RGBA", (28, 28), (0, 0, 0, 0)), 255),
        (Image.new("RGBA", (28, 28), (10, 10, 10, 255)), 10),
        (Image.new("LA", (28, 28), (10, 0)), 255),
        (Image.new("P", (28, 28), 0), 0),
        (Image.fromarray(np.full((28, 28), 65535, np.uint16)), 255),
        (Image.fromarray(np.full((28, 28), 257 * 100, np.uint16)), 100),
    ],
    ids=["rgb", "grey", "1-bit", "transparent", "opaque", "grey-transparent", "palette", "16-bit", "16-bit-mid"],
)
def test_every_kind_of_png_becomes_grey(image: Image.Image, grey: int) -> None:
    assert np.unique(decode_picture(encoded(image), 28)).tolist() == [grey]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_value_of_a_grey_png_may_be_transparent(bits: int) -> None:
    """The left half has the value 1 in so many bits, the right half 0. Pillow does not write such files."""
    row = np.unpackbits(np.array([0, 1], ">u2").view(np.uint8).reshape(2, 2), axis=1)[:, -bits:]
    line = b"\0" + np.packbits(np.repeat(row[::-1], 14, axis=0)).tobytes()

    def png(clear: int) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 28, bits, 0, 0, 0, 0))
        parts = header, chunk(b"tRNS", struct.pack(">H", clear)), chunk(b"IDAT", zlib.compress(line * 28))
        return b"".join((b"\x89PNG\r\n\x1a\n", *parts, chunk(b"IEND", b"")))

    one = round(255 / (2**bits - 1))
    for clear, left, right in ((1, 255, 0), (0, one, 255)):
        found = decode_picture(png(clear), 28)
        assert (np.unique(found[:, :14]).tolist(), np.unique(found[:, 14:]).tolist()) == ([left], [right])


def test_cmyk_and_grey_jpeg_become_grey() -> None:
    for mode in ("CMYK", "L", "RGB"):
        assert decode_picture(encoded(Image.new(mode, (40, 40)), "JPEG"), 28).shape == (28, 28)


def test_a_photograph_is_turned_as_its_exif_says(small_splits: "Splits") -> None:
    image = Image.fromarray(small_splits["train"][0][0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = decode_picture(encoded(image, exif=exif), 28)
    assert np.array_equal(turned, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "neither PNG nor JPEG"),
        (b"GIF89a" + bytes(100), "neither PNG nor JPEG"),
        (encoded(Image.new("L", (28, 28)), "GIF"), "neither PNG nor JPEG"),
        (encoded(Image.new("L", (280, 280)))[:100], "unrecognized data|truncated|broken"),
        (encoded(Image.new("L", (280, 280)), "JPEG")[:300], "."),
        (encoded(Image.new("1", (9000, 9000))), "9000x9000 pixels, more than 64000000"),
        (encoded(Image.new("1", (20000, 20000))), "decompression bomb"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_picture_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode_picture(data, 28)


def test_bad_pictures_are_refused_together(pictures: Path, refused: Refused) -> None:
    bad = sorted(pictures.rglob("*.png"))[3:6]
    for file in bad:
        file.write_bytes(b"garbage")
    message = refused(pictures)
    first = bad[0].relative_to(pictures).as_posix()
    assert f"3 of 180 pictures cannot be read, the first is {first} (neither PNG nor JPEG); mend" in message
    assert message.endswith("or set bad_images to skip")


def test_bad_pictures_are_skipped_if_wanted(
    small_splits: "Splits", pictures: Path, bring: Bring, contents: Contents, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {split: some_file(pictures / split) for split in ("train", "test")}
    for file in bad.values():
        file.write_bytes(file.read_bytes()[:60])
    with caplog.at_level(logging.INFO):
        source = bring(pictures, bad_images="skip")
    assert source.facts.conversion["skipped"] == 2
    for split, count in (("train", 120), ("test", 60)):
        assert f"skipped {bad[split].relative_to(pictures).as_posix()} (" in caplog.text
        images, labels = (array[:count] for array in small_splits[split])
        keep = np.arange(count) != int(bad[split].stem)
        assert contents(source, split) == expected(images[keep], labels[keep])


def test_a_class_whose_pictures_are_all_bad_is_refused(pictures: Path, refused: Refused) -> None:
    for file in (pictures / "train" / "c").iterdir():
        file.write_bytes(b"garbage")
    assert "class 'c' has no image to train on" in refused(pictures, bad_images="skip")


def test_a_class_without_pictures_is_refused(pictures: Path, refused: Refused) -> None:
    (pictures / "train" / "empty").mkdir()
    (pictures / "train" / "empty" / "notes.txt").write_text("none")
    assert "pictures/train/empty: holds no .png, .jpg, .jpeg; add pictures or remove the folder" in refused(pictures)


def test_a_class_in_test_alone_is_refused(pictures: Path, refused: Refused) -> None:
    (pictures / "test" / "a").rename(pictures / "test" / "z")
    assert "pictures/test: class 'z' is not in train; add it there" in refused(pictures)


def test_a_test_split_alone_is_refused(pictures: Path, refused: Refused) -> None:
    (pictures / "train").rename(pictures / ".train")
    assert "pictures: has test/ but no train/" in refused(pictures)


def test_one_class_is_refused(small_splits: "Splits", tmp_path: Path, refused: Refused) -> None:
    save(tmp_path / "one", small_splits["train"][0][:3], np.zeros(3, np.uint8))
    assert "classes found: 1; between 2 and 256 can be told apart" in refused(tmp_path / "one")


def test_more_classes_than_a_byte_can_tell_are_refused(tmp_path: Path, refused: Refused) -> None:
    for number in range(257):
        (tmp_path / "many" / str(number)).mkdir(parents=True)
        (tmp_path / "many" / str(number) / "x.png").write_bytes(b"")
    assert "classes found: 257; between 2 and 256" in refused(tmp_path / "many")


def test_a_picture_outside_the_classes_is_refused(pictures: Path, refused: Refused) -> None:
    some_file(pictures / "train").rename(pictures / "train" / "loose.png")
    assert "pictures/train/loose.png: a picture outside the folders of classes" in refused(pictures)


def test_hidden_and_other_files_are_passed_over(pictures: Path, bring: Bring) -> None:
    first = bring(pictures)
    (pictures / "train" / "a" / "._00000.png").write_bytes(b"garbage")
    (pictures / "train" / ".checkpoints").mkdir()
    (pictures / "train" / ".checkpoints" / "x.png").write_bytes(b"garbage")
    (pictures / "train" / "a" / "Thumbs.db").write_bytes(b"garbage")
    (pictures / ".DS_Store").write_bytes(b"garbage")
    assert bring(pictures) == first


def test_what_is_passed_over_is_told(pictures: Path, bring: Bring, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        bring(pictures)
        assert "passed over" not in caplog.text
        for name in ("val/a/1.png", "val/b/2.png", "extra/3.png", "train/a/4.webp", "README"):
            (pictures / name).parent.mkdir(parents=True, exist_ok=True)
            (pictures / name).write_bytes(b"")
        bring(pictures)
    assert "mine: passed over: val/*.png (2), README (1), extra/*.png (1), train/*.webp (1)" in caplog.messages


def test_a_bad_picture_is_named_whatever_the_order_of_the_splits_folders(pictures: Path, refused: Refused) -> None:
    (pictures / "train").rename(pictures / "Train")
    bad = next((pictures / "Train" / "a").glob("*.png"))
    bad.write_bytes(b"no picture")
    assert f"the first is Train/a/{bad.name} " in refused(pictures)


def test_splits_are_told_by_folders_in_capitals_too(pictures: Path, bring: Bring, contents: Contents) -> None:
    first = bring(pictures)
    for split in ("train", "test"):
        (pictures / split).rename(pictures / split.title())
    second = bring(pictures)
    assert second.facts.classes == NAMES
    assert all(contents(second, split) == contents(first, split) for split in ("train", "test"))


def test_a_class_may_be_called_train_in_capitals(pictures: Path, bring: Bring) -> None:
    (pictures / "train" / "b").rename(pictures / "train" / "Train")
    (pictures / "train" / "c").rename(pictures / "train" / "Test")
    source = bring(pictures / "train")
    assert source.facts.classes == ("Test", "Train", "a", *NAMES[3:])


def test_pictures_in_folders_below_a_class_count(pictures: Path, bring: Bring, contents: Contents) -> None:
    first = bring(pictures)
    below = pictures / "train" / "a" / "deep" / "er"
    below.mkdir(parents=True)
    for file in (pictures / "train" / "a").glob("*.png"):
        file.rename(below / file.name)
    assert contents(bring(pictures), "train") == contents(first, "train")


@pytest.mark.parametrize("kind", ["file", "folder", "class", "broken"])
def test_links_out_of_the_source_are_refused(pictures: Path, tmp_path: Path, refused: Refused, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.png").write_bytes(some_file(pictures).read_bytes())
    match kind:
        case "file":
            (pictures / "train" / "a" / "link.png").symlink_to(outside / "x.png")
        case "folder":
            (pictures / "train" / "a" / "link").symlink_to(outside)
        case "class":
            (pictures / "train" / "link").symlink_to(outside)
        case "broken":
            (pictures / "train" / "a" / "link.png").symlink_to(tmp_path / "nowhere")
    assert "/link" in (message := refused(pictures))
    assert ": a link " in message


def test_links_within_the_source_count_as_files(pictures: Path, bring: Bring) -> None:
    file = some_file(pictures / "train")
    (file.parent / "zz.png").symlink_to(file)
    assert bring(pictures).rows("train") == 121


def test_a_pipe_is_not_waited_for(pictures: Path, bring: Bring) -> None:
    os.mkfifo(pictures / "train" / "a" / "pipe.png")
    assert bring(pictures).rows("train") == 120


HOSTILE = ["-rf", "a b", "名前", "é", "é", "$(touch x)", "a..png", "[red]", "<b>", "\\", "%s{}", "'\""]


def test_hostile_names_are_harmless(small_splits: "Splits", tmp_path: Path, bring: Bring, contents: Contents) -> None:
    images = small_splits["train"][0][: 2 * len(HOSTILE)]
    classes = ["-class", "名 前"]
    for split in ("train", "test"):
        for row, name in enumerate(HOSTILE * 2):
            file = tmp_path / "- the source" / split / classes[row % 2] / f"{name}{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(Image.fromarray(images[row])))
    source = bring(tmp_path / "- the source")
    assert source.facts.classes == tuple(classes)
    assert Counter(pixels for _, pixels in contents(source, "train")) == Counter(image.tobytes() for image in images)
    assert {path.name for path in tmp_path.iterdir()} == {"- the source", "cache"}


@pytest.mark.parametrize("name", [b"line\nbreak.png", b"\xff\xfe.png", b"\x1b[31m.png"])
def test_names_that_cannot_be_shown_are_escaped(pictures: Path, refused: Refused, name: bytes) -> None:
    file = Path(os.fsdecode(os.fsencode(pictures / "train" / "a") + b"/" + name))
    file.write_bytes(b"garbage")
    message = refused(pictures)
    assert "the first is train/a/" in message
    assert message.isprintable()
    message.encode()


@pytest.mark.parametrize("name", [b"line\nbreak", b"\xff\xfe", b"\x1b[31m", b" ", b"x" * 101])
def test_a_class_whose_name_cannot_be_shown_is_refused(pictures: Path, refused: Refused, name: bytes) -> None:
    (pictures / "train" / "a").rename(Path(os.fsdecode(os.fsencode(pictures / "train") + b"/" + name)))
    message = refused(pictures)
    assert "cannot be a class's name; use up to 100 printable characters" in message
    assert message.isprintable()
