"""The published datasets the pipeline knows, each an entry of data.

Mirrors, archives and their md5 are torchvision's, written out here because importing torchvision takes 1.8 s; a test
compares them.
"""

import string
from dataclasses import dataclass

from pipeline.source import FILES, IMAGES, LABELS


@dataclass(frozen=True, kw_only=True)
class IdxFile:
    """One published IDX file: the archive that holds it, and its sha256 (hex) once decompressed, where known.

    The decompressed bytes are what is pinned, since mirrors and distributions recompress the archives. `member` is
    its name in a zip, where it lies compressed once more.
    """

    archive: str
    member: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A published image classification dataset in IDX files.

    `archives` has the published md5 (hex) by name, each found under every one of `mirrors`; `files` the IDX files by
    the name they get here. The rest says what has to be done to them: images stored with rows and columns exchanged,
    labels that start from `first_label`, labels in column 0 of a table of int32.
    """

    name: str
    classes: tuple[str, ...]
    mirrors: tuple[str, ...]
    archives: dict[str, str]
    files: dict[str, IdxFile]
    licence: str
    homepage: str
    citation: str
    debian_package: str | None = None
    debian_folder: str | None = None
    transposed: bool = False
    first_label: int = 0
    int_labels: bool = False
    variant: str = ""

    @property
    def pinned(self) -> bool:
        """Whether the sha256 of every decompressed file is known."""
        return all(file.sha256 for file in self.files.values())

    @property
    def made_of(self) -> dict[str, str]:
        """What the dataset is made of: published checksums by file name, known before anything is fetched."""
        if self.pinned:
            return {name: f"sha256:{file.sha256}" for name, file in self.files.items()}
        return {name: f"md5:{digest}" for name, digest in self.archives.items()}

    @property
    def conversion(self) -> dict[str, str | int | float]:
        """What is done to the published files; with `made_of` it decides every byte of the result."""
        done: dict[str, str | int | float] = {}
        if self.variant:
            done["variant"] = self.variant
        if self.transposed:
            done["images"] = "rows and columns exchanged"
        if self.int_labels:
            done["labels"] = "column 0 of the int32 table"
        if self.first_label:
            done["labels"] = f"less {self.first_label}"
        return done


def _gzipped(sha256: dict[str, str] | None = None) -> dict[str, IdxFile]:
    """The four files as MNIST published them, each in an archive of its own."""
    return {name: IdxFile(archive=f"{name}.gz", sha256=(sha256 or {}).get(name)) for name in FILES}


DIGITS = tuple(string.digits)

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
    mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
    archives={
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    files=_gzipped(
        {
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        }
    ),
    licence="MIT",
    homepage="https://github.com/zalandoresearch/fashion-mnist",
    citation="H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
    "Algorithms. arXiv:1708.07747, 2017.",
    debian_package="dataset-fashion-mnist",
    debian_folder="usr/share/datasets/fashion-mnist",
)

MNIST = Dataset(
    name="mnist",
    classes=DIGITS,
    mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
    archives={
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    files=_gzipped(
        {
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        }
    ),
    licence="CC BY-SA 3.0",
    homepage="http://yann.lecun.com/exdb/mnist/",
    citation="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: Gradient-Based Learning Applied to Document Recognition. "
    "Proceedings of the IEEE 86(11):2278-2324, 1998.",
)

KMNIST = Dataset(
    name="kmnist",
    classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
    archives={
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    },
    files=_gzipped(),
    licence="CC BY-SA 4.0",
    homepage="https://github.com/rois-codh/kmnist",
    citation="T. Clanuwat, M. Bober-Irizar, A. Kitamoto, A. Lamb, K. Yamamoto, D. Ha: Deep Learning for Classical "
    "Japanese Literature. arXiv:1812.01718, 2018.",
)

QMNIST = Dataset(
    name="qmnist",
    classes=DIGITS,
    mirrors=("https://raw.githubusercontent.com/facebookresearch/qmnist/master/",),
    archives={
        "qmnist-train-images-idx3-ubyte.gz": "ed72d4157d28c017586c42bc6afe6370",
        "qmnist-train-labels-idx2-int.gz": "0058f8dd561b90ffdd0f734c6a30e5e4",
        "qmnist-test-images-idx3-ubyte.gz": "1394631089c404de565df7b7aeaf9412",
        "qmnist-test-labels-idx2-int.gz": "5b5b05890a5e13444e108efe57b788aa",
    },
    files={
        IMAGES["train"]: IdxFile(archive="qmnist-train-images-idx3-ubyte.gz"),
        LABELS["train"]: IdxFile(archive="qmnist-train-labels-idx2-int.gz"),
        IMAGES["test"]: IdxFile(archive="qmnist-test-images-idx3-ubyte.gz"),
        LABELS["test"]: IdxFile(archive="qmnist-test-labels-idx2-int.gz"),
    },
    licence="BSD 3-Clause",
    homepage="https://github.com/facebookresearch/qmnist",
    citation="C. Yadav, L. Bottou: Cold Case: The Lost MNIST Digits. Advances in Neural Information Processing "
    "Systems 32, 2019.",
    int_labels=True,
)

_UPPER_AND_MERGED = (*DIGITS, *string.ascii_uppercase, *"abdefghnqrt")
_EMNIST_CLASSES = {
    "balanced": _UPPER_AND_MERGED,
    "byclass": (*DIGITS, *string.ascii_uppercase, *string.ascii_lowercase),
    "bymerge": _UPPER_AND_MERGED,
    "digits": DIGITS,
    "letters": tuple(string.ascii_lowercase),
    "mnist": DIGITS,
}


def _emnist(variant: str) -> Dataset:
    """One of EMNIST's six datasets, all of them in one zip of 560 MB."""
    published = {
        names[split]: IdxFile(archive="gzip.zip", member=f"gzip/emnist-{variant}-{split}-{kind}.gz")
        for split in IMAGES
        for names, kind in ((IMAGES, "images-idx3-ubyte"), (LABELS, "labels-idx1-ubyte"))
    }
    return Dataset(
        name=f"emnist-{variant}",
        classes=_EMNIST_CLASSES[variant],
        mirrors=("https://biometrics.nist.gov/cs_links/EMNIST/",),
        archives={"gzip.zip": "58c8d27c78d21e728a6bc7b3cc06412e"},
        files=published,
        licence="none stated; derived from NIST Special Database 19",
        homepage="https://www.nist.gov/itl/products-and-services/emnist-dataset",
        citation="G. Cohen, S. Afshar, J. Tapson, A. van Schaik: EMNIST: an extension of MNIST to handwritten letters. "
        "arXiv:1702.05373, 2017.",
        transposed=True,
        first_label=1 if variant == "letters" else 0,
        variant=variant,
    )


CATALOG: dict[str, Dataset] = {
    dataset.name: dataset for dataset in [FASHION_MNIST, MNIST, KMNIST, QMNIST, *map(_emnist, _EMNIST_CLASSES)]
}
