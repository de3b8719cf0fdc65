"""The drawings of a report, as SVG that takes its ink and its font from the page around it."""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import History
from pipeline.metrics import CalibrationBin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Mid-tones that read on white and on near-black alike.
BLUE, ORANGE, GREEN = "#4a86d8", "#d9792b", "#3f9c6b"


def draw_curves(history: History, curves: dict[str, tuple[str, str]], top: float | None) -> str:
    """Fields of EpochMetrics by epoch: label to (field, colour)."""

    def plot(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        for (label, (field, colour)), line in zip(curves.items(), ("o-", "s--"), strict=False):
            values = [getattr(epoch, field) for epoch in history]
            axes.plot([epoch.epoch for epoch in history], values, line, color=colour, label=label, ms=4)
        axes.set_ylim(0, top)
        axes.set_xlabel("epoch")
        # Half an epoch on each side: without it a single epoch gets ticks at fractions of an epoch.
        axes.set_xlim(history[0].epoch - 0.5, history[-1].epoch + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(frameon=False)

    return _svg(plot, salt=",".join(curves))


def draw_reliability(bins: Sequence[CalibrationBin]) -> str:
    """How often a model is right against how sure it is, a point for each bin, beside the line of a calibrated one."""

    def plot(axes: "Axes") -> None:
        filled = [one for one in bins if one.images]
        axes.plot([0, 1], [0, 1], "--", color="#888888", lw=1, label="calibrated")
        confidences = [one.confidence for one in filled]
        axes.plot(confidences, [one.accuracy for one in filled], "o-", color=BLUE, ms=4, label="this model")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("probability given")
        axes.set_ylabel("share right")
        axes.legend(frameon=False)

    return _svg(plot, salt="reliability")


def _svg(plot: Callable[["Axes"], None], salt: str) -> str:
    """What `plot` draws; the same text every time, with ids that no drawing of another salt has."""
    # Here and not above: matplotlib takes 0.6 s, and only a report needs it.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 11}
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.4, 3.2), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        plot(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text.getvalue())
    # Nothing points at the groups' ids, and they are the same in every drawing: an id may stand once in a page.
    svg = svg.replace('<g id="', '<g data-part="')
    # matplotlib's black ink becomes the page's ink, so that one drawing serves light and dark.
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")
