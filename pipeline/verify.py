"""Proof of a published run, from what anybody with read access to the store has: hashes, then every number again."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.artifacts import FORMS, SAFETENSORS
from pipeline.errors import DataError
from pipeline.evaluate import TOLERANCE, JudgeShard, ShardVerdict, apart, require_agreement
from pipeline.metrics import Tally, Verdict
from pipeline.predictions import decode_predictions, digest_of_rows, read_predictions
from pipeline.publish import FORMAT_VERSION, RunManifest, headline_of, read_report, run_folder, verify_run
from pipeline.registry import check_version, find_place
from pipeline.report import Report
from pipeline.shards import Manifest, require_manifest
from pipeline.storage import Store

# Sums of the same numbers in another order, or by another release of numpy.
RELATIVE = 1e-9


def verify(url: str) -> Iterator[str]:
    """Prove the run or version at a URL; a line for each thing that holds, as soon as it does.

    Raises DataError at the first that does not, with the object and what is wrong with it.
    """
    place = find_place(url)
    store, run_id = place.store, place.run_id
    check_version(place)
    if place.version is not None:
        yield f"{place}: its manifest is the one that was registered"
    run = verify_run(store, run_id)
    if run.format_version < FORMAT_VERSION:
        raise DataError(f"run {run_id}: published in format {run.format_version}, without predictions; run it again")
    yield f"{len(run.artifacts)} objects have the size and sha256 that the manifest says"
    report = read_report(store, run_id)
    _require_same_run(store, run, report)
    dataset = require_manifest(store, run.dataset_folder)
    if dataset.digest != run.dataset_digest:
        raise DataError(f"{store.locate(run.dataset_folder)}: is another dataset than that of run {run_id}")
    verdict = _recount(store, run)
    _require_equal(store, run_id, verdict, report)
    yield f"report.json: every number follows from the predictions, accuracy {verdict.accuracy:.4f} among them"
    yield _predict_again(store, run, dataset)
    yield f"{', '.join(FORMS)} are one model: logits within {TOLERANCE:g}"


def _require_same_run(store: Store, run: RunManifest, report: Report) -> None:
    where = store.locate(f"{run_folder(run.run_id)}/report.json")
    for what, here, there in (
        ("run", report.run_id, run.run_id),
        ("dataset", report.evaluation.dataset_digest, run.dataset_digest),
        ("set of test images", report.evaluation.test_digest, run.test_digest),
        ("model", report.evaluation.candidate_sha256, run.artifacts[SAFETENSORS].sha256),
    ):
        if here != there:
            raise DataError(f"{where}: is the report of {what} {here}, the manifest is of {there}; do not use the run")
    if report.evaluation.accuracy != run.accuracy:
        raise DataError(
            f"{where}: says accuracy {report.evaluation.accuracy}, the manifest {run.accuracy}; do not use the run"
        )
    if run.headline is not None and run.headline != headline_of(report):
        raise DataError(f"{where}: says {headline_of(report)}, the manifest {run.headline}; do not use the run")


def _recount(store: Store, run: RunManifest) -> Verdict:
    """The verdict that the published predictions give."""
    tally = Tally(len(run.classes))
    for part in read_predictions(store, run_folder(run.run_id), run.artifacts):
        tally.add(part.logits, part.labels, part.first_row)
    return tally.verdict(run.classes)


def _require_equal(store: Store, run_id: str, verdict: Verdict, report: Report) -> None:
    said = report.evaluation.model_dump(include=set(Verdict.model_fields))
    for name, found in verdict.model_dump().items():
        if (where := _difference(name, said[name], found)) is not None:
            raise DataError(
                f"{store.locate(f'{run_folder(run_id)}/report.json')}: {where}; it was edited, do not use the run"
            )


def _difference(name: str, said: Any, found: Any) -> str | None:
    """Where two numbers, or what is built of them, differ; None where they do not."""
    if isinstance(said, dict) and isinstance(found, dict) and said.keys() == found.keys():
        parts = [(f"{name}.{key}", said[key], found[key]) for key in said]
    elif isinstance(said, list | tuple) and isinstance(found, list | tuple) and len(said) == len(found):
        parts = [(f"{name}[{place}]", *both) for place, both in enumerate(zip(said, found, strict=True))]
    elif isinstance(said, float | int) and isinstance(found, float | int):
        close = math.isclose(said, found, rel_tol=RELATIVE, abs_tol=RELATIVE)
        return None if close else f"says {name} {said}, the predictions give {found}"
    else:
        return None if said == found else f"says {name} {said!r}, the predictions give {found!r}"
    return next((where for part in parts if (where := _difference(*part)) is not None), None)


def _predict_again(store: Store, run: RunManifest, dataset: Manifest) -> str:
    """Have every form predict every test image; that the published predictions are what comes of it."""
    folder = run_folder(run.run_id)
    judge = JudgeShard(store, dataset, {f"{folder}/{name}": run.artifacts[name] for name in FORMS})
    total = ShardVerdict.of_nothing(len(dataset.classes))
    published = read_predictions(store, folder, run.artifacts)
    for number in range(len(dataset.splits["test"])):
        part = judge(number)
        said, found = next(published, None), decode_predictions(part.predictions)
        where = store.locate(f"{folder}/predictions/{number:05d}.parquet")
        if said is None or len(said.labels) != len(found.labels):
            raise DataError(f"{where}: does not have the rows of test shard {number}; do not use the run")
        if not np.array_equal(said.labels, found.labels):
            raise DataError(f"{where}: its labels are not those of the dataset; do not use the run")
        near = apart(said.logits, found.logits) <= TOLERANCE
        if not near.all():
            row = said.first_row + int(np.argmin(near))
            raise DataError(f"{where}: not what {SAFETENSORS} predicts, first at row {row}; do not use the run")
        total.add(part)
    if digest_of_rows(total.rows_digest, dataset) != run.test_digest:
        raise DataError(f"{store.locate(folder)}: was judged by other test images than the dataset's; do not use it")
    require_agreement(total.differences)
    return f"predictions: what the model says of all {dataset.rows('test'):,} test images of {dataset.dataset}"
