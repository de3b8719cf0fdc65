"""From a source to Parquet shards in the store: which row goes where, the shards in parallel, the manifest last.

Each shard is written by one task that holds one shard in memory. A task leaves the shard and then a receipt; what
has a receipt is not done again, so a run that broke off goes on where it stopped. Readers see nothing of it before
the manifest is there.
"""

import base64
import contextlib
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.ahead import in_order
from pipeline.errors import DataError, StorageError
from pipeline.idx import Pixels
from pipeline.order import Rows, hold_out, share
from pipeline.shards import (
    FORMAT_VERSION,
    DataReport,
    Manifest,
    Shard,
    decode_shard,
    digest_of,
    encode_shard,
    find_manifest,
    require_manifest,
    schema_of,
)
from pipeline.source import Source
from pipeline.storage import Store, sha256

log = logging.getLogger(__name__)

MIB = 2**20
MAX_SHARDS = 99_999
THREADS = 2  # compressing is what takes time; with two, one compresses while the other writes
RECEIPTS = "parts"
DIGEST_BYTES = 16  # of an image's content by XXH3: 10,000 take 2 ms, by BLAKE2 15 ms; nobody's trust rests on it


class ShardConfig(BaseModel):
    """How the dataset is laid out in the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard_mib: float = Field(8, gt=0, le=1024, description="Size of a shard's pixels, in MiB before compression.")
    validation_fraction: float = Field(
        0,
        ge=0,
        le=0.5,
        description="Part of each class's training images to hold out for validation. Above 0, epochs are judged by "
        "these, and the test images are looked at once, at the end.",
    )


class Part(BaseModel):
    """The receipt of one shard: what the manifest says of it, and what the data report needs."""

    model_config = ConfigDict(frozen=True)

    shard: Shard
    class_counts: tuple[int, ...]
    pixel_sum: int
    pixel_square_sum: int
    content: str

    def digests(self) -> list[bytes]:
        """The digest of every image."""
        content = base64.b64decode(self.content)
        return [content[start : start + DIGEST_BYTES] for start in range(0, len(content), DIGEST_BYTES)]


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: rows of a source's split, in the order given."""

    store: Store
    source: Source
    folder: str
    name: str
    split: str
    rows: Rows


Run = Callable[[Callable[[ShardTask], Part], Iterable[ShardTask]], Iterator[Part]]


def run_in_threads(work: Callable[[ShardTask], Part], tasks: Iterable[ShardTask]) -> Iterator[Part]:
    """The parts in the order of the tasks, a few at work at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from in_order(lambda task: pool.submit(work, task), Future.result, tasks, ahead=2 * THREADS)


def dataset_folder(
    dataset: str, made_of: Mapping[str, str], conversion: Mapping[str, object], config: ShardConfig
) -> str:
    """Key of the folder for a dataset laid out as `config` says: known before a byte of a published one is fetched."""
    # 8 and 8.0 are one layout.
    layout = [float(config.shard_mib), float(config.validation_fraction)]
    version = [FORMAT_VERSION, *layout, dict(made_of), dict(conversion)]
    return f"datasets/{dataset}/{sha256(json.dumps(version, sort_keys=True).encode())[:16]}"


def plan_splits(source: Source, config: ShardConfig) -> dict[str, tuple[str, Rows]]:
    """For each split of the dataset: the source's split and its rows int64 (n,), ascending. Held-out splits first."""
    labels = source.labels("train")
    held = hold_out(labels, config.validation_fraction)
    splits = {"test": ("test", np.arange(source.rows("test")))}
    if held.any():
        splits["validation"] = ("train", np.flatnonzero(held))
    splits["train"] = ("train", np.flatnonzero(~held))
    return splits


def plan_shards(rows: int, image_bytes: int, config: ShardConfig) -> list[tuple[int, int]]:
    """Start and stop of each shard of a split: as few equal ones as keep to the target size, one row at least."""
    count = min(rows, max(1, math.ceil(rows * image_bytes / (config.shard_mib * MIB))))
    if count > MAX_SHARDS:
        raise DataError(f"{rows:,} images make {count:,} shards of shard_mib={config.shard_mib:g}; use larger ones")
    return [share(rows, index, count) for index in range(count)]


def write_shards(store: Store, source: Source, config: ShardConfig, run: Run = run_in_threads) -> Manifest:
    """Shard a source, `run` doing the tasks; the manifest is written last. Nothing to do if it is there already.

    Raises DataError for a class without training images, and images that are all of one grey.
    """
    facts = source.facts
    folder = dataset_folder(facts.dataset, facts.made_of, facts.conversion, config)
    if manifest := find_manifest(store, folder):
        return manifest
    try:
        return _write_version(store, source, folder, config, run)
    except StorageError:
        # Another run that did the same has published, and then taken away the receipts that this one was at.
        if manifest := find_manifest(store, folder):
            return manifest
        raise


