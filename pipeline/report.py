"""The report of a run: as data (report.json), and as one page that needs nothing but itself (report.html)."""

import base64
import io
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image
from pydantic import BaseModel, ConfigDict

from pipeline.checkpoint import History
from pipeline.evaluate import Evaluation, Mistake
from pipeline.idx import Pixels

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
    versions: dict[str, str]


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
    environment.filters["percent"] = lambda value, digits=1: f"{100 * value:.{digits}f} %"
    evaluation = report.evaluation
    pictures = [Picture(m, _png(pixels)) for m, pixels in zip(evaluation.mistakes, mistakes, strict=True)]
    template = environment.get_template("report.html.j2")
    return template.render(
        report=report,
        evaluation=evaluation,
        names=[metrics.name for metrics in evaluation.classes],
        curves=Markup(_curves(report.history)),  # noqa: S704 - drawn from numbers alone
        pictures=pictures,
        homepage=report.dataset.homepage if report.dataset.homepage.startswith("https://") else None,
        parameters_total=sum(layer.parameters for layer in report.layers),
    )


def _curves(history: History) -> str:
    """Train loss, train accuracy and test accuracy by epoch as SVG; its text takes the page's colour."""
    # Here and not above: matplotlib takes 0.6 s, and only a report needs it.
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [epoch.epoch for epoch in history]
    style: Any = {"svg.hashsalt": "lenet", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        figure.patch.set_alpha(0)
        loss, accuracy = figure.subplots(1, 2)
        loss.plot(epochs, [e.train_loss for e in history], "o-", color=BLUE, label="train loss", ms=4)
        accuracy.plot(epochs, [e.train_accuracy for e in history], "o-", color=ORANGE, label="train accuracy", ms=4)
        accuracy.plot(epochs, [e.test_accuracy for e in history], "s--", color=GREEN, label="test accuracy", ms=4)
        loss.set_ylim(bottom=0)
        accuracy.set_ylim(0, 1)
        for axes in (loss, accuracy):
            axes.patch.set_alpha(0)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace('width="648pt" height="259.2pt"', 'aria-hidden="true"')
    # matplotlib's black ink becomes the page's ink, so that one drawing serves light and dark.
    return svg.replace("#000000", "currentColor").replace("stroke: #b0b0b0", "stroke: currentColor")


def _png(pixels: Pixels) -> str:
    """A grey image uint8 (height, width) as a PNG data URI."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
