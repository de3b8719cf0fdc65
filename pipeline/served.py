"""What a URL names in a store of models, and the model there, ready to predict."""

import re
from dataclasses import dataclass

from lenet.model import LeNet
from pipeline.artifacts import SAFETENSORS, predictor, read_checked
from pipeline.checkpoint import decode_model
from pipeline.errors import DataError
from pipeline.idx import Pixels
from pipeline.metrics import Logits
from pipeline.pictures import CONVERSION
from pipeline.predict import Form, Invert
from pipeline.promotion import PromoteConfig
from pipeline.publish import require_run, run_folder
from pipeline.registry import (
    Version,
    champion_key,
    require_champion,
    require_version,
    version_folder,
    version_of,
)
from pipeline.shards import find_manifest
from pipeline.storage import Store, open_store

DEFAULT_MODEL: str = PromoteConfig.model_fields["model"].default


@dataclass(frozen=True)
class Served:
    """A model that is ready to predict, with what has to be said of where it is from."""

    place: str
    version: Version | None
    run_id: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int]
    model_sha256: str
    model: LeNet
    url: str  # of the same, whoever is the champion later
    of_pictures: bool = False  # it was trained on what pipeline.pictures makes of pictures

    def form(self, invert: Invert) -> Form:
        """How to make a picture what the model was trained on, if that is asked of it."""
        if not self.of_pictures:
            return invert
        return "as trained, inverted" if invert == "yes" else "as trained"

    def predict(self, images: Pixels) -> Logits:
        """Logits float32 (b, n_classes) of images uint8 (b, height, width)."""
        return predictor(self.model)(images)


@dataclass(frozen=True)
class Place:
    """A published run, and the version that it was asked for as, if it was."""

    store: Store
    run_id: str
    version: Version | None

    def __str__(self) -> str:
        return self.run_id if self.version is None else str(self.version)

    @property
    def url(self) -> str:
        """Names it, whoever is the champion later."""
        version = self.version
        named = run_folder(self.run_id) if version is None else version_folder(version.model, version.version)
        return self.store.locate(named)


def find_place(url: str) -> Place:
    """What a URL means: a store (the champion of its model "lenet"), or in a store runs/<id>, models/<name> (its
    champion) or models/<name>/versions/<n>, with the name of a file behind it or not.

    Raises DataError for a version that is not there, ConfigError where there is no champion.
    """
    trimmed = re.sub(r"/(manifest|report|version|champion|decision)\.(json|html)$", "", url.rstrip("/"))
    # A store may lie in a folder of such a name, so what is in it decides; and it may be where we are.
    if found := re.fullmatch(r"(?:(.*[^/])/)?runs/([^/]+)(/[^/]+)?", trimmed):
        store = open_store(found[1] or ".")
        if store.exists(f"{run_folder(found[2])}/manifest.json"):
            return Place(store, found[2], None)
        if not found[3] and not open_store(trimmed).keys("models"):
            raise DataError(f"{store.locate(run_folder(found[2]))}: no published run; lenet runs lists them")
    if found := re.fullmatch(r"(?:(.*[^/])/)?models/([^/]+)/versions/(\d+)", trimmed):
        store = open_store(found[1] or ".")
        version = require_version(store, found[2], int(found[3]))
        return Place(store, version.run_id, version)
    if found := re.fullmatch(r"(?:(.*[^/])/)?models/([^/]+)", trimmed):
        store = open_store(found[1] or ".")
        there = store.exists(champion_key(found[2])) or store.keys(f"models/{found[2]}/versions")
        if there or not open_store(trimmed).keys("models"):
            return _champion_of(store, found[2], url)
    return _champion_of(open_store(trimmed), DEFAULT_MODEL, url)


def open_model(url: str) -> Served:
    """The model at a URL, as `find_place` reads it, once its bytes are the manifest's. Raises DataError if not."""
    place = find_place(url)
    manifest = require_run(place.store, place.run_id)
    check_version(place)
    dataset = find_manifest(place.store, manifest.dataset_folder)
    artifact = manifest.artifacts[SAFETENSORS]
    data = read_checked(place.store, f"{run_folder(place.run_id)}/{SAFETENSORS}", artifact)
    return Served(
        place=str(place),
        version=place.version,
        run_id=place.run_id,
        classes=manifest.classes,
        image_shape=manifest.image_shape,
        model_sha256=artifact.sha256,
        model=decode_model(data),
        url=place.url,
        of_pictures=dataset is not None and CONVERSION.keys() <= dataset.conversion.keys(),
    )


def check_version(place: Place) -> None:
    """DataError unless the run's manifest is the one that was registered, and the version and the champion say of the
    run what that says."""
    store, version = place.store, place.version
    if version is None:
        return
    made = version_of(store, version.model, version.version, place.run_id)
    if version.run_id == place.run_id and version.manifest_sha256 != made.manifest_sha256:
        raise DataError(
            f"{store.locate(made.manifest)}: its sha256 is not that of {version}; it was altered, do not use it"
        )
    if version != made:
        key = f"{version_folder(version.model, version.version)}/version.json"
        raise DataError(
            f"{store.locate(key)}: is not what run {place.run_id} gives; it or {champion_key(version.model)} was "
            "altered, do not use it"
        )


def _champion_of(store: Store, model: str, asked: str) -> Place:
    champion = require_champion(store, model, asked)
    return Place(store, champion.run_id, require_version(store, model, champion.version))
