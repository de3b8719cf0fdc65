"""The state of training as one safetensors file: weights, their average, optimizer state and where in which epoch it
stands; and a model as another. Each holds its own digest. Nothing is ever unpickled."""

import hashlib
import json

import safetensors.torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from lenet.model import LeNet
from lenet.optimize import Optimization
from pipeline.errors import DataError, first_line

FILE_NAME = "state.safetensors"
METADATA_KEY = "lenet-pipeline"


class EpochMetrics(BaseModel):
    """What one epoch gave: losses in nats per image, accuracies 0 to 1, all over the whole split.

    `held_out` names the split that is looked at after each epoch: validation, or test where there is no other.
    `world_size` is that of the epoch's end; 0 in runs from before it was kept.
    """

    model_config = ConfigDict(frozen=True)

    epoch: int
    held_out: str = "test"
    train_loss: float
    train_accuracy: float
    held_out_loss: float
    held_out_accuracy: float
    seconds: float
    images_per_second: float
    world_size: int = 0

    def __str__(self) -> str:
        return (
            f"train loss {self.train_loss:.4f}, train accuracy {self.train_accuracy:.4f}, "
            f"{self.held_out} accuracy {self.held_out_accuracy:.4f}, {self.images_per_second:,.0f} images/s"
        )


History = list[EpochMetrics]


class Position(BaseModel):
    """Where training stands: `step` global batches of `epoch` are done (epochs counted from 1), with these counts
    (loss sum, correct, images) over all ranks, in so many seconds; before it lies the history."""

    epoch: int = 1
    step: int = 0
    counts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    seconds: float = 0.0
    history: History = []


def encode_state(model: LeNet, optimization: Optimization, position: Position) -> bytes:
    """All of a training, as the content of one file: one, because every object costs a round trip to the store."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if optimization.average is not None:
        with optimization.averaged():
            tensors |= {f"average.{name}": value.clone() for name, value in model.state_dict().items()}
    for number, optimizer in enumerate(optimization.optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in slots.items()}
    metadata = {"position": position.model_dump_json()}
    return _seal({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata)


def load_state(data: bytes, model: LeNet, optimization: Optimization) -> Position:
    """Restore what `encode_state` gave, in place, and return the position. DataError for a torn or altered one.

    The optimizers' settings are the recipe's, not the file's: they follow from the run's parameters and the position.
    """
    tensors, metadata = _unseal(data)
    position = _position(metadata)
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in _under("optimizer", tensors).items():
        slot, _, name = key.rpartition(".")
        slots.setdefault(slot, {})[name] = value
    for number, optimizer in enumerate(optimization.optimizers):
        mine = {int(key.partition(".")[2]): slot for key, slot in slots.items() if key.startswith(f"{number}.")}
        optimizer.load_state_dict({"state": mine, "param_groups": optimizer.state_dict()["param_groups"]})
    if optimization.average is not None:
        model.load_state_dict(_under("average", tensors))
        optimization.average.copy_(optimization.flat.detach())
    model.load_state_dict(_under("model", tensors))
    return position


def read_state(data: bytes) -> tuple[dict[str, Tensor], Position]:
    """The weights to publish, float32 by name, and the position, with no model at hand. DataError as `load_state`."""
    tensors, metadata = _unseal(data)
    return _under("average", tensors) or _under("model", tensors), _position(metadata)


def _position(metadata: dict[str, str]) -> Position:
    try:
        return Position.model_validate_json(metadata["position"])
    except (KeyError, ValueError) as error:
        raise DataError(f"says not where training stood ({first_line(error)})") from None


def encode_model(model: LeNet) -> bytes:
    """A model as a safetensors file that says itself how to rebuild it. ValueError for one that standardises."""
    if hasattr(model, "standardise"):
        raise ValueError("fold_standardise the model first: what it is published as takes pixels as they are")
    metadata = {"n_classes": str(model.n_classes), "activation": model.activation, "pooling": model.pooling}
    return _seal({name: value.contiguous() for name, value in model.state_dict().items()}, metadata)


def decode_model(data: bytes) -> LeNet:
    """The model that `encode_model` wrote, for evaluation. DataError for another file."""
    weights, metadata = _unseal(data)
    try:
        model = LeNet(int(metadata["n_classes"]), activation=metadata["activation"], pooling=metadata["pooling"])  # type: ignore[arg-type]
        model.load_state_dict(weights)
    except (ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"not a LeNet of this pipeline ({first_line(error)})") from None
    return model.eval()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def _seal(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file that holds its own digest; the same bytes for the same content."""
    sealed = metadata | {"sha256": _digest(tensors, metadata)}
    # Under one key, because the library writes several in any order.
    return safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(sealed, sort_keys=True)})


def _unseal(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `_seal` closed: tensors and metadata. DataError for anything else."""
    try:
        tensors = safetensors.torch.load(data)
        # The header is JSON of as many bytes as the first eight say; the library shows metadata of files alone.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata: dict[str, str] = json.loads(header["__metadata__"][METADATA_KEY])
        whole = metadata.pop("sha256") == _digest(tensors, metadata)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"not a whole file of this pipeline ({first_line(error)})") from None
    if not whole:
        raise DataError("not what was written, its sha256 differs")
    return tensors, metadata


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
