"""Proof of a published run, from what anybody with read access to the store has: hashes, then all that follows from
the model and the dataset, again.

What training says of itself, how fast the model is, how it does on changed images and what it was compared with do not
follow from these and are not proven; `pipeline.reproduce` trains again.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from lenet.model import layer_table
from pipeline.artifacts import FORMS, SAFETENSORS, artifact_of
from pipeline.card import render_card
from pipeline.errors import DataError
from pipeline.evaluate import TOLERANCE, JudgeShard, ShardVerdict, apart, load_model, require_agreement
from pipeline.metrics import Logits, Tally, Verdict
from pipeline.predictions import decode_predictions, digest_of_rows, prediction_files, read_predictions
from pipeline.publish import (
    CARD,
    FORMAT_VERSION,
    PAGE,
    REPORT,
    RunManifest,
    code_of_pages,
    headline_of,
    read_report,
    run_folder,
    verify_run,
)
from pipeline.report import Report, facts_of, render_html
from pipeline.served import check_version, find_place
from pipeline.shards import Manifest, pick_rows, require_manifest
from pipeline.storage import Store

# Sums of the same numbers in another order, or by another release of numpy.
RELATIVE = 1e-9


class Found(NamedTuple):
    """What was looked at, in a line; `open_to_doubt` names what of it could not be compared."""

    line: str
    open_to_doubt: str = ""

    def __str__(self) -> str:
        return f"{'--' if self.open_to_doubt else 'ok'}  {self.line}"


def verify(url: str) -> Iterator[Found]:
    """Prove the run or version at a URL; something found for each thing that holds, as soon as it does.

    Raises DataError at the first that does not, with the object and what is wrong with it.
    """
    place = find_place(url)
    store, run_id = place.store, place.run_id
    check_version(place)
    if place.version is not None:
        yield Found(f"{place}: its manifest is the one that was registered")
    run = verify_run(store, run_id)
    if run.format_version < FORMAT_VERSION:
        raise DataError(f"run {run_id}: published in format {run.format_version}, without predictions; run it again")
    if missing := {*FORMS, PAGE, CARD, REPORT} - run.artifacts.keys():
        raise DataError(f"{store.locate(run_folder(run_id))}: its manifest names no {min(missing)}; do not use the run")
    yield Found(f"{len(run.artifacts)} objects have the size and sha256 that the manifest says")
    report = read_report(store, run_id)
    dataset = require_manifest(store, run.dataset_folder)
    if dataset.digest != run.dataset_digest:
        raise DataError(f"{store.locate(run.dataset_folder)}: is another dataset than that of run {run_id}")
    _require_same_run(store, run, report, dataset)
    verdict = _recount(store, run, dataset)
    _require_equal(store, run, report.evaluation.model_dump(), verdict.model_dump())
    _require_facts(store, run, report, dataset)
    yield Found(
        f"report.json: every figure of accuracy follows from the predictions, accuracy {verdict.accuracy:.4f} first"
    )
    yield Found(_predict_again(store, run, dataset, report))
    yield Found(f"{', '.join(FORMS)} are one model: logits within {TOLERANCE:g}")
    yield _render_again(store, run, dataset, report)


def _require_same_run(store: Store, run: RunManifest, report: Report, dataset: Manifest) -> None:
    folder = store.locate(run_folder(run.run_id))
    if (run.classes, run.image_shape) != (dataset.classes, dataset.image_shape):
        raise DataError(f"{folder}/manifest.json: its classes or image_shape are not the dataset's; do not use the run")
    where = f"{folder}/report.json"
    for what, here, there in (
        ("run", report.run_id, run.run_id),
        ("dataset", report.evaluation.dataset_digest, run.dataset_digest),
        ("set of test images", report.evaluation.test_digest, run.test_digest),
        ("model", report.evaluation.candidate_sha256, run.artifacts[SAFETENSORS].sha256),
        ("a run that finished at", report.finished, run.finished),
    ):
        if here != there:
            raise DataError(f"{where}: is the report of {what} {here}, the manifest is of {there}; do not use the run")
    if report.evaluation.accuracy != run.accuracy:
        raise DataError(
            f"{where}: says accuracy {report.evaluation.accuracy}, the manifest {run.accuracy}; do not use the run"
        )
    if run.headline is not None and run.headline != headline_of(report):
        raise DataError(f"{where}: says {headline_of(report)}, the manifest {run.headline}; do not use the run")


def _recount(store: Store, run: RunManifest, dataset: Manifest) -> Verdict:
    """The verdict that the published predictions give, as many as there are test images."""
    tally, images = Tally(len(dataset.classes)), 0
    for part in read_predictions(store, run_folder(run.run_id), run.artifacts):
        images += len(part.labels)
        if part.logits.shape[1] != len(dataset.classes) or images > dataset.rows("test"):
            break
        tally.add(part.logits, part.labels, part.first_row)
    else:
        if images == dataset.rows("test"):
            return tally.verdict(dataset.classes)
    where = store.locate(f"{run_folder(run.run_id)}/predictions")
    raise DataError(f"{where}: are not of the {dataset.rows('test'):,} test images of the dataset; do not use the run")


def _require_facts(store: Store, run: RunManifest, report: Report, dataset: Manifest) -> None:
    """That the report says of dataset and model what they are."""
    model = load_model(store, f"{run_folder(run.run_id)}/{SAFETENSORS}", run.artifacts[SAFETENSORS].sha256)
    layers = [asdict(row) for row in layer_table(model, dataset.image_shape[0])]
    facts = facts_of(dataset)
    if report.dataset.duplicates is None:  # of before they were told
        facts = facts.model_copy(update={"duplicates": None})
    found = {"dataset": facts.model_dump(), "layers": layers}
    _require_equal(store, run, report.model_dump(include=set(found)), found)


def _require_equal(store: Store, run: RunManifest, said: dict[str, Any], found: dict[str, Any]) -> None:
    for name in found:
        if (where := _difference(name, said[name], found[name])) is not None:
            report = store.locate(f"{run_folder(run.run_id)}/report.json")
            raise DataError(f"{report}: {where}; it was edited, do not use the run")


def _difference(name: str, said: Any, found: Any) -> str | None:
    """Where two numbers, or what is built of them, differ; None where they do not."""
    if isinstance(said, dict) and isinstance(found, dict) and said.keys() == found.keys():
        parts = [(f"{name}.{key}", said[key], found[key]) for key in said]
    elif isinstance(said, list | tuple) and isinstance(found, list | tuple) and len(said) == len(found):
        parts = [(f"{name}[{place}]", *both) for place, both in enumerate(zip(said, found, strict=True))]
    elif isinstance(said, float | int) and isinstance(found, float | int):
        close = math.isclose(said, found, rel_tol=RELATIVE, abs_tol=RELATIVE)
        return None if close else f"says {name} {said}, it is {found}"
    else:
        return None if said == found else f"says {name} {said!r}, it is {found!r}"
    return next((where for part in parts if (where := _difference(*part)) is not None), None)


def _predict_again(store: Store, run: RunManifest, dataset: Manifest, report: Report) -> str:
    """Have every form predict every test image; that the published predictions are what comes of it."""
    folder = run_folder(run.run_id)
    judge = JudgeShard(store, dataset, {f"{folder}/{name}": run.artifacts[name] for name in FORMS})
    total, undecided = ShardVerdict.of_nothing(len(dataset.classes)), 0
    published = read_predictions(store, folder, run.artifacts)
    for number in range(len(dataset.splits["test"])):
        part = judge(number)
        said, found = next(published, None), decode_predictions(part.predictions)
        where = store.locate(f"{folder}/predictions/{number:05d}.parquet")
        if said is None or said.logits.shape != found.logits.shape:
            raise DataError(f"{where}: does not have the rows of test shard {number}; do not use the run")
        if not np.array_equal(said.labels, found.labels):
            raise DataError(f"{where}: its labels are not those of the dataset; do not use the run")
        near = apart(said.logits, found.logits) <= TOLERANCE
        if not near.all():
            row = said.first_row + int(np.argmin(near))
            raise DataError(f"{where}: not what {SAFETENSORS} predicts, first at row {row}; do not use the run")
        total.add(part)
        undecided += _undecided(said.logits)
    if digest_of_rows(total.rows_digest, dataset) != run.test_digest:
        raise DataError(f"{store.locate(folder)}: was judged by other test images than the dataset's; do not use it")
    require_agreement(total.differences)
    evaluation = report.evaluation
    files = {name: run.artifacts[name] for name in prediction_files(run.artifacts)}
    if evaluation.forms.keys() != set(FORMS) or evaluation.predictions != files:
        where = f"{store.locate(folder)}/report.json"
        raise DataError(f"{where}: its forms or predictions are not the manifest's; do not use the run")
    for name, form in evaluation.forms.items():
        made = run.artifacts[name].model_dump() | {"correct": total.correct[name]}
        if abs(form.correct - total.correct[name]) <= undecided:
            made["correct"] = form.correct
        _require_equal(store, run, {name: form.model_dump(include=set(made))}, {name: made})
    return f"predictions: what the model says of all {dataset.rows('test'):,} test images of {dataset.dataset}"


def _undecided(logits: Logits) -> int:
    """Of how many images another machine's rounding may find another class the likeliest."""
    second, first = np.partition(logits, -2, axis=1)[:, -2:].T
    return int((first - second <= 2 * TOLERANCE * np.maximum(np.abs(logits).max(axis=1), 1)).sum())


def _render_again(store: Store, run: RunManifest, dataset: Manifest, report: Report) -> Found:
    """Have page and card made of the report again. Other versions of this code may make others of it."""
    mistakes, _ = pick_rows(store, dataset, "test", [mistake.row for mistake in report.evaluation.mistakes])
    again = {PAGE: render_html(report, list(mistakes)), CARD: render_card(report, dataset.image_shape[0])}
    other = [name for name, text in again.items() if artifact_of(text.encode()) != run.artifacts[name]]
    if not other:
        return Found(f"{PAGE} and {CARD} say what report.json says")
    if run.made_by != code_of_pages():
        names = " and ".join(other)
        return Found(f"{names}: not compared, other versions than these here have written the run", names)
    where = store.locate(f"{run_folder(run.run_id)}/{other[0]}")
    raise DataError(f"{where}: is not what report.json gives; it was edited, do not use the run")
