"""The models in a store: every run a version that nobody changes, one version the champion.

    models/<name>/versions/<n>/version.json     conditional create: the run that this version is
    models/<name>/versions/<n>/decision.json    conditional create: why it became the champion, or why not
    models/<name>/champion.json                 conditional replace: which version is, and all that were

There is no server: whoever can write to the store can publish, at the same time as others.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.artifacts import SAFETENSORS
from pipeline.documents import find_document, keep_document, parse_document, read_document
from pipeline.errors import ConfigError, DataError
from pipeline.evaluate import Evaluation
from pipeline.predictions import Predictions, read_predictions
from pipeline.promotion import Comparison, PromoteConfig, compare, first, incomparable
from pipeline.publish import Headline, find_run, read_report, require_run, run_folder
from pipeline.storage import Store, sha256

log = logging.getLogger(__name__)


class Version(BaseModel):
    """One version of a model: the published run that it is, by the sha256 (hex) of its manifest."""

    model_config = ConfigDict(frozen=True)

    model: str
    version: int
    run_id: str
    manifest: str
    manifest_sha256: str
    accuracy: float
    test_digest: str
    finished: datetime
    headline: Headline | None = None

    def __str__(self) -> str:
        return f"{self.model} version {self.version} ({self.run_id})"


class Change(BaseModel):
    """A version became the champion: by the rule, by hand, or because a later one was taken back."""

    model_config = ConfigDict(frozen=True)

    version: int
    run_id: str
    when: datetime
    by: Literal["rule", "hand", "rollback"]
    comparison: Comparison | None = None


class Champion(BaseModel):
    """The version in use, and every change that led to it, in order."""

    model_config = ConfigDict(frozen=True)

    model: str
    version: int
    run_id: str
    changes: list[Change]


def list_models(store: Store) -> list[str]:
    """Names under which there is a version."""
    return sorted({key.split("/")[1] for key in store.keys("models") if key.endswith("/version.json")})


def list_versions(store: Store, model: str) -> list[Version]:
    """All versions of a model, in order."""
    keys = [key for key in store.keys(f"models/{model}/versions") if key.endswith("/version.json")]
    return sorted((read_document(store, key, Version) for key in keys), key=lambda v: v.version)


def require_version(store: Store, model: str, number: int) -> Version:
    """One version; DataError when there is none of that number."""
    key = f"{version_folder(model, number)}/version.json"
    if not store.exists(key):
        raise DataError(f"{store.locate(f'models/{model}')}: has no version {number}; lenet models lists them")
    return read_document(store, key, Version)


def version_folder(model: str, number: int) -> str:
    """Key of a version's folder."""
    return f"models/{model}/versions/{number}"


def find_champion(store: Store, model: str) -> Champion | None:
    """The champion of a model; None before the first."""
    key = champion_key(model)
    return find_document(store, key, Champion)


def require_champion(store: Store, model: str, asked: str | None = None) -> Champion:
    """The champion of a model; ConfigError, about what was asked for, before the first."""
    champion = find_champion(store, model)
    if champion is None:
        others = ", ".join(f"models/{name}" for name in list_models(store) if name != model)
        rule = f"there is no champion of {model}"
        remedy = f"name {others} in it" if others else "train one, or name a run's folder"
        if not (store.keys("models") or store.keys("runs")):
            rule, remedy = "there is no store with a model", "name the store, e.g. ./store, or ./store/models/NAME"
        raise ConfigError("model", str(store) if asked is None else asked, rule, remedy)
    return champion


def champion_key(model: str) -> str:
    """Key of the alias."""
    return f"models/{model}/champion.json"


def register(store: Store, model: str, run_id: str) -> Version:
    """Make a published run a version of the model, or find that it is one. Versions are numbered from 1, without gaps.

    Whoever creates a number first has it. A second process with the same run, however slow, starts at a number not
    above that of the first, and creating the very same bytes again is no error: so a run is one version.
    """
    known = list_versions(store, model)
    for version in known:
        if version.run_id == run_id:
            return version
    for number in count(len(known) + 1):
        version = version_of(store, model, number, run_id)
        content = version.model_dump_json(indent=2).encode()
        if store.create(f"{version_folder(model, number)}/version.json", content):
            return version
    raise AssertionError("count() does not end")


def version_of(store: Store, model: str, number: int, run_id: str) -> Version:
    """What a published run is as this version. DataError when there is no such run."""
    manifest = require_run(store, run_id)
    key = f"{run_folder(run_id)}/manifest.json"
    return Version(
        model=model,
        version=number,
        run_id=run_id,
        manifest=key,
        manifest_sha256=sha256(store.read(key)),
        accuracy=manifest.accuracy,
        test_digest=manifest.test_digest,
        finished=manifest.finished,
        headline=manifest.headline,
    )


def held_against_champion(
    store: Store, config: PromoteConfig, evaluation: Evaluation, predictions: Callable[[], Iterator[Predictions]]
) -> Comparison:
    """What the rule says of a model with this verdict and these predictions of the test split."""
    champion = find_champion(store, config.model)
    return _judge(store, config, champion, evaluation, predictions)


