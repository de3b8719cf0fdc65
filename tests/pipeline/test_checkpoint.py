"""Proves that training goes on from a checkpoint bit by bit as it would have, and that a torn one is refused."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from lenet.model import LeNet
from lenet.step import PlainGradient, flatten
from pipeline.checkpoint import FILE_NAME, EpochMetrics, Position, load_state, read_state, save_state
from pipeline.errors import DataError

if TYPE_CHECKING:
    from tests.conftest import Splits

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.9),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.003, betas=(0.8, 0.99)),
}
HISTORY = [
    EpochMetrics(
        epoch=epoch,
        train_loss=1 / 3 / epoch,
        train_accuracy=0.1 + 0.2,
        held_out_loss=2.3,
        held_out_accuracy=0.9,
        seconds=1e-3,
        images_per_second=12345.678,
    )
    for epoch in (1, 2)
]
POSITION = Position(epoch=3, step=117, counts=(1 / 3, 20_000.0, 29_952.0), seconds=2.5, history=HISTORY)


def make(optimizer: MakeOptimizer, seed: int) -> tuple[LeNet, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LeNet()
    # As the workers hold it: the file is contiguous, the memory is not.
    model = model.to(memory_format=torch.channels_last)
    return model, optimizer([flatten(model)])


def train(model: LeNet, optimizer: torch.optim.Optimizer, splits: "Splits", steps: range) -> None:
    images, labels = (torch.from_numpy(array) for array in splits["train"])
    [flat] = optimizer.param_groups[0]["params"]
    gradient = PlainGradient(model, flat)
    for step in steps:
        rows = slice(step * 20, step * 20 + 20)
        gradient(images[rows], labels[rows], global_batch=20)
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_restored_training_goes_on_bit_by_bit(
    tmp_path: Path, small_splits: "Splits", optimizer: MakeOptimizer
) -> None:
    model, state = make(optimizer, seed=0)
    train(model, state, small_splits, range(5))
    save_state(tmp_path, model, state, POSITION)
    train(model, state, small_splits, range(5, 10))

    restored, restored_state = make(optimizer, seed=1)
    assert load_state(tmp_path, restored, restored_state) == POSITION
    train(restored, restored_state, small_splits, range(5, 10))

    for name, weight in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], weight), name


def test_saving_does_not_disturb_the_training(tmp_path: Path, small_splits: "Splits") -> None:
    results = []
    for save in (False, True):
        model, state = make(OPTIMIZERS["momentum"], seed=0)
        train(model, state, small_splits, range(3))
        if save:
            save_state(tmp_path, model, state, POSITION)
        train(model, state, small_splits, range(3, 6))
        results.append(model.fc3.weight)
    assert torch.equal(*results)


def test_a_restored_optimizer_keeps_the_settings_of_the_saved_one(tmp_path: Path) -> None:
    model, _ = make(OPTIMIZERS["sgd"], seed=0)
    save_state(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5), Position())
    other = torch.optim.SGD(model.parameters(), lr=1)
    load_state(tmp_path, model, other)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["momentum"]) == (0.25, 0.5)


def test_weights_and_position_can_be_read_without_a_model(tmp_path: Path, small_splits: "Splits") -> None:
    model, state = make(OPTIMIZERS["adamw"], seed=0)
    train(model, state, small_splits, range(2))
    save_state(tmp_path, model, state, POSITION)
    weights, position = read_state(tmp_path / FILE_NAME)
    assert position == POSITION
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_checkpoint_is_one_file(tmp_path: Path) -> None:
    save_state(tmp_path, *make(OPTIMIZERS["adamw"], seed=0), POSITION)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("kept", [0, 4, 100, 10_000, -1])
def test_a_torn_file_is_refused(tmp_path: Path, kept: int) -> None:
    model, state = make(OPTIMIZERS["sgd"], seed=0)
    save_state(tmp_path, model, state, POSITION)
    file = tmp_path / FILE_NAME
    file.write_bytes(file.read_bytes()[:kept])
    for call in (lambda: load_state(tmp_path, model, state), lambda: read_state(file)):
        with pytest.raises(
            DataError, match=r"cannot be read \(.*\); start the run anew with another run_id$"
        ) as raised:
            call()
        assert str(raised.value).startswith(f"checkpoint {file} ")
        assert "\n" not in str(raised.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"state.safetensors cannot be read \("):
        read_state(tmp_path / FILE_NAME)
