"""The report of a run: as data (report.json), and as one page that needs nothing but itself (report.html)."""

import base64
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field
from tensorboardX import SummaryWriter

from lenet.model import LayerRow
from pipeline.checkpoint import History
from pipeline.drawings import BLUE, GREEN, GREY, ORANGE, draw_curves, draw_reliability
from pipeline.evaluate import Evaluation
from pipeline.idx import Pixels
from pipeline.metrics import Mistake
from pipeline.pages import png_uri, render_page
from pipeline.promotion import Comparison
from pipeline.shards import Manifest
from pipeline.train import Training

SVG = "http://www.w3.org/2000/svg"
# Of EpochMetrics.
CURVES = ("train_loss", "train_accuracy", "held_out_loss", "held_out_accuracy", "images_per_second")


class DatasetFacts(BaseModel):
    """Which data: name, version digest (sha256, hex), rows by split, licence and homepage; how many images of a
    held-out split are training images too, None of runs from before that was told."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    rows: dict[str, int]
    licence: str
    homepage: str
    duplicates: dict[str, int] | None = None

    @property
    def leaks(self) -> dict[str, int]:
        """The held-out splits of which there are such images, and how many."""
        return {split: count for split, count in (self.duplicates or {}).items() if count}


class Report(BaseModel):
    """What a run did and what came of it. A function of the run's receipts and of what publishes it alone, so every
    retry by that writes the same."""

    model_config = ConfigDict(frozen=True)

    format_version: int
    run_id: str
    finished: datetime
    parameters: dict[str, Any]
    dataset: DatasetFacts
    layers: list[LayerRow]
    history: History = Field(min_length=1)
    world_size: int
    device: str
    training_seconds: float
    evaluation: Evaluation
    comparison: Comparison
    versions: dict[str, str]
    lineage: dict[str, str]


@dataclass(frozen=True)
class Picture:
    """A mistake and its image as a data URI."""

    mistake: Mistake
    uri: str


def facts_of(manifest: Manifest) -> DatasetFacts:
    """What a report says of a dataset."""
    return DatasetFacts(
        name=manifest.dataset,
        digest=manifest.digest,
        rows={split: manifest.rows(split) for split in manifest.splits},
        licence=manifest.licence,
        homepage=manifest.homepage,
        duplicates=manifest.report.duplicates,
    )


def render_html(report: Report, mistakes: list[Pixels]) -> str:
    """One self-contained page; `mistakes` are the images uint8 (height, width) of evaluation.mistakes, in order.

    The same report gives the same bytes. Everything in it is escaped: class names and run ids are anybody's text.
    """
    evaluation = report.evaluation
    pictures = [Picture(m, png_uri(pixels)) for m, pixels in zip(evaluation.mistakes, mistakes, strict=True)]
    return render_page(
        "report.html.j2",
        report=report,
        evaluation=evaluation,
        finished=report.finished.astimezone(UTC),
        names=[metrics.name for metrics in evaluation.classes],
        # Drawn from numbers and labels of our own, so there is nothing to escape.
        curves=[
            Markup(draw_curves(report.history, {"train loss": ("train_loss", BLUE)}, top=None)),  # noqa: S704
            Markup(_draw_accuracies(report.history)),  # noqa: S704
        ],
        reliability=Markup(draw_reliability(evaluation.calibration)),  # noqa: S704
        pictures=pictures,
        homepage=report.dataset.homepage if report.dataset.homepage.startswith("https://") else None,
        parameters_total=sum(layer.parameters for layer in report.layers),
    )


def render_events(history: History) -> bytes:
    """The curves as a TensorBoard event file, epochs as steps."""
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for epoch in history:
                for name in CURVES:
                    writer.add_scalar(name, getattr(epoch, name), epoch.epoch)
        [file] = Path(folder).iterdir()
        return file.read_bytes()


def curves_image(history: History) -> str:
    """The accuracies by epoch as a picture of its own, in a data URI."""
    # A page's ink is not known to a picture in it: grey reads on light and on dark.
    svg = _draw_accuracies(history).replace("<svg ", f'<svg xmlns="{SVG}" color="{GREY}" ', 1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def render_summary(run_id: str, training: Training, evaluation: Evaluation) -> str:
    """The run in a few lines of Markdown."""
    last = training.history[-1]
    return f"""\
# {run_id}

| | |
| --- | --- |
| Test accuracy | **{evaluation.accuracy:.2%}** |
| 95% interval | {evaluation.accuracy_low:.2%} to {evaluation.accuracy_high:.2%} |
| Train accuracy, last epoch | {last.train_accuracy:.2%} |
| Train loss, last epoch | {last.train_loss:.4f} |
| Calibration error | {evaluation.ece:.4f} |
| Dataset version | {evaluation.dataset_digest[:12]} |
| Epochs | {len(training.history)} |
| Workers | {training.world_size} on {training.device} |
| Training time | {training.wall_seconds:.0f} s |
"""


def _draw_accuracies(history: History) -> str:
    curves = {
        "train accuracy": ("train_accuracy", ORANGE),
        f"{history[-1].held_out} accuracy": ("held_out_accuracy", GREEN),
    }
    return draw_curves(history, curves, top=1)
