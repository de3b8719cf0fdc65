"""The report of a run: as data (report.json), and as one page that needs nothing but itself (report.html)."""

import base64
import io
import re
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image
from pydantic import BaseModel, ConfigDict
from tensorboardX import SummaryWriter

from pipeline.checkpoint import History
from pipeline.evaluate import Evaluation
from pipeline.idx import Pixels
from pipeline.metrics import Mistake
from pipeline.promotion import Comparison
from pipeline.train import Training

# Of EpochMetrics.
CURVES = ("train_loss", "train_accuracy", "held_out_loss", "held_out_accuracy", "images_per_second")
# Mid-tones that read on white and on near-black alike.
BLUE, ORANGE, GREEN = "#4a86d8", "#d9792b", "#3f9c6b"


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
    comparison: Comparison
    versions: dict[str, str]
    lineage: dict[str, str]


@dataclass(frozen=True)
class Picture:
    """A mistake and its image as a data URI."""

    mistake: Mistake
    uri: str


def render_html(report: Report, mistakes: list[Pixels]) -> str:
    """One self-contained page; `mistakes` are the images uint8 (height, width) of evaluation.mistakes, in order.

    The same report gives the same bytes. Everything in it is escaped: class names and run ids are anybody's text.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda value, digits=1: f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"
    evaluation = report.evaluation
    pictures = [Picture(m, _png(pixels)) for m, pixels in zip(evaluation.mistakes, mistakes, strict=True)]
    held_out = report.history[-1].held_out
    accuracies = {
        "train accuracy": ("train_accuracy", ORANGE),
        f"{held_out} accuracy": ("held_out_accuracy", GREEN),
    }
    template = environment.get_template("report.html.j2")
    return template.render(
        report=report,
        evaluation=evaluation,
        finished=report.finished.astimezone(UTC),
        names=[metrics.name for metrics in evaluation.classes],
        # Drawn from numbers and labels of our own, so there is nothing to escape.
        curves=[
            Markup(_draw(report.history, {"train loss": ("train_loss", BLUE)}, top=None)),  # noqa: S704
            Markup(_draw(report.history, accuracies, top=1)),  # noqa: S704
        ],
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
| Dataset version | {evaluation.dataset_digest[:12]} |
| Epochs | {len(training.history)} |
| Workers | {training.world_size} on {training.device} |
| Training time | {training.wall_seconds:.0f} s |
"""


def _draw(history: History, curves: dict[str, tuple[str, str]], top: float | None) -> str:
    """An SVG of fields of EpochMetrics by epoch: label to (field, colour). Its text takes the page's colour."""
    # Here and not above: matplotlib takes 0.6 s, and only a report needs it.
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # The salt makes the ids in the SVG the same every time, and others in each drawing of a page.
    style: Any = {"svg.hashsalt": ",".join(curves), "svg.fonttype": "none", "font.size": 11}
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.4, 3.2), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        for (label, (field, colour)), line in zip(curves.items(), ("o-", "s--"), strict=False):
            values = [getattr(epoch, field) for epoch in history]
            axes.plot([epoch.epoch for epoch in history], values, line, color=colour, label=label, ms=4)
        axes.set_ylim(0, top)
        axes.set_xlabel("epoch")
        # Half an epoch on each side: without it a single epoch gets ticks at fractions of an epoch.
        axes.set_xlim(history[0].epoch - 0.5, history[-1].epoch + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text.getvalue())
    # Nothing points at the groups' ids, and they are the same in every drawing: an id may stand once in a page.
    svg = svg.replace('<g id="', '<g data-part="')
    # matplotlib's black ink becomes the page's ink, so that one drawing serves light and dark.
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")


def _png(pixels: Pixels) -> str:
    """A grey image uint8 (height, width) as a PNG data URI."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
