"""`lenet data`: what datasets there are, and bringing them into the store, verifying them and looking at them."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.validators import Number
from rich.table import Table

from flows.options import DEFAULT_STORAGE, Storage, option, plain_console, whole
from flows.parameters import with_parameters
from pipeline.catalog import CATALOG
from pipeline.config import config_of
from pipeline.contact import contact_sheet, render_html, render_png
from pipeline.errors import ConfigError, DataError
from pipeline.run import DataConfig, prepare
from pipeline.shards import Manifest, list_manifests, verify_shards
from pipeline.storage import Store, open_store

data = App(name="data", help="Datasets: list, prepare, verify, show.")


@data.command(name="list")
def list_datasets(*, storage: Storage = DEFAULT_STORAGE) -> None:
    """List the catalogue, and the dataset versions in the store."""
    console = plain_console()
    catalogue = Table("catalogue", "classes", "licence", "homepage", box=None)
    for entry in CATALOG.values():
        catalogue.add_row(entry.name, str(len(entry.classes)), entry.licence, entry.homepage)
    console.print(catalogue, soft_wrap=True)
    store = open_store(storage)
    versions = Table("in the store", "version", "images", "shards", "MiB", "at", box=None)
    for manifest in list_manifests(store):
        shards = [shard for split in manifest.splits.values() for shard in split]
        versions.add_row(
            manifest.dataset,
            manifest.version,
            ", ".join(f"{manifest.rows(split):,} {split}" for split in manifest.splits),
            str(len(shards)),
            f"{sum(shard.bytes for shard in shards) / 2**20:.1f}",
            store.locate(manifest.folder),
        )
    console.print()
    console.print(versions if versions.row_count else f"nothing in the store yet: {store}", soft_wrap=True)


@data.command(name="prepare")
@with_parameters(DataConfig, option)
def prepare_dataset(**parameters: Any) -> None:
    """Bring a dataset here, check it, and shard it into the store."""
    config = config_of(parameters, DataConfig)
    with _logging():
        manifest = prepare(config)
    _describe(manifest)
    print(f"{manifest.dataset} version {manifest.version}: {open_store(config.storage).locate(manifest.folder)}")


@data.command(name="verify")
def verify_datasets(*datasets: str, storage: Storage = DEFAULT_STORAGE) -> None:
    """Read every byte of datasets in the store, and compare it with their manifests.

    Args:
        datasets: Their names; all that are there, if none is given.
    """
    store = open_store(storage)
    with _logging():
        for manifest in _named(store, datasets):
            verify_shards(store, manifest, decode=True)


@data.command(name="show")
def show_dataset(
    dataset: str,
    *,
    storage: Storage = DEFAULT_STORAGE,
    output: Path | None = None,
    samples: Annotated[int, Parameter(validator=Number(gte=1, lte=100), converter=whole)] = 10,
) -> None:
    """Draw some images of every class, with the class counts, into a page or a picture.

    Args:
        dataset: Its name in the store.
        output: File to write, .html or .png; the dataset's name with .html if not given.
        samples: Images of each class, 1 to 100.
    """
    output = output or Path(f"{dataset}.html")
    render = {".html": render_html, ".png": render_png}.get(output.suffix)
    if render is None:
        raise ConfigError("output", str(output), "the name says what to draw", "let it end in .html or .png")
    store = open_store(storage)
    manifest = _named(store, (dataset,))[-1]
    content = render(manifest, contact_sheet(store, manifest, samples))
    try:
        output.write_bytes(content)
    except OSError as error:
        raise ConfigError("output", str(output), str(error.strerror), "name a file that can be written") from None
    _describe(manifest)
    print(f"{manifest.dataset} version {manifest.version}: {output.absolute()}")


def _named(store: Store, names: tuple[str, ...]) -> list[Manifest]:
    found = list_manifests(store)
    for name in names:
        if name not in {manifest.dataset for manifest in found}:
            raise ConfigError(
                "dataset",
                name,
                f"{store} has none of that name",
                f"make it with: lenet data prepare --dataset {name}",
            )
    if not found:
        raise DataError(f"{store}: no dataset is there; make one with: lenet data prepare")
    return [manifest for manifest in found if not names or manifest.dataset in names]


def _describe(manifest: Manifest) -> None:
    report = manifest.report
    table = Table("class", *manifest.splits, box=None)
    for number, name in enumerate(manifest.classes):
        table.add_row(name, *(f"{report.class_counts[split][number]:,}" for split in manifest.splits))
    table.add_row("all", *(f"{manifest.rows(split):,}" for split in manifest.splits))
    console = plain_console()
    console.print(table, soft_wrap=True)
    console.print(f"training pixels: mean {report.pixel_mean:.4f}, standard deviation {report.pixel_std:.4f}")
    for split, count in report.duplicates.items():
        console.print(f"{split} images that are training images too: {count:,}")


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """What the pipeline says, on the terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("pipeline")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
