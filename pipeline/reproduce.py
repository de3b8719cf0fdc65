"""Doing a run's training again, to see whether the very same model comes of it."""

import uuid

from pydantic import BaseModel, ConfigDict

from pipeline import run
from pipeline.artifacts import SAFETENSORS
from pipeline.config import config_of
from pipeline.errors import DataError
from pipeline.evaluate import load_model
from pipeline.publish import find_run, run_folder
from pipeline.record import dataset_of, keep_dataset, read_record
from pipeline.storage import Store
from pipeline.train import Training, find_training, staging

# What follows the name of the run that is done again, within the length that a name may have.
NAME_LENGTH = 128


class Reproduction(BaseModel):
    """Whether the bytes of model.safetensors came out the same; if not, how far the weights are apart at most, and what
    was different about the second time."""

    model_config = ConfigDict(frozen=True)

    same: bool
    expected_sha256: str
    found_sha256: str
    largest_difference: float
    differences: list[str]


def reproduce(store: Store, run_id: str, ray_address: str | None = None) -> Reproduction:
    """Train with the parameters, the data and the number of workers of a run, under a name of its own, which is
    forgotten afterwards. DataError for a run whose training has not finished, or whose published model is another."""
    training = find_training(store, run_id)
    if training is None:
        raise DataError(f"{store.locate(staging(run_id))}: no finished training; lenet runs lists the runs")
    published = find_run(store, run_id)
    if published is not None and published.artifacts[SAFETENSORS].sha256 != training.candidate_sha256:
        raise DataError(
            f"{store.locate(run_folder(run_id))}: its model is not the one that the run has trained; do not use it"
        )
    record = read_record(store, run_id)
    again = f"{run_id[: NAME_LENGTH - 15]}-again-{uuid.uuid4().hex[:8]}"
    given = run.parameters_of(record) | {
        "storage": store.url,
        "run_id": again,
        "workers": training.world_size,
        "ray_address": ray_address,
    }
    try:
        if dataset := dataset_of(store, run_id):
            keep_dataset(store, again, dataset)  # so it is read from the store, whatever has become of the source
        config = run.begin(config_of(given, run.RunConfig), again)
        manifest = run.shard(config, run.download(config))
        second = run.train(config, manifest)
        one = load_model(store, training.candidate, training.candidate_sha256).state_dict()
        other = load_model(store, second.candidate, second.candidate_sha256).state_dict()
        now = read_record(store, again)
    finally:
        store.delete(staging(again))
    before = record.versions | record.lineage | _places(training)
    return Reproduction(
        same=training.candidate_sha256 == second.candidate_sha256,
        expected_sha256=training.candidate_sha256,
        found_sha256=second.candidate_sha256,
        largest_difference=max(float((one[name] - other[name]).abs().max()) for name in one),
        differences=[
            f"{name}: {before.get(name, 'not recorded')} then, {value} now"
            for name, value in (now.versions | now.lineage | _places(second)).items()
            if before.get(name) != value
        ],
    )


def _places(training: Training) -> dict[str, str]:
    """Where it trained: on what device, and on how many workers, of which there may have been others in between."""
    counts = {training.world_size, *(epoch.world_size for epoch in training.history)} - {0}
    return {"device": training.device, "workers": " and ".join(map(str, sorted(counts)))}
