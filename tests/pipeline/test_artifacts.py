"""Proves that each form gives the model's own logits, for any number of images, and that no form is ever unpickled."""

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from lenet.model import LeNet
from lenet.recipe import RECIPES
from pipeline.artifacts import BATCH, FORMS, ONNX, PT2, SAFETENSORS, encode_onnx, encode_pt2, open_form, predictor
from pipeline.checkpoint import encode_model
from pipeline.errors import DataError

Forms = Callable[[LeNet], dict[str, bytes]]


@pytest.fixture(scope="module")
def model() -> LeNet:
    return RECIPES["seed"].build_model(10, 0).eval()


@pytest.fixture(scope="module")
def encoded(model: LeNet, forms: Forms) -> dict[str, bytes]:
    return {SAFETENSORS: encode_model(model), **forms(model)}


def random_images(count: int, side: int = 28) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(count).integers(0, 256, (count, side, side), dtype=np.uint8)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("count", [1, 2, BATCH, BATCH + 7])
def test_every_form_gives_the_models_logits(encoded: dict[str, bytes], model: LeNet, name: str, count: int) -> None:
    images = random_images(count)
    images.flags.writeable = False
    with torch.inference_mode():
        expected = model(torch.from_numpy(images.copy()).unsqueeze(1).float() / 255).numpy()
    found = open_form(name, encoded[name])(images)
    assert (found.dtype, found.shape) == (np.float32, (count, 10))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_forms_of_a_modern_model_with_32_pixels_and_12_classes_agree() -> None:
    model = LeNet(12, activation="relu", pooling="max").eval()
    images = random_images(9, 32)
    expected = predictor(model)(images)
    for name, data in ((ONNX, encode_onnx(model, 32)), (PT2, encode_pt2(model, 32))):
        np.testing.assert_allclose(open_form(name, data)(images), expected, atol=1e-5)


def test_the_same_model_gives_the_same_bytes(model: LeNet, encoded: dict[str, bytes]) -> None:
    assert encode_onnx(model, 28) == encoded[ONNX]
    assert encode_pt2(model, 28) == encoded[PT2]


def test_onnx_passes_its_checker_and_says_what_it_takes(encoded: dict[str, bytes]) -> None:
    found = onnx.load_model_from_string(encoded[ONNX])
    onnx.checker.check_model(found, full_check=True)
    [taken], [given] = found.graph.input, found.graph.output
    assert (taken.name, given.name) == ("images", "logits")
    sizes = [size.dim_value or size.dim_param for size in taken.type.tensor_type.shape.dim]
    assert sizes == ["batch", 1, 28, 28]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_half_a_form_is_refused_in_one_line(encoded: dict[str, bytes], name: str, part: float) -> None:
    data = encoded[name][: int(part * len(encoded[name]))]
    with pytest.raises(DataError) as raised:
        open_form(name, data)
    assert "\n" not in str(raised.value)


def altered(
    archive: bytes,
    change: Callable[[str, bytes], bytes] = lambda _, content: content,
    more: tuple[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """The archive with its entries changed, and one more before them."""
    data = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as whole, zipfile.ZipFile(data, "w", compression) as copy:
        if more:
            copy.writestr(*more)
        for name in whole.namelist():
            copy.writestr(name, change(name, whole.read(name)))
    return data.getvalue()


@dataclass(frozen=True)
class Leaves:
    """What leaves a file behind when it is unpickled."""

    file: str

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.file, "w")


def opened(data: bytes, left: Path) -> str:
    """Why the form is not opened; nothing that was in it has been run."""
    with pytest.raises(DataError) as raised:
        open_form(PT2, data)
    assert not left.exists()
    return str(raised.value)


def test_an_archive_that_torch_would_unpickle_is_refused(model: LeNet) -> None:
    program, data = torch.export.export(model, (torch.zeros(2, 1, 28, 28),)), io.BytesIO()
    torch.export.save(program, data)  # with its sample inputs, as a pickle
    with pytest.raises(DataError, match=r"sample_inputs/model\.pt in it is a pickle"):
        open_form(PT2, data.getvalue())


def test_weights_that_say_they_are_a_pickle_are_refused(encoded: dict[str, bytes]) -> None:
    torn = altered(encoded[PT2], lambda _, content: content.replace(b'"use_pickle": false', b'"use_pickle": true', 1))
    with pytest.raises(DataError, match=r"weights_config\.json in it is a pickle"):
        open_form(PT2, torn)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "name", ["data/sample_inputs/model.PT", "data/weights/model.pt", "data/sample_inputs/model.pt"]
)
def test_a_pickle_by_any_name_is_not_unpickled(encoded: dict[str, bytes], tmp_path: Path, name: str) -> None:
    pickled, left = io.BytesIO(), tmp_path / "left"
    torch.save(Leaves(str(left)), pickled)
    data = altered(encoded[PT2], more=(f"archive/{name}", pickled.getvalue()))
    assert name in opened(data, left)


def test_no_library_in_an_archive_is_loaded(encoded: dict[str, bytes], tmp_path: Path) -> None:
    data = altered(encoded[PT2], more=("archive/data/aotinductor/x/e.wrapper.so", b"\x7fELF"))
    assert "data/aotinductor/x/e.wrapper.so' in it is not ours" in opened(data, tmp_path / "left")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_another_reader_may_read_otherwise_is_refused(
    encoded: dict[str, bytes], tmp_path: Path
) -> None:
    twice = altered(encoded[PT2], more=("archive/byteorder", b"little"))
    assert "'archive/byteorder' in it is not ours" in opened(twice, tmp_path / "left")
    packed = altered(encoded[PT2], compression=zipfile.ZIP_DEFLATED)
    assert "in it is not ours" in opened(packed, tmp_path / "left")


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        (r'(?<="expr_str": )"[^"]*"', "open('LEFT', 'w')"),
        (r'(?<="expr_str": )"[^"]*"', "Symbol('s1', positive=open('LEFT', 'w'), integer=True)"),
        (r'(?<="target": )"torch[^"]*relu[^"]*"|(?<="target": )"torch[^"]*sigmoid[^"]*"', "torch.os.system"),
        (r'(?<="name": )"images"', "images=open('LEFT', 'w')"),
        *(
            (rf'(?<="{spec}": )"(\\.|[^"\\])*"', '[1, {"type": "os.system", "context": "LEFT", "children_spec": []}]')
            for spec in ("in_spec", "out_spec")
        ),
    ],
)
def test_no_text_of_a_graph_is_evaluated(encoded: dict[str, bytes], tmp_path: Path, text: str, instead: str) -> None:
    left = tmp_path / "left"
    evil = json.dumps(instead.replace("LEFT", str(left)))

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        changed = re.sub(text, lambda _: evil, content.decode())
        assert changed.encode() != content
        return changed.encode()

    assert "which may run anything" in opened(altered(encoded[PT2], change), left)


def test_what_is_published_as_pt2_holds_no_pickle(encoded: dict[str, bytes]) -> None:
    with zipfile.ZipFile(io.BytesIO(encoded[PT2])) as archive:
        assert not [entry for entry in archive.infolist() if archive.read(entry)[:2] in (b"\x80\x02", b"PK")]
