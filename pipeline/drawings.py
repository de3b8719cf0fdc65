"""The drawings of a report, as SVG that takes its ink and its font from the page around it."""

import io
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import History
from pipeline.metrics import CalibrationBin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Mid-tones that read on white and on near-black alike.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#4a86d8", "#d9792b", "#3f9c6b", "#9a6dd0", "#888888"
# What tells series apart, by shape too: colour, matplotlib's marker, and the same as a character.
SERIES = ((BLUE, "o", "●"), (ORANGE, "s", "■"), (GREEN, "^", "▲"), (PURPLE, "D", "◆"), (GREY, "v", "▼"))

Points = Sequence[tuple[datetime, float]]


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
        axes.plot([0, 1], [0, 1], "--", color=GREY, lw=1, label="calibrated")
        confidences = [one.confidence for one in filled]
        axes.plot(confidences, [one.accuracy for one in filled], "o-", color=BLUE, ms=4, label="this model")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("probability given")
        axes.set_ylabel("share right")
        axes.legend(frameon=False)

    return _svg(plot, salt="reliability")


def draw_accuracies(series: Sequence[Points], champions: Points, salt: str) -> str:
    """Accuracies (0 to 1) by time, in UTC: points for each series, in the order of SERIES, and as steps that of the
    champion, from each change on. At least one series has a point. Without a legend: names are for the page to write.
    """

    def plot(axes: "Axes") -> None:
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
        from matplotlib.ticker import PercentFormatter

        times = [when for points in series for when, _ in points]
        first, last = min(times), max(times)
        steps = [*champions, (max(last, champions[-1][0]), champions[-1][1])] if champions else []
        if steps:
            axes.plot(*zip(*steps, strict=True), color=GREY, lw=1, drawstyle="steps-post", zorder=1)
        for number, points in enumerate(series):
            colour, marker, _ = SERIES[number % len(SERIES)]
            axes.plot(*zip(*points, strict=True), marker, color=colour, ms=5, alpha=0.85)
        if first == last:
            axes.set_xlim(first - timedelta(days=1), first + timedelta(days=1))  # type: ignore[arg-type]
        # With these two every span of time has its ticks; with others some spans have none and it warns.
        locator = AutoDateLocator(minticks=3, maxticks=7)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
        axes.yaxis.set_major_formatter(PercentFormatter(1))

    return _svg(plot, salt)


def _svg(plot: Callable[["Axes"], None], salt: str) -> str:
    """What `plot` draws; the same text every time, with ids that no drawing of another salt has."""
    # Here and not above: matplotlib takes 0.6 s, and only a report needs it.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # On top of matplotlib's own values: with those of a user's matplotlibrc a page would be another one elsewhere.
    own: dict[Any, Any] = {name: value for name, value in mpl.rcParamsDefault.items() if name != "backend"}
    style = own | {"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 11}
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
