"""The state of training as one safetensors file: weights, optimizer state and where in
which epoch it stands. Nothing is ever unpickled."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pipeline.errors import DataError

FILE_NAME = "state.safetensors"


class EpochMetrics(BaseModel):
    """What one epoch gave: losses in nats per image, accuracies 0 to 1, all over the whole split.

    `held_out` names the split that is looked at after each epoch: validation, or test where there is no other.
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


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> None:
    """Write one file to `folder`: one, because every object costs a round trip to the store."""
    state = optimizer.state_dict()
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    metadata = {
        "position": position.model_dump_json(),
        "optimizer_scalars": json.dumps(scalars),
        "optimizer_groups": json.dumps(state["param_groups"]),
    }
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    (folder / FILE_NAME).write_bytes(safetensors.torch.save(contiguous, metadata))


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Restore what `save_state` wrote, in place, and return the position. DataError for a torn file."""
    tensors, metadata = _open(folder / FILE_NAME)
    slots: dict[int, dict[str, Any]] = {}
    for index, scalars in json.loads(metadata["optimizer_scalars"]).items():
        slots[int(index)] = dict(scalars)
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": json.loads(metadata["optimizer_groups"])})
    model.load_state_dict(_weights(tensors))
    return Position.model_validate_json(metadata["position"])


def read_state(file: Path) -> tuple[dict[str, Tensor], Position]:
    """The weights, float32 by name, and the position in a state file, with no model at hand."""
    tensors, metadata = _open(file)
    return _weights(tensors), Position.model_validate_json(metadata["position"])


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(file, "pt") as content:
            return {key: content.get_tensor(key) for key in content.keys()}, content.metadata()  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"checkpoint {file} cannot be read ({error}); start the run anew with another run_id") from None