def promote(store: Store, config: PromoteConfig, version: Version) -> Comparison:
    """Make a version the champion if the rule says so; what it said. Asked again, it says the same.

    The rule is asked again whenever another champion came between, so of many at once the best is left.
    """
    if decided := find_decision(store, version):
        return decided
    report = read_report(store, version.run_id)
    folder, artifacts = run_folder(version.run_id), require_run(store, version.run_id).artifacts

    comparison = first(config)

    def decide(champion: Champion | None) -> Change | None:
        nonlocal comparison
        if champion is not None:
            for change in champion.changes:
                if change.version == version.version and change.comparison is not None:
                    comparison = change.comparison
                    return None
            if champion.version == version.version:  # before the rule was asked: it would be held against itself
                comparison = Comparison(promoted=True, reasons=["it was made the champion by hand"])
                return None
        comparison = _judge(
            store, config, champion, report.evaluation, lambda: read_predictions(store, folder, artifacts)
        )
        return _change(version, "rule", comparison) if comparison.promoted else None

    _move(store, version.model, decide)
    decision = f"{version_folder(version.model, version.version)}/decision.json"
    decided = keep_document(store, decision, comparison)
    became = "is the new champion" if decided.promoted else "is registered and the champion stays"
    log.info("%s %s: %s", version, became, "; ".join(decided.reasons))
    return decided


def find_decision(store: Store, version: Version) -> Comparison | None:
    """What the rule said of a version; None while it was not asked."""
    key = f"{version_folder(version.model, version.version)}/decision.json"
    return find_document(store, key, Comparison)


def promote_by_hand(store: Store, model: str, number: int) -> Champion:
    """Make a version the champion whatever the rule says. DataError when there is no such version."""
    version = require_version(store, model, number)

    def decide(champion: Champion | None) -> Change | None:
        return None if champion is not None and champion.version == number else _change(version, "hand")

    _move(store, model, decide)
    return require_champion(store, model)


def roll_back(store: Store, model: str) -> Champion:
    """Make the version that was champion before this one the champion again. DataError when there was none."""

    def decide(champion: Champion | None) -> Change:
        before: list[Change] = []
        for change in champion.changes if champion else []:
            if change.by == "rollback":
                before.pop()
            else:
                before.append(change)
        if len(before) < 2:
            raise DataError(f"{store.locate(champion_key(model))}: no champion came before; promote a version by hand")
        return _change(require_version(store, model, before[-2].version), "rollback")

    _move(store, model, decide)
    return require_champion(store, model)


def _judge(
    store: Store,
    config: PromoteConfig,
    champion: Champion | None,
    evaluation: Evaluation,
    predictions: Callable[[], Iterator[Predictions]],
) -> Comparison:
    if champion is None:
        return first(config)
    name = f"{champion.model} version {champion.version} ({champion.run_id})"
    try:
        old = read_report(store, champion.run_id).evaluation
        if old.test_digest != evaluation.test_digest:
            return incomparable(name, "the champion was judged by other test images")
        its_artifacts = require_run(store, champion.run_id).artifacts
        theirs = _right(read_predictions(store, run_folder(champion.run_id), its_artifacts))
        if (len(theirs), len(old.classes)) != (evaluation.images, len(evaluation.classes)):
            raise DataError(f"{store.locate(run_folder(champion.run_id))}: has predictions of {len(theirs):,} images")
    except DataError as error:  # what is wrong with it is no reason not to publish others
        return incomparable(name, f"the champion cannot be read ({error})")
    mine = _right(predictions())
    found = compare(config, name, old, evaluation, int((theirs & ~mine).sum()), int((mine & ~theirs).sum()))
    if found.promoted and (version := _taken_back(store, champion, evaluation.candidate_sha256)):
        why = f"it is, byte for byte, version {version}, which is champion no more; promote it by hand if it should be"
        return found.model_copy(update={"promoted": False, "reasons": [why]})
    return found


def _taken_back(store: Store, champion: Champion, model_sha256: str) -> int | None:
    """The version with these weights that was champion and is not. It would win again, and each night's run of the same
    seed is it again."""
    for change in champion.changes:
        if change.version == champion.version:
            continue
        with contextlib.suppress(DataError):  # damaged
            run = find_run(store, change.run_id)
            if run is not None and run.artifacts[SAFETENSORS].sha256 == model_sha256:
                return change.version
    return None


def _right(parts: Iterator[Predictions]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether each test image is recognised: a byte for each, however they are sharded."""
    return np.concatenate([part.right for part in parts])


def _change(version: Version, by: Literal["rule", "hand", "rollback"], comparison: Comparison | None = None) -> Change:
    return Change(version=version.version, run_id=version.run_id, when=datetime.now(UTC), by=by, comparison=comparison)


def _move(store: Store, model: str, decide: Callable[[Champion | None], Change | None]) -> None:
    """Ask `decide` about the champion that is, and make the change; again if another was quicker."""
    key = champion_key(model)
    for current in store.attempts(key):
        champion = None if current is None else parse_document(store, key, Champion, current)
        change = decide(champion)
        if change is None:
            return
        changes = [*(champion.changes if champion else []), change]
        moved = Champion(model=model, version=change.version, run_id=change.run_id, changes=changes)
        if store.replace(key, moved.model_dump_json(indent=2).encode(), expected=current):
            return
