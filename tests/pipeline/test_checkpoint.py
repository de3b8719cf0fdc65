"""Proves that training goes on from a checkpoint bit by bit as it would have, and that a torn one is refused."""

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import torch

from lenet.model import LeNet, fold_standardise
from lenet.optimize import Optimization
from lenet.recipe import RECIPES, Recipe
from lenet.step import PlainGradient, flatten, normalise
from pipeline.checkpoint import (
    EpochMetrics,
    Position,
    decode_model,
    encode_model,
    encode_state,
    load_state,
    read_state,
)
from pipeline.errors import DataError

if TYPE_CHECKING:
    from tests.conftest import Splits

SEED = RECIPES["seed"]
KINDS = {
    "sgd": SEED,
    "momentum": replace(SEED, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "muon, one-cycle, averaged": RECIPES["modern"],
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
        world_size=2,
    )
    for epoch in (1, 2)
]
POSITION = Position(epoch=3, step=117, counts=(1 / 3, 20_000.0, 29_952.0), seconds=2.5, history=HISTORY)


def make(recipe: Recipe, seed: int = 0) -> tuple[LeNet, Optimization]:
    # As the workers hold it: the file is contiguous, the memory is not.
    model = recipe.build_model(10, seed).to(memory_format=torch.channels_last)
    return model, Optimization(recipe, model, flatten(model), steps=10)


def train(model: LeNet, optimization: Optimization, splits: "Splits", steps: range) -> None:
    images, labels = (torch.from_numpy(array) for array in splits["train"])
    gradient = PlainGradient(model, optimization.flat)
    for step in steps:
        rows = slice(step * 20, step * 20 + 20)
        gradient(images[rows], labels[rows], global_batch=20)
        optimization.step(step)


@pytest.mark.parametrize("recipe", KINDS.values(), ids=KINDS)
def test_a_restored_training_goes_on_bit_by_bit(small_splits: "Splits", recipe: Recipe) -> None:
    model, optimization = make(recipe)
    train(model, optimization, small_splits, range(5))
    data = encode_state(model, optimization, POSITION)
    train(model, optimization, small_splits, range(5, 10))

    restored, restored_optimization = make(recipe, seed=1)
    assert load_state(data, restored, restored_optimization) == POSITION
    train(restored, restored_optimization, small_splits, range(5, 10))

    for name, weight in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], weight), name
    with optimization.averaged(), restored_optimization.averaged():
        for name, weight in model.state_dict().items():
            assert torch.equal(restored.state_dict()[name], weight), name


@pytest.mark.parametrize("recipe", KINDS.values(), ids=KINDS)
def test_saving_does_not_disturb_the_training(small_splits: "Splits", recipe: Recipe) -> None:
    results = []
    for save in (False, True):
        model, optimization = make(recipe)
        train(model, optimization, small_splits, range(3))
        if save:
            encode_state(model, optimization, POSITION)
        train(model, optimization, small_splits, range(3, 6))
        results.append(model.fc3.weight)
    assert torch.equal(*results)


@pytest.mark.parametrize("recipe", KINDS.values(), ids=KINDS)
def test_weights_to_publish_and_position_can_be_read_without_a_model(small_splits: "Splits", recipe: Recipe) -> None:
    model, optimization = make(recipe)
    train(model, optimization, small_splits, range(2))
    data = encode_state(model, optimization, POSITION)
    weights, position = read_state(data)
    assert position == POSITION
    assert weights.keys() == model.state_dict().keys()
    with optimization.averaged():
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_state_of_what_is_no_number_is_refused() -> None:
    """JSON has none: a checkpoint of a training that diverged would be one that nobody can go on from."""
    model, optimization = make(SEED)
    diverged = HISTORY[0].model_copy(update={"held_out_loss": float("nan")})
    data = encode_state(model, optimization, Position(epoch=2, history=[diverged]))
    for read in (lambda: read_state(data), lambda: load_state(data, model, optimization)):
        with pytest.raises(DataError, match="says not where training stood"):
            read()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_model_comes_back_from_its_file_alone(small_splits: "Splits", recipe: Recipe) -> None:
    model = fold_standardise(recipe.build_model(7, 0, 0.286, 0.353)).eval()
    found = decode_model(encode_model(model))
    assert not found.training
    images = torch.from_numpy(small_splits["test"][0])
    assert torch.equal(found(normalise(images)), model(normalise(images)))


def test_a_model_that_standardises_is_not_written() -> None:
    with pytest.raises(ValueError, match="fold_standardise"):
        encode_model(LeNet(10, 0.286, 0.353))


def mislabelled(**labels: object) -> bytes:
    """A model's file that says something untrue of it."""
    model = LeNet()
    for name, value in labels.items():
        setattr(model, name, value)
    return encode_model(model)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        encode_model(LeNet())[:-1],
        safetensors.torch.save(LeNet().state_dict()),
        encode_state(*make(SEED), POSITION),
        mislabelled(n_classes=3),
        mislabelled(activation="cosine"),
    ],
    ids=["empty", "zeros", "torn", "no metadata", "a checkpoint", "other classes", "unknown activation"],
)
def test_a_file_that_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^not a (LeNet|whole file) of this pipeline \(.*\)$"):
        decode_model(data)


@pytest.mark.parametrize("kept", [0, 4, 100, 10_000, -1])
def test_a_torn_file_is_refused(kept: int) -> None:
    model, optimization = make(SEED)
    data = encode_state(model, optimization, POSITION)[:kept]
    for call in (lambda: load_state(data, model, optimization), lambda: read_state(data)):
        with pytest.raises(DataError, match=r"^not a whole file of this pipeline \(.*\)$"):
            call()


@pytest.mark.parametrize("part", ["tensors", "metadata"])
def test_an_altered_file_is_refused(part: str) -> None:
    model, optimization = make(SEED)
    data = bytearray(encode_state(model, optimization, POSITION))
    where = len(data) - 1000 if part == "tensors" else data.index(b'step\\\\\\":117') + len(b'step\\\\\\":11')
    data[where] ^= 1
    with pytest.raises(DataError, match=r"^not what was written, its sha256 differs$"):
        read_state(bytes(data))


def test_the_same_content_gives_the_same_bytes_in_every_process() -> None:
    script = (
        "from pipeline.checkpoint import encode_model; from lenet.recipe import RECIPES; import hashlib;"
        "print(hashlib.sha256(encode_model(RECIPES['seed'].build_model(10, 0))).hexdigest())"
    )
    outputs = {subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout for _ in range(3)}
    assert len(outputs) == 1