def _write_version(store: Store, source: Source, folder: str, config: ShardConfig, run: Run) -> Manifest:
    facts = source.facts
    image_bytes = facts.image_shape[0] * facts.image_shape[1]
    shards: dict[str, tuple[Shard, ...]] = {}
    census = _Census(len(facts.classes))
    for split, (source_split, rows) in plan_splits(source, config).items():
        ranges = plan_shards(len(rows), image_bytes, config)
        tasks = (
            ShardTask(
                store,
                source,
                folder,
                f"{split}-{index:05d}-of-{len(ranges):05d}.parquet",
                source_split,
                rows[slice(*range_)],
            )
            for index, range_ in enumerate(ranges)
        )
        shards[split] = tuple(census.take(split, part, image_bytes) for part in run(write_shard, tasks))
    report = census.report()
    for name, count in zip(facts.classes, report.class_counts["train"], strict=True):
        if count == 0:
            raise DataError(f"{facts.dataset}: class {name!r} has no training image; leave it out of the classes")
    if report.pixel_std == 0:
        raise DataError(f"{facts.dataset}: all pixels to train on have the same value; look at the images")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dataset=facts.dataset,
        folder=folder,
        image_shape=facts.image_shape,
        columns={column.name: str(column.type) for column in schema_of(image_bytes)},
        classes=facts.classes,
        splits={split: shards[split] for split in ("train", "validation", "test") if split in shards},
        report=report,
        made_of=facts.made_of,
        conversion=facts.conversion,
        licence=facts.licence,
        homepage=facts.homepage,
        citation=facts.citation,
        digest="",
    )
    manifest = manifest.model_copy(update={"digest": digest_of(manifest)})
    store.keep(f"{folder}/manifest.json", manifest.model_dump_json(indent=2).encode())
    for split, count in report.duplicates.items():
        if count:
            said = "%s: of %s %s images %s are training images too, pixel by pixel; to know these proves little"
            log.warning(said, facts.dataset, f"{manifest.rows(split):,}", split, f"{count:,}")
    try:
        store.delete(f"{folder}/{RECEIPTS}")
    except StorageError as error:
        log.warning("%s: receipts stay, which does no harm: %s", facts.dataset, error)
    return require_manifest(store, folder)


def write_shard(task: ShardTask) -> Part:
    """Write one shard and its receipt, or find them written."""
    receipt = f"{task.folder}/{RECEIPTS}/{task.name}.json"
    if (done := _find_part(task, receipt)) is not None:
        return done
    images, labels = task.source.read(task.split, task.rows), task.source.labels(task.split)[task.rows]
    data = _keep_shard(task, images, labels)
    flat = images.reshape(len(images), -1)
    part = Part(
        shard=Shard(name=task.name, rows=len(images), bytes=len(data), sha256=sha256(data)),
        class_counts=tuple(np.bincount(labels, minlength=len(task.source.facts.classes)).tolist()),
        pixel_sum=int(flat.sum(dtype=np.int64)),
        # A row of 65,535 pixels would fit into 32 bits, and summing in them is three times as fast as in 64.
        pixel_square_sum=int(np.einsum("ij,ij->i", flat, flat, dtype=np.uint32).sum(dtype=np.int64)),
        content=base64.b64encode(b"".join(xxhash.xxh3_128_digest(row.data) for row in flat)).decode(),
    )
    task.store.put(receipt, part.model_dump_json().encode())
    return part


def _keep_shard(task: ShardTask, images: Pixels, labels: Pixels) -> bytes:
    """What the store holds for the shard: of one that is published already, not a byte may change."""
    key, data = f"{task.folder}/{task.name}", encode_shard(images, labels, task.rows)
    found = task.store.keep(key, data)
    if found != data:
        with contextlib.suppress(DataError):
            if all(map(np.array_equal, decode_shard(found, task.source.facts.image_shape), (images, labels))):
                return found  # the same rows, packed by another release
        task.store.put(key, data)
    return data


def _find_part(task: ShardTask, receipt: str) -> Part | None:
    if not task.store.exists(receipt):
        return None
    try:
        part = Part.model_validate_json(task.store.read(receipt))
    except ValidationError:
        return None
    key = f"{task.folder}/{task.name}"
    return part if task.store.exists(key) and sha256(task.store.read(key)) == part.shard.sha256 else None


class _Census:
    """Adds up the parts as they come, the held-out splits' first: only their images' digests are kept in memory."""

    def __init__(self, n_classes: int) -> None:
        self.class_counts: dict[str, npt.NDArray[np.int64]] = defaultdict(lambda: np.zeros(n_classes, np.int64))
        self.held_out: dict[str, Counter[bytes]] = defaultdict(Counter)
        self.in_train: set[bytes] = set()
        self.pixels = self.pixel_sum = self.pixel_square_sum = 0

    def take(self, split: str, part: Part, image_bytes: int) -> Shard:
        """Count a part; its shard."""
        self.class_counts[split] += part.class_counts
        if split != "train":
            self.held_out[split].update(part.digests())
            return part.shard
        self.pixels += part.shard.rows * image_bytes
        self.pixel_sum += part.pixel_sum
        self.pixel_square_sum += part.pixel_square_sum
        for digests in self.held_out.values():
            self.in_train |= digests.keys() & set(part.digests())
        return part.shard

    def report(self) -> DataReport:
        """All of it together."""
        mean = self.pixel_sum / self.pixels
        variance = max(0.0, self.pixel_square_sum / self.pixels - mean**2)  # rounding may leave less than nothing
        return DataReport(
            class_counts={split: tuple(counts.tolist()) for split, counts in self.class_counts.items()},
            pixel_mean=mean / 255,
            pixel_std=math.sqrt(variance) / 255,
            duplicates={
                split: sum(digests[image] for image in digests.keys() & self.in_train)
                for split, digests in self.held_out.items()
            },
        )
