"""The forms a model is published in, each written once and opened again from the bytes that the store holds.

    model.safetensors   the weights, and what it takes to rebuild the model; what all else is held to
    model.onnx          for onnxruntime and whatever else reads ONNX
    model.pt2           torch.export: runs where torch does, without this package

All three take `images`, float32 (batch, 1, H, W) with pixels from 0 to 1, and give `logits`, float32 (batch, classes).
"""

import contextlib
import io
import json
import logging
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from lenet.model import LeNet
from lenet.step import normalise
from pipeline.checkpoint import decode_model
from pipeline.errors import DataError, first_line
from pipeline.idx import Pixels
from pipeline.metrics import Logits, Predictor
from pipeline.storage import Store, sha256

log = logging.getLogger(__name__)

SAFETENSORS, ONNX, PT2 = "model.safetensors", "model.onnx", "model.pt2"
FORMS = (SAFETENSORS, ONNX, PT2)
BATCH = 250  # of 1000, the C library gives the memory back to the system each time: 44 us an image, not 18
ONNX_OPSET = 18
_torch_export = threading.Lock()  # torch.export keeps state of the process

# All that encode_pt2 writes. Of anything else torch may make what it likes.
_ENTRY = re.compile(
    r"archive/(data/weights/(weight_\d+|model_weights_config\.json)|data/constants/model_constants_config\.json"
    r"|models/model\.json|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder"
    r"|(\.data/)?version|\.data/serialization_id)"
)
_LAYERS = "pad|conv2d|sigmoid|tanh|relu|avg_pool2d|max_pool2d|flatten|linear"
_LEAF = '{"type": null, "context": null, "children_spec": []}'
_TUPLE = '{"type": "builtins.tuple", "context": "null", "children_spec": '
_DICT = '{"type": "builtins.dict", "context": "[]", "children_spec": []}'
# Texts in its JSON by their key; of any other key, a name.
_TEXTS = {
    "target": re.compile(rf"torch\.ops\.aten\.({_LAYERS})\.\w+"),
    "expr_str": re.compile(r"Symbol\('s[0-9]+', positive=True, integer=True\)|[0-9]+"),
    "in_spec": re.compile(re.escape(f"[1, {_TUPLE}[{_TUPLE}[{_LEAF}]}}, {_DICT}]}}]")),
    "out_spec": re.compile(re.escape(f"[1, {_LEAF}]")),
}
_NAME = re.compile(r"[\w.+-]*", re.ASCII)


class Artifact(BaseModel):
    """One stored object: its size in bytes and sha256 (hex)."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


def artifact_of(data: bytes) -> Artifact:
    """What these bytes are to be recognised by."""
    return Artifact(bytes=len(data), sha256=sha256(data))


def read_checked(store: Store, key: str, artifact: Artifact) -> bytes:
    """The object, if it is the recorded one. Raises DataError for one that is missing or altered."""
    if not store.exists(key):
        raise DataError(f"{store.locate(key)}: missing; do not use what it belongs to, run anew")
    data = store.read(key)
    if artifact_of(data) != artifact:
        where, expected = store.locate(key), artifact.sha256[:12]
        raise DataError(f"{where}: its sha256 is not the recorded {expected}…; it was altered, do not use it")
    return data


def encode_onnx(model: LeNet, side: int) -> bytes:
    """A model as ONNX for images of side x side, any number at a time; it has passed onnx.checker."""
    import onnx  # with onnxscript 1 s to import, and only an export needs it

    with _torch_export, warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")  # of torch's own exporter, about itself
        program = torch.onnx.export(
            model.eval(),
            (torch.zeros(2, 1, side, side),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=ONNX_OPSET,
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto  # type: ignore[union-attr]  # None is for the exporter before this
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString(deterministic=True))


def encode_pt2(model: LeNet, side: int) -> bytes:
    """A model as torch.export's archive for images of side x side, any number at a time."""
    data = io.BytesIO()
    with _torch_export, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(model.eval(), (torch.zeros(2, 1, side, side),), dynamic_shapes=shapes)
        program.example_inputs = None  # they would be kept as a pickle
        torch.export.save(program, data)
    return data.getvalue()


