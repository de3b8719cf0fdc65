"""`lenet predict`: what a model says of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.options import DEFAULT_STORAGE, whole
from pipeline.errors import ConfigError
from pipeline.own import shown
from pipeline.predict import Invert, Prediction, predict_pictures
from pipeline.served import open_model


def predict(
    images: list[Path],
    /,
    *,
    model: Annotated[str, Parameter(name=["--model", "--storage"])] = DEFAULT_STORAGE,
    invert: Invert = "auto",
    top: Annotated[int, Parameter(validator=Number(gte=1), converter=whole)] = 3,
) -> None:
    """Say what is in pictures, PNG or JPEG of any size.

    Args:
        images: The pictures.
        model: Which model: a store (the champion of its model lenet), or in one models/NAME, models/NAME/versions/N
            or runs/ID.
        invert: Exchange light and dark: auto (of what is on a light background; but a model that was trained on
            pictures of your own takes these as it took those), yes or no. Models of the catalogue know light on black.
        top: How many of the likeliest classes to show.
    """
    for image in images:
        if not image.is_file():
            what = "a folder; name the pictures in it" if image.is_dir() else "no such file; name a PNG or JPEG"
            raise ConfigError("images", str(image), *what.split("; "))
    served = open_model(model)
    predictions = predict_pictures(served, images, invert)
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table_of(predictions, served.classes, top))
        console.print(f"by {served.place}", soft_wrap=True, markup=False)
    else:
        for prediction in predictions:
            print(line_of(prediction, served.classes, top))


def ranked(prediction: Prediction, classes: Sequence[str], top: int) -> list[tuple[str, float]]:
    """The likeliest classes with their probabilities, the likeliest first; equal ones in the order of the classes."""
    pairs = zip(classes, prediction.probabilities, strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])[:top]


def line_of(prediction: Prediction, classes: Sequence[str], top: int) -> str:
    """A prediction for a program to read: path, then class and probability by turns, tabs between them."""
    pairs = (f"{name}\t{probability:.4f}" for name, probability in ranked(prediction, classes, top))
    return "\t".join([shown(prediction.path), *pairs])


def table_of(predictions: Sequence[Prediction], classes: Sequence[str], top: int) -> Table:
    """Predictions for a person to read, with what was done to each picture."""
    table = Table("picture", "class", "probability", "then", "picture was", box=None)
    for prediction in predictions:
        (name, probability), *others = ranked(prediction, classes, top)
        height, width = prediction.resized_from or (0, 0)
        done = [f"resized from {width}x{height}"] if prediction.resized_from else []
        done += ["inverted"] if prediction.inverted else []
        table.add_row(
            Text(shown(prediction.path), overflow="fold"),
            Text(name, style="bold"),
            f"{probability:.4f}",
            Text(", ".join(f"{name} {probability:.4f}" for name, probability in others)),
            ", ".join(done),
        )
    return table
