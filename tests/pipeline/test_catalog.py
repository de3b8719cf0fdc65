"""Proves that the catalogue agrees with torchvision, and that entries can be told apart before they are fetched."""

import re

import pytest
import torchvision.datasets as published

from pipeline.catalog import CATALOG, FASHION_MNIST, Dataset
from pipeline.source import FILES, SourceConfig, SourceFacts

EMNIST = sorted(name for name in CATALOG if name.startswith("emnist-"))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("fashion-mnist", published.FashionMNIST),
        ("mnist", published.MNIST),
        ("kmnist", published.KMNIST),
    ],
)
def test_mirrors_and_archives_are_torchvisions(name: str, reference: type[published.MNIST]) -> None:
    assert list(CATALOG[name].mirrors) == reference.mirrors
    assert list(CATALOG[name].archives.items()) == reference.resources
    # torchvision names digits "0 - zero".
    assert list(CATALOG[name].classes) == [label.split(" - ")[0] for label in reference.classes]


def test_qmnist_is_torchvisions() -> None:
    dataset = CATALOG["qmnist"]
    urls = [(f"{dataset.mirrors[0]}{name}", md5) for name, md5 in dataset.archives.items()]
    assert urls == published.QMNIST.resources["train"] + published.QMNIST.resources["test"]
    assert [file.archive for file in dataset.files.values()] == list(dataset.archives)
    assert dataset.int_labels


def test_emnist_is_torchvisions_less_its_class_that_is_none() -> None:
    assert sorted(f"emnist-{split}" for split in published.EMNIST.splits) == EMNIST
    for split in published.EMNIST.splits:
        dataset = CATALOG[f"emnist-{split}"]
        ((archive, md5),) = dataset.archives.items()
        assert (dataset.mirrors[0] + archive, md5) == (published.EMNIST.url, published.EMNIST.md5)
        classes = published.EMNIST.classes_split_dict[split]
        assert list(dataset.classes) == [name for name in classes if name != "N/A"]
        assert dataset.first_label == len(classes) - len(dataset.classes)
        assert [file.member for file in dataset.files.values()] == [
            f"gzip/emnist-{split}-{part}-{kind}.gz"
            for part in ("train", "test")
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]
        assert dataset.transposed


@pytest.mark.parametrize("dataset", CATALOG.values(), ids=list(CATALOG))
def test_every_entry_is_complete(dataset: Dataset) -> None:
    assert sorted(dataset.files) == sorted(FILES)
    assert {file.archive for file in dataset.files.values()} == set(dataset.archives)
    assert all(mirror.startswith("http") and mirror.endswith("/") for mirror in dataset.mirrors)
    assert dataset.licence
    assert dataset.homepage.startswith("http")
    assert re.search(r"\b(1998|2017|2018|2019)\.$", dataset.citation)
    assert (dataset.debian_package is None) == (dataset.debian_folder is None)
    assert len(set(dataset.classes)) == len(dataset.classes)
    assert all(re.fullmatch(r"(sha256:[0-9a-f]{64}|md5:[0-9a-f]{32})", value) for value in dataset.made_of.values())
    SourceFacts(
        dataset=dataset.name,
        classes=dataset.classes,
        image_shape=(28, 28),
        made_of=dataset.made_of,
        conversion=dataset.conversion,
        sha256={},
        licence=dataset.licence,
        homepage=dataset.homepage,
        citation=dataset.citation,
    )


def test_what_a_dataset_is_made_of_is_known_before_it_is_fetched() -> None:
    assert FASHION_MNIST.made_of == {name: f"sha256:{file.sha256}" for name, file in FASHION_MNIST.files.items()}
    assert FASHION_MNIST.conversion == {}
    assert CATALOG["mnist"].pinned
    assert CATALOG["emnist-letters"].made_of == {"gzip.zip": "md5:58c8d27c78d21e728a6bc7b3cc06412e"}
    versions = {(str(entry.made_of), str(entry.conversion)) for entry in CATALOG.values()}
    assert len(versions) == len(CATALOG)


def test_help_names_every_dataset() -> None:
    text = SourceConfig.model_fields["dataset"].description
    assert text is not None
    assert set(CATALOG) <= set(re.findall(r"[a-z0-9-]+", text))
