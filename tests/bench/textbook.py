"""The plain loops that the pipeline is measured against, written apart from it: torch, torchvision, Ray Train only."""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

BATCH, LR = 256, 0.9


@dataclass
class Epoch:
    """One epoch's means, and the seconds its training took."""

    train_loss: float
    train_accuracy: float
    test_accuracy: float
    seconds: float


def textbook_model(seed: int) -> nn.Module:
    """The textbook's LeNet, Xavier-uniform weights."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5, padding=2), nn.Sigmoid(), nn.AvgPool2d(kernel_size=2, stride=2),
        nn.Conv2d(6, 16, kernel_size=5), nn.Sigmoid(), nn.AvgPool2d(kernel_size=2, stride=2), nn.Flatten(),
        nn.Linear(400, 120), nn.Sigmoid(), nn.Linear(120, 84), nn.Sigmoid(), nn.Linear(84, 10),
    )  # fmt: skip
    for layer in net:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
    return net


def link_raw_files(idx_folder: Path, root: Path) -> None:
    """Lay verified IDX files where torchvision looks for them, so that it needs no network."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for file in idx_folder.iterdir():
        if not (raw / file.name).exists():
            (raw / file.name).symlink_to(file)


def textbook_loop(root: Path, epochs: int, seed: int = 0, device: str = "cpu") -> list[Epoch]:
    """torchvision's dataset, ToTensor, a DataLoader with two processes, a step, a metric: as every tutorial has it."""

    def batches(loader: DataLoader):
        for images, labels in loader:
            yield images.to(device), labels.to(device)

    to_tensor = transforms.ToTensor()
    train_data = datasets.FashionMNIST(root, train=True, transform=to_tensor)
    test_data = datasets.FashionMNIST(root, train=False, transform=to_tensor)
    train_loader = DataLoader(train_data, BATCH, shuffle=True, num_workers=2)
    test_loader = DataLoader(test_data, BATCH, shuffle=False, num_workers=2)
    net = textbook_model(seed).to(device)
    return _train(net, epochs, lambda: batches(train_loader), lambda: batches(test_loader))


def rays_loop(root: Path, epochs: int, workers: int = 2) -> list[float]:
    """Seconds of each epoch as Ray Train's own Fashion-MNIST example has them, but with this LeNet: a DataLoader and a
    DistributedDataParallel on every worker, prepared by Ray."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds.json"
        ray.train.torch.TorchTrainer(
            _rays_worker,
            train_loop_config={"root": str(root), "epochs": epochs, "workers": workers, "result": str(result)},
            scaling_config=ray.train.ScalingConfig(num_workers=workers),
        ).fit()
        seconds: list[float] = json.loads(result.read_text())
        return seconds


def _rays_worker(config: dict[str, Any]) -> None:
    data = datasets.FashionMNIST(config["root"], train=True, transform=transforms.ToTensor())
    loader = ray.train.torch.prepare_data_loader(DataLoader(data, BATCH // config["workers"], shuffle=True))
    net = ray.train.torch.prepare_model(textbook_model(0))
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    seconds = []
    for epoch in range(config["epochs"]):
        started = time.perf_counter()
        loader.sampler.set_epoch(epoch)
        net.train()
        for images, labels in loader:
            loss = loss_function(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - started)
        ray.train.report({"loss": loss.item()})
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["result"]).write_text(json.dumps(seconds))


def tensor_loop(images: torch.Tensor, labels: torch.Tensor, test: tuple[torch.Tensor, torch.Tensor],
                epochs: int, seed: int) -> list[Epoch]:  # fmt: skip
    """The same training from tensors in memory, on their device.

    images: uint8 (N, 28, 28), labels: int64 (N,).
    """
    device = images.device
    net = textbook_model(seed).to(device)

    def batches(x: torch.Tensor, y: torch.Tensor, order: torch.Tensor):
        for index in order.split(BATCH):
            yield x[index].unsqueeze(1) / 255, y[index]

    return _train(
        net,
        epochs,
        lambda: batches(images, labels, torch.randperm(len(labels), device=device)),
        lambda: batches(*test, torch.arange(len(test[1]), device=device)),
    )


def _train(net: nn.Module, epochs: int, train_batches, test_batches) -> list[Epoch]:
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    history = []
    for _ in range(epochs):
        started = time.perf_counter()
        loss_sum = correct = seen = 0.0
        net.train()
        for images, labels in train_batches():
            optimizer.zero_grad()
            logits = net(images)
            loss = loss_function(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
        seconds = time.perf_counter() - started
        net.eval()
        with torch.no_grad():
            hits = [(net(images).argmax(1) == labels) for images, labels in test_batches()]
        test_accuracy = torch.cat(hits).float().mean().item()
        history.append(Epoch(loss_sum / seen, correct / seen, test_accuracy, seconds))
    return history