def open_form(name: str, data: bytes) -> Predictor:
    """A function from images uint8 (N, H, W) to logits float32 (N, n_classes), made of the bytes of one form.

    Raises DataError for bytes that are not such a model.
    """
    if name == SAFETENSORS:
        return predictor(decode_model(data))
    opener = {ONNX: _open_onnx, PT2: _open_pt2}[name]
    try:
        return opener(data)
    except DataError as error:
        raise DataError(f"not a {name} of this pipeline ({error})") from None
    except Exception as error:  # neither library has a root for what damaged files make it raise
        raise DataError(f"not a whole {name} ({first_line(error)})") from None


def predictor(model: torch.nn.Module) -> Predictor:
    """The model as such a function."""

    @torch.inference_mode()
    def predict(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(images)
        return logits

    return _batched(lambda images: predict(images).numpy())


def _open_onnx(data: bytes) -> Predictor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # 22 us an image; with two, which wait for each other and for torch's, 47
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def predict(images: torch.Tensor) -> Logits:
        logits: Logits = session.run(["logits"], {"images": images.numpy()})[0]
        return logits

    return _batched(predict)


def _open_pt2(data: bytes) -> Predictor:
    data = _as_we_write_it(data)
    with _torch_export, warnings.catch_warnings(), _quiet("torch.export"):
        warnings.simplefilter("ignore")
        return predictor(torch.export.load(io.BytesIO(data)).module())


def _as_we_write_it(data: bytes) -> bytes:
    """The archive, written anew from what has been looked at. Raises DataError for anything that we do not write.

    torch.export.load unpickles sample inputs, legacy weights and whatever a payload's config says, loads libraries,
    evaluates sizes as Python and finds operations by any name there is in torch, without a way to forbid it. Nor does
    its reader of archives tell small letters from capitals.
    """
    clean, seen = io.BytesIO(), set()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(clean, "w") as copy:
        for entry in archive.infolist():
            name = entry.filename
            if name in seen or not _ENTRY.fullmatch(name) or entry.compress_type != zipfile.ZIP_STORED:
                raise DataError(f"{name!r} in it is not ours, and may run anything")
            seen.add(name)
            content = archive.read(entry)
            if name.endswith(".json"):
                content = json.dumps(_harmless(name, "", json.loads(content))).encode()
            if name.endswith((".pt", "constants_config.json")) and content not in (b"", b'{"config": {}}'):
                raise DataError(f"{name} in it is a pickle, which may run anything")
            copy.writestr(name, content)
    return clean.getvalue()


def _harmless(name: str, key: str, value: Any) -> Any:
    """What an entry's JSON has under a key, without remarks on where in the code it is from. Raises DataError for a
    pickle, and for a text that torch might evaluate."""
    if isinstance(value, dict):
        return {
            _harmless(name, "", part): {} if part == "metadata" else _harmless(name, part, inner)
            for part, inner in value.items()
        }
    if isinstance(value, list):
        return [_harmless(name, key, inner) for inner in value]
    if key == "use_pickle" and value is not False:
        raise DataError(f"{name} in it is a pickle, which may run anything")
    if isinstance(value, str) and not _TEXTS.get(key, _NAME).fullmatch(value):
        raise DataError(f"{name} in it has {key or 'name'} {value[:60]!r}, which may run anything")
    return value


def _batched(predict: Callable[[torch.Tensor], Logits]) -> Predictor:
    def whole(images: Pixels) -> Logits:
        # A copy, because torch warns of arrays that are not writable, as those from Parquet are.
        batches = [images[start : start + BATCH].copy() for start in range(0, len(images), BATCH)]
        return np.concatenate([predict(normalise(torch.from_numpy(batch))) for batch in batches])

    return whole


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """These loggers say only what is an error, while the block runs."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
