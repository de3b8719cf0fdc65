"""A contact sheet: some images of every class of a dataset, as a page or as a picture."""

import base64
import io
from dataclasses import dataclass

import jinja2
import numpy as np
from PIL import Image, ImageDraw

from pipeline.idx import Pixels
from pipeline.shards import Manifest, read_shard
from pipeline.storage import Store

LABEL_WIDTH, GAP = 180, 2  # pixels, in the picture


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
    height, width = manifest.image_shape
    most = max(len(samples.images) for samples in sheet)
    picture = Image.new("L", (LABEL_WIDTH + most * (width + GAP), len(sheet) * (height + GAP)), 255)
    draw = ImageDraw.Draw(picture)
    for row, samples in enumerate(sheet):
        top = row * (height + GAP)
        draw.text((4, top + height // 3), f"{samples.name[:18]}  {samples.counts['train']:,}", fill=0)
        for column, image in enumerate(samples.images):
            picture.paste(Image.fromarray(image), (LABEL_WIDTH + column * (width + GAP), top))
    return _png(picture)


def render_html(manifest: Manifest, sheet: list[Samples]) -> bytes:
    """One page that needs nothing else. Every name in it is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    rows = [
        (
            samples,
            ["data:image/png;base64," + base64.b64encode(_png(Image.fromarray(i))).decode() for i in samples.images],
        )
        for samples in sheet
    ]
    return environment.from_string(PAGE).render(manifest=manifest, rows=rows, splits=list(manifest.splits)).encode()


def _png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ manifest.dataset }}</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:last-child { text-align: left; }
td:last-child { white-space: nowrap; }
img { image-rendering: pixelated; width: 2.5rem; height: 2.5rem; background: #000; margin-right: 2px; }
</style>
<h1>{{ manifest.dataset }}</h1>
<p>Version {{ manifest.version }}; {{ manifest.image_shape[0] }} by {{ manifest.image_shape[1] }} pixels, training
pixels of mean {{ "%.4f" | format(manifest.report.pixel_mean) }} and standard deviation
{{ "%.4f" | format(manifest.report.pixel_std) }}.{% for split, count in manifest.report.duplicates.items() %}
{{ "{:,}".format(count) }} {{ split }} images are training images too.{% endfor %}
{% if manifest.licence %}Licence: {{ manifest.licence }}.{% endif %}</p>
<div class="scroll" role="region" tabindex="0" aria-label="Classes, table">
<table>
<thead><tr><th scope="col">class</th>{% for split in splits %}<th scope="col">{{ split }}</th>{% endfor %}
<th scope="col">training images</th></tr></thead>
<tbody>
{% for samples, images in rows %}<tr><th scope="row">{{ samples.name }}</th>
{% for split in splits %}<td>{{ "{:,}".format(samples.counts[split]) }}</td>{% endfor %}
<td>{% for image in images %}<img src="{{ image }}" alt="{{ samples.name }}, image {{ loop.index }}">{% endfor %}</td>
</tr>
{% endfor %}</tbody>
</table>
</div>
</html>
"""
