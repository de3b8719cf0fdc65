"""What may go from a store after a while: working copies of published runs, and runs that nobody needs.

A version of a model, whoever was or is champion, and the latest run stay for ever, with all that proves and reproduces
them: what is published, the record, the receipts and the candidate. So do datasets. Of all else, what is old goes.

It removes what readers start at first: a manifest before what it names, a record before the receipts. Wherever it is
killed, readers see a whole run or none, and the next retention goes on with the rest.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field

from pipeline.documents import parse_document, read_document
from pipeline.index import READERS, refresh_index
from pipeline.publish import read_latest, run_folder
from pipeline.registry import Champion, Version
from pipeline.storage import StorageConfig, Store, open_store
from pipeline.train import staging
from pipeline.worker import RAY_FOLDER

log = logging.getLogger(__name__)

# In a run's own folder: of no use once the run is published, which has copies of the latter two.
WORKING = (RAY_FOLDER, "export", "predictions")


class RetentionConfig(StorageConfig):
    """What is old, and whether it goes."""

    keep_days: int = Field(
        30, ge=1, le=36_500, description="Runs that anything was written of in this many days stay as they are."
    )
    keep_last: int = Field(20, ge=0, le=1_000_000, description="So many of the newest runs stay as they are anyway.")
    delete: bool = Field(
        False, description="Remove what is listed. Without it, nothing is removed: it only lists what would be."
    )


@dataclass(frozen=True)
class RunFacts:
    """What decides about a run.

    `active` is when anything of it was last written. `held` says as what it is needed: versions of models by name, the
    latest run. Sizes are in bytes: of everything, and of the working copies that are in the store.
    """

    run_id: str
    active: datetime
    published: bool
    held: tuple[str, ...] = ()
    size: int = 0
    working: dict[str, int] = field(default_factory=dict)


class Removal(BaseModel):
    """What goes of a run, and why. `steps` are keys, removed in this order, folders with all that is in them; `whole`
    says that nothing is left of the run afterwards. `size` is in bytes, `active` when anything of it was last written.
    """

    model_config = ConfigDict(frozen=True)

    run_id: str
    active: datetime
    what: str
    whole: bool
    steps: tuple[str, ...]
    size: int
    why: str


class Plan(BaseModel):
    """What goes, the oldest run first, and why each other run stays as it is; `done` once it has gone."""

    model_config = ConfigDict(frozen=True)

    removals: list[Removal]
    kept: dict[str, str]
    done: bool = False

    @property
    def size(self) -> int:
        """Bytes that go."""
        return sum(removal.size for removal in self.removals)

    def __str__(self) -> str:
        whole = sum(removal.whole for removal in self.removals)
        parts = len(self.removals) - whole
        return (
            f"{'removed' if self.done else 'to remove'}: {whole} {'run' if whole == 1 else 'runs'} and the working "
            f"copies of {parts} more, {self.size / 2**20:.1f} MiB; runs left alone: {len(self.kept)}"
        )

    def table(self) -> list[dict[str, str]]:
        """A row for each removal."""
        return [
            {
                "run": removal.run_id,
                "what": removal.what,
                "MiB": f"{removal.size / 2**20:.1f}",
                "why": removal.why,
            }
            for removal in self.removals
        ]


def retain(config: RetentionConfig, now: datetime | None = None) -> Plan:
    """Plan what goes from the store, and, if `delete` says so, remove it. `now` is the time that ages are counted to,
    the present if not given."""
    store = open_store(config.storage)
    found = plan(gather(store), config, now or datetime.now(UTC))
    if not config.delete:
        return found
    return remove(store, found)


def plan(runs: Iterable[RunFacts], config: RetentionConfig, now: datetime) -> Plan:
    """What goes of these runs, and why the others stay. A plan made after some of it was carried out has the rest."""
    removals, kept = [], {}
    newest_first = sorted(runs, key=lambda run: (run.active, run.run_id), reverse=True)
    for place, run in enumerate(newest_first):
        age = (now - run.active).days
        if run.active > now - timedelta(days=config.keep_days):
            kept[run.run_id] = f"of the last {config.keep_days} days"
        elif place < config.keep_last:
            kept[run.run_id] = f"one of the {config.keep_last} newest"
        elif not run.held:
            why = "is no version of a model" if run.published else "never finished"
            removals.append(
                Removal(
                    run_id=run.run_id,
                    active=run.active,
                    what="all of it",
                    whole=True,
                    steps=_whole(run.run_id),
                    size=run.size,
                    why=f"it {why}, and is {age} days old",
                )
            )
        elif run.published and run.working:
            removals.append(
                Removal(
                    run_id=run.run_id,
                    active=run.active,
                    what=", ".join(run.working),
                    whole=False,
                    steps=tuple(f"{staging(run.run_id)}/{name}" for name in run.working),
                    size=sum(run.working.values()),
                    why=f"it is published, and {age} days old",
                )
            )
        else:
            kept[run.run_id] = " and ".join(run.held)
    return Plan(removals=removals[::-1], kept=kept)


def gather(store: Store) -> list[RunFacts]:
    """The facts about every run there is anything of, from listings, the registry and the pointer to the latest."""
    sizes: dict[str, int] = defaultdict(int)
    working: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    active: dict[str, datetime] = {}
    published = set()
    for top in ("staging", "runs"):
        for key, (size, written) in store.listing(top).items():
            _, run_id, *rest = key.split("/")
            if not rest:
                continue  # runs/latest.json
            sizes[run_id] += size
            active[run_id] = max(written, active.get(run_id, written))
            if top == "staging" and len(rest) > 1 and rest[0] in WORKING:
                working[run_id][rest[0]] += size
            if key == f"{run_folder(run_id)}/manifest.json":
                published.add(run_id)
    held = _Holders(store).look()
    return [
        RunFacts(run_id, when, run_id in published, held.get(run_id, ()), sizes[run_id], dict(working[run_id]))
        for run_id, when in active.items()
    ]


def remove(store: Store, found: Plan) -> Plan:
    """Carry a plan out; what was carried out of it. A run that has become needed since it was made is left alone, and
    one that goes on: its lease would be newer or, where it is published, publishing.json."""
    holders = _Holders(store)
    done, kept = [], dict(found.kept)
    try:
        for removal in found.removals:
            if removal.whole and (held := holders.look().get(removal.run_id)):
                kept[removal.run_id] = " and ".join(held)
                continue
            if (
                removal.whole
                and store.last_written(staging(removal.run_id), run_folder(removal.run_id)) > removal.active
            ):
                kept[removal.run_id] = "written of since this was planned"
                continue
            for key in removal.steps:
                store.delete(key)
            done.append(removal)
            log.info("%s: removed %s, as %s", removal.run_id, removal.what, removal.why)
    finally:
        if any(removal.whole for removal in done):
            refresh_index(store)
    return Plan(removals=done, kept=kept, done=True)


def _whole(run_id: str) -> tuple[str, ...]:
    """All of a run, in the order in which no reader takes it for a run that is there and damaged."""
    return (f"{run_folder(run_id)}/manifest.json", run_folder(run_id), f"{staging(run_id)}/run.json", staging(run_id))


class _Holders:
    """Which runs are needed, as what. Versions never change, so each look reads only those that are new."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.versions: dict[str, Version] = {}

    def look(self) -> dict[str, tuple[str, ...]]:
        keys = self.store.keys("models")
        new = [key for key in keys if key.endswith("/version.json") and key not in self.versions]
        with ThreadPoolExecutor(READERS) as pool:
            for key, data in zip(new, pool.map(self.store.read, new), strict=True):
                self.versions[key] = parse_document(self.store, key, Version, data)
        held: dict[str, list[str]] = defaultdict(list)
        for version in self.versions.values():
            held[version.run_id].append(f"{version.model} version {version.version}")
        for key in keys:
            if key.endswith("/champion.json"):
                champion = read_document(self.store, key, Champion)
                for run_id in {champion.run_id, *(change.run_id for change in champion.changes)}:
                    held[run_id].append(f"a champion of {champion.model}")
        if latest := read_latest(self.store):
            held[latest.run_id].append("the latest run")
        return {run_id: tuple(names) for run_id, names in held.items()}
