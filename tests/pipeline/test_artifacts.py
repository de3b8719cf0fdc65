"""Proves that each form gives the model's own logits, for any number of images, and that no form is ever unpickled."""

import io
import zipfile
from collections.abc import Callable

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


def test_an_archive_that_torch_would_unpickle_is_refused(model: LeNet) -> None:
    program, data = torch.export.export(model, (torch.zeros(2, 1, 28, 28),)), io.BytesIO()
    torch.export.save(program, data)  # with its sample inputs, as a pickle
    with pytest.raises(DataError, match=r"sample_inputs/model\.pt in it is a pickle"):
        open_form(PT2, data.getvalue())


def test_weights_that_say_they_are_a_pickle_are_refused(encoded: dict[str, bytes]) -> None:
    altered = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(encoded[PT2])) as archive, zipfile.ZipFile(altered, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
            copy.writestr(name, content)
    with pytest.raises(DataError, match=r"weights_config\.json in it is a pickle"):
        open_form(PT2, altered.getvalue())


def test_what_is_published_as_pt2_holds_no_pickle(encoded: dict[str, bytes]) -> None:
    with zipfile.ZipFile(io.BytesIO(encoded[PT2])) as archive:
        assert not [entry for entry in archive.infolist() if archive.read(entry)[:2] in (b"\x80\x02", b"PK")]
