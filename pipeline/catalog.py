"""The datasets the pipeline knows, each an entry of data."""

from dataclasses import dataclass

SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class IdxFile:
    """One published file: its name once decompressed, and the sha256 (hex) of those decompressed bytes.

    The decompressed bytes are what is pinned, since mirrors and distributions recompress the archives.
    """

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A published image classification dataset in IDX files, `images` and `labels` by split.

    `torchvision_class` names the class in torchvision.datasets that lists its mirrors and its archives' checksums.
    """

    name: str
    classes: tuple[str, ...]
    images: dict[str, IdxFile]
    labels: dict[str, IdxFile]
    torchvision_class: str
    debian_package: str
    debian_folder: str
    licence: str
    homepage: str

    @property
    def files(self) -> list[IdxFile]:
        """All files, in a fixed order."""
        return [group[split] for split in SPLITS for group in (self.images, self.labels)]


FASHION_MNIST = Dataset(
    name="fashion-mnist",
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    images={
        "train": IdxFile(
            name="train-images-idx3-ubyte",
            sha256="c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        "test": IdxFile(
            name="t10k-images-idx3-ubyte",
            sha256="5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
    },
    labels={
        "train": IdxFile(
            name="train-labels-idx1-ubyte",
            sha256="bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        "test": IdxFile(
            name="t10k-labels-idx1-ubyte",
            sha256="0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    },
    torchvision_class="FashionMNIST",
    debian_package="dataset-fashion-mnist",
    debian_folder="usr/share/datasets/fashion-mnist",
    licence="MIT",
    homepage="https://github.com/zalandoresearch/fashion-mnist",
)

CATALOG: dict[str, Dataset] = {dataset.name: dataset for dataset in [FASHION_MNIST]}
