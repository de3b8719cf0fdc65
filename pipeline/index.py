"""The page of all runs in a store, index.html at its root: what it links to is beside it, so it opens from a folder, a
bucket or a copy of either.

It is made of what is published, and of nothing else: an index that was lost or damaged is made anew by whoever
publishes next. One small object is read for each run: its version or, of a run that is none, its manifest.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import quote

from markupsafe import Markup

from pipeline.documents import Document, parse_document
from pipeline.drawings import SERIES, Points, draw_accuracies
from pipeline.errors import DataError, StorageError
from pipeline.pages import render_page
from pipeline.publish import Headline, RunManifest, run_folder
from pipeline.registry import Champion, Change, Version, champion_key, version_folder
from pipeline.storage import Store

log = logging.getLogger(__name__)

INDEX = "index.html"
READERS = 16  # objects read at a time
NO_NAME = "not recorded"

Standing = Literal["champion", "was champion", "not promoted", "undecided"]


@dataclass(frozen=True)
class Entry:
    """A line of the index: a run, and as which version it is known if it is one. `why` is what was said when it became
    the champion."""

    run_id: str
    finished: datetime
    accuracy: float
    headline: Headline | None
    report: str | None
    version: int | None = None
    standing: Standing | None = None
    why: str = ""


@dataclass(frozen=True)
class ModelEntries:
    """A model: its versions, the newest first, and every change of its champion, in order."""

    name: str
    entries: list[Entry]
    changes: list[Change]

    @property
    def champion(self) -> Entry | None:
        """The version in use."""
        return next((entry for entry in self.entries if entry.standing == "champion"), None)

    @property
    def datasets(self) -> list[str]:
        """Names of the datasets of its versions."""
        return sorted({_dataset(entry) for entry in self.entries})


@dataclass(frozen=True)
class Entries:
    """All that the index shows: the models by name, and the runs that are no version of any, the newest first."""

    models: list[ModelEntries]
    others: list[Entry]


def refresh_index(store: Store) -> None:
    """`write_index` for whoever has done something that the index shows: that is done, with an index or without, so
    a store that fails now is only warned of."""
    try:
        write_index(store)
    except StorageError as error:
        log.warning("the index of all runs is not up to date: %s", error)


def write_index(store: Store) -> None:
    """Make the index show what is in the store, at the same time as others.

    The page is replaced only if it is still the one that was there before the store was listed. Of several writers, the
    last one has therefore listed after every other has written, and what any of them had published is in its page.
    """
    for current in store.attempts(INDEX):
        entries = read_entries(store)
        page = render_index(entries).encode()
        if page == current or store.replace(INDEX, page, expected=current):
            runs = {entry.run_id for entry in _all(entries)}
            log.info("%d %s listed in %s", len(runs), "run" if len(runs) == 1 else "runs", store.locate(INDEX))
            return


def read_entries(store: Store) -> Entries:
    """What there is to show. What cannot be read is warned of and left out."""
    # In this order: whatever is registered has been published before, so a version's report is in the second list.
    registry, published = set(store.keys("models")), set(store.keys("runs"))
    versions: dict[str, list[Version]] = defaultdict(list)
    champions: dict[str, Champion] = {}
    for key, version in _read_all(store, Version, (key for key in registry if key.endswith("/version.json"))):
        versions[key.split("/")[1]].append(version)
    for key, champion in _read_all(store, Champion, {champion_key(name) for name in versions} & registry):
        champions[key.split("/")[1]] = champion
    registered = {version.run_id for found in versions.values() for version in found}
    manifests = (key for key in published if key.endswith("/manifest.json") and key.split("/")[1] not in registered)
    return Entries(
        models=[
            _model(name, found, champions.get(name), registry, published) for name, found in sorted(versions.items())
        ],
        others=sorted(
            (
                _entry(manifest, published)
                for key, manifest in _read_all(store, RunManifest, manifests)
                if key == f"{run_folder(manifest.run_id)}/manifest.json"  # not of a copy, which is no other run
            ),
            key=lambda entry: (entry.finished, entry.run_id),
            reverse=True,
        ),
    )


def render_index(entries: Entries) -> str:
    """The page. The same entries give the same bytes, and so no time of writing is in it."""
    runs = {entry.run_id: entry.finished for entry in _all(entries)}
    return render_page(
        "index.html.j2",
        models=entries.models,
        others=entries.others,
        runs=len(runs),
        latest=max(runs.values(), default=None),
        charts=[Markup(_chart(model, f"model {number}")) for number, model in enumerate(entries.models)],  # noqa: S704
        signs=[(colour, sign) for colour, _, sign in SERIES],
        dataset_of=_dataset,
    )


def _read_all(store: Store, kind: type[Document], keys: Iterable[str]) -> list[tuple[str, Document]]:
    """What of these objects is whole, with their keys."""
    wanted = sorted(keys)
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda key: _read(store, key), wanted))
    contents = []
    for key, data in zip(wanted, found, strict=True):
        try:
            if data is not None:
                contents.append((key, parse_document(store, key, kind, data)))
        except DataError as error:
            log.warning("%s; so the index leaves it out", error)
    return contents


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except StorageError:
        if store.exists(key):
            raise
        return None  # removed since it was listed


def _model(
    name: str, versions: list[Version], champion: Champion | None, registry: set[str], published: set[str]
) -> ModelEntries:
    changes = champion.changes if champion is not None else []
    entries = []
    for version in sorted(versions, key=lambda version: version.version, reverse=True):
        became = [change for change in changes if change.version == version.version]
        standing: Standing = "undecided"
        if champion is not None and champion.version == version.version:
            standing = "champion"
        elif became:
            standing = "was champion"
        elif f"{version_folder(name, version.version)}/decision.json" in registry:
            standing = "not promoted"
        why = _why(became[-1]) if became else ""
        entries.append(_entry(version, published, version.version, standing, why))
    return ModelEntries(name, entries, changes)


def _entry(
    found: Version | RunManifest,
    published: set[str],
    version: int | None = None,
    standing: Standing | None = None,
    why: str = "",
) -> Entry:
    report = f"{run_folder(found.run_id)}/report.html"
    return Entry(
        run_id=found.run_id,
        finished=found.finished.astimezone(UTC),
        accuracy=found.accuracy,
        headline=found.headline,
        report=quote(report) if report in published else None,
        version=version,
        standing=standing,
        why=why,
    )


def _why(change: Change) -> str:
    if change.by == "rule" and change.comparison is not None:
        return "; ".join(change.comparison.reasons)
    return "by rollback" if change.by == "rollback" else "by hand"


def _chart(model: ModelEntries, salt: str) -> str:
    """Its accuracies, a series for each dataset: those of different ones say nothing about each other."""
    series: dict[str, list[tuple[datetime, float]]] = {name: [] for name in model.datasets}
    for entry in reversed(model.entries):
        series[_dataset(entry)].append((entry.finished, entry.accuracy))
    accuracies = {entry.version: entry.accuracy for entry in model.entries}
    champions: Points = [
        (change.when, accuracies[change.version]) for change in model.changes if change.version in accuracies
    ]
    return draw_accuracies(list(series.values()), champions, salt)


def _dataset(entry: Entry) -> str:
    return entry.headline.dataset if entry.headline is not None else NO_NAME


def _all(entries: Entries) -> list[Entry]:
    return [*(entry for model in entries.models for entry in model.entries), *entries.others]
