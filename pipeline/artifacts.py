"""The forms a model is published in, each written once and opened again from the bytes that the store holds.

    model.safetensors   the weights, and what it takes to rebuild the model; what all else is held to
    model.onnx          for onnxruntime and whatever else reads ONNX
    model.pt2           torch.export: runs where torch does, without this package

All three take `images`, float32 (batch, 1, H, W) with pixels from 0 to 1, and give `logits`, float32 (batch, classes).
"""

import io
import json
import logging
import threading
import warnings
import zipfile
from collections.abc import Callable

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

    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript"), _torch_export:
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
    with warnings.catch_warnings(), _torch_export:
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
    data = _without_pickles(data)
    with warnings.catch_warnings(), _quiet("torch.export"), _torch_export:
        warnings.simplefilter("ignore")
        return predictor(torch.export.load(io.BytesIO(data)).module())


def _without_pickles(data: bytes) -> bytes:
    """The archive, written anew from what has been looked at. Raises DataError if torch would unpickle any of it.

    torch.export.load unpickles sample inputs, legacy weights and whatever a payload's config says, without a way to
    forbid it.
    """
    clean = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(clean, "w") as copy:
        for entry in archive.infolist():
            content = archive.read(entry)
            payloads = json.loads(content)["config"] if entry.filename.endswith("_config.json") else {}
            constants = payloads and "constants" in entry.filename
            if (
                constants
                or any(p["use_pickle"] for p in payloads.values())
                or (content and entry.filename.endswith(".pt"))
            ):
                raise DataError(f"{entry.filename} in it is a pickle, which may run anything")
            copy.writestr(entry.filename, content)
    return clean.getvalue()


def _batched(predict: Callable[[torch.Tensor], Logits]) -> Predictor:
    def whole(images: Pixels) -> Logits:
        # A copy, because torch warns of arrays that are not writable, as those from Parquet are.
        batches = [images[start : start + BATCH].copy() for start in range(0, len(images), BATCH)]
        return np.concatenate([predict(normalise(torch.from_numpy(batch))) for batch in batches])

    return whole


class _quiet:  # noqa: N801 - reads as a function
    """These loggers say only what is an error, while the block runs."""

    def __init__(self, *names: str) -> None:
        self.loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
