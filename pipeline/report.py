"""The report of a run: everything in it as data (report.json), and as one page that needs nothing else (report.html)."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.checkpoint import History
from pipeline.evaluate import Evaluation
from pipeline.idx import Pixels


class DatasetFacts(BaseModel):
    """Which data: name, version digest (sha256, hex), rows by split, licence and homepage."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    rows: dict[str, int]
    licence: str
    homepage: str


class LayerFacts(BaseModel):
    """One line of the model's layer table."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int


class Report(BaseModel):
    """What a run did and what came of it. A function of the run's receipts alone, so every retry writes the same."""

    model_config = ConfigDict(frozen=True)

    format_version: int
    run_id: str
    finished: datetime
    parameters: dict[str, Any]
    dataset: DatasetFacts
    layers: list[LayerFacts]
    history: History
    world_size: int
    device: str
    training_seconds: float
    evaluation: Evaluation
    versions: dict[str, str]


def render_html(report: Report, mistakes: list[Pixels]) -> str:
    """One self-contained page; `mistakes` are the images uint8 (height, width) of evaluation.mistakes, in order."""
    raise NotImplementedError
