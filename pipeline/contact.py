"""A contact sheet: some images of every class of a dataset, as a page or as a picture."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from pipeline.idx import Pixels
from pipeline.pages import png_uri, render_page
from pipeline.shards import Manifest, read_shard
from pipeline.storage import Store

LABEL_WIDTH, GAP = 180, 2  # pixels, in the picture
WHITE = 255


@dataclass(frozen=True)
class Samples:
    """Some training images uint8 (n, height, width) of one class, and how many images of it each split has."""

    name: str
    images: Pixels
    counts: dict[str, int]


def contact_sheet(store: Store, manifest: Manifest, samples: int) -> list[Samples]:
    """The first training images of each class, reading no more shards than that takes."""
    missing = {label: min(samples, count) for label, count in enumerate(manifest.report.class_counts["train"])}
    found: dict[int, list[Pixels]] = {label: [] for label in missing}
    for number in range(len(manifest.splits["train"])):
        if not any(missing.values()):
            break
        images, labels = read_shard(store, manifest, "train", number)
        for label, count in missing.items():
            taken = images[labels == label][:count]
            found[label].append(taken)
            missing[label] -= len(taken)
    return [
        Samples(
            name,
            np.concatenate(found[label]),
            {split: counts[label] for split, counts in manifest.report.class_counts.items()},
        )
        for label, name in enumerate(manifest.classes)
    ]


def render_png(manifest: Manifest, sheet: list[Samples]) -> bytes:
    """One picture, a row for each class: its name and number of training images, then the samples."""
    from torchvision.utils import make_grid  # 1.8 s, which a page does without

    height, width = manifest.image_shape
    most = max(len(samples.images) for samples in sheet)
    cells = np.full((len(sheet), most, 1, height, width), WHITE, np.uint8)
    for row, samples in zip(cells, sheet, strict=True):
        row[: len(samples.images), 0] = samples.images
    grid = make_grid(torch.from_numpy(cells).flatten(0, 1), nrow=most, padding=GAP, pad_value=WHITE)[0]
    picture = Image.new("L", (LABEL_WIDTH + grid.shape[1], grid.shape[0]), WHITE)
    picture.paste(Image.fromarray(grid.numpy()), (LABEL_WIDTH, 0))
    draw = ImageDraw.Draw(picture)
    for number, samples in enumerate(sheet):
        top = GAP + number * (height + GAP)
        draw.text((4, top + height // 3), f"{samples.name[:18]}  {samples.counts['train']:,}", fill=0)
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def render_html(manifest: Manifest, sheet: list[Samples]) -> bytes:
    """One page that needs nothing else. Every name in it is escaped."""
    rows = [(samples, [png_uri(image) for image in samples.images]) for samples in sheet]
    return render_page("contact.html.j2", manifest=manifest, rows=rows).encode()
