"""The model card of a run: Markdown in the form that Hugging Face's hub reads, made without asking anything of it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pipeline.evaluate import Evaluation
from pipeline.report import Report

LOADING = """\
```python
import onnxruntime                       # model.onnx
session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(["logits"], {"images": images})[0]

import torch                             # model.pt2
logits = torch.export.load("model.pt2").module()(torch.from_numpy(images))

from pathlib import Path                 # model.safetensors, with lenet-pipeline
from pipeline.checkpoint import decode_model
logits = decode_model(Path("model.safetensors").read_bytes())(torch.from_numpy(images))
```"""


def render_card(report: Report, side: int) -> str:
    """The card: figures, data, recipe and lineage of a report, and the `side` of the images that the model takes, in
    pixels. The same gives the same card."""
    evaluation = report.evaluation
    worst = sorted(evaluation.robustness, key=lambda found: found.accuracy)[:3]
    names = [metrics.name for metrics in evaluation.classes]
    seen = ", light objects on black" if report.dataset.homepage else ""  # of one's own data, nobody knows
    sections = [
        f"# {_text(report.run_id)}",
        f"LeNet, {sum(layer.parameters for layer in report.layers):,} parameters, trained on "
        f"{_text(report.dataset.name)}. Test accuracy **{evaluation.accuracy:.2%}** (95% interval "
        f"{evaluation.accuracy_low:.2%} to {evaluation.accuracy_high:.2%}, {evaluation.images:,} images). "
        f"When it was published, it was {'' if report.comparison.promoted else 'not '}proposed as the "
        f"champion: {_text('; '.join(report.comparison.reasons))}. What was decided then is in the registry.",
        "## Use",
        f"All forms take float32 images (batch, 1, {side}, {side}), pixels from 0 to 1{seen}, "
        "and give logits (batch, classes), the classes in this order: " + ", ".join(map(_text, names)) + ".",
        LOADING,
        "## Data",
        _table(
            {
                "name": report.dataset.name,
                "version, sha256": report.dataset.digest,
                **{f"{split} images": f"{rows:,}" for split, rows in report.dataset.rows.items()},
                **{
                    f"{split} images that are training images too": f"{count:,}"
                    for split, count in report.dataset.leaks.items()
                },
                "licence": report.dataset.licence,
                **({"home page": report.dataset.homepage} if report.dataset.homepage else {}),
            }
        ),
        "## Training",
        _table({name: value for name, value in report.parameters.items() if value is not None}),
        "## Metrics, on the test split",
        _table(
            {
                "accuracy": f"{evaluation.accuracy:.4f}",
                "negative log likelihood, nats": f"{evaluation.loss:.4f}",
                "Brier score": f"{evaluation.brier:.4f}",
                "expected calibration error": f"{evaluation.ece:.4f}",
            }
        ),
        _classes(evaluation),
        "## Limits",
        "It knows the classes above and nothing else: it gives one of them to any picture. Of what was tried, it "
        "does worst with:",
        "\n".join(
            f"- {found.change} {found.strength:g} {found.unit}: accuracy {found.accuracy:.2%}" for found in worst
        ),
        "What it confuses most:",
        "\n".join(
            f"- {_text(names[pair.label])} taken for {_text(names[pair.predicted])}: {pair.images:,} images"
            for pair in evaluation.confusions[:5]
        )
        or "- nothing",
        "## Lineage",
        _table(report.lineage | {f"version of {name}": value for name, value in report.versions.items()}),
    ]
    card = ModelCard(f"---\n{_data(report).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    return str(card)


def _data(report: Report) -> ModelCardData:
    """What the hub reads of a card, above its text."""
    result = EvalResult(
        task_type="image-classification",
        dataset_type=report.dataset.name,
        dataset_name=report.dataset.name,
        dataset_revision=report.dataset.digest,
        dataset_split="test",
        metric_type="accuracy",
        metric_value=report.evaluation.accuracy,
    )
    return ModelCardData(
        model_name=report.run_id,
        eval_results=[result],
        library_name="pytorch",
        pipeline_tag="image-classification",
        tags=["lenet", "image-classification"],
        datasets=[report.dataset.name],
        metrics=["accuracy"],
    )


def _classes(evaluation: Evaluation) -> str:
    head = ("class", "precision", "recall", "F1", "95% interval of F1", "images")
    rows = (
        (
            m.name,
            f"{m.precision:.3f}",
            f"{m.recall:.3f}",
            f"{m.f1:.3f}",
            f"{m.f1_interval.low:.3f} to {m.f1_interval.high:.3f}",
            f"{m.support:,}",
        )
        if m.support
        else (m.name, *"––––", "0")
        for m in evaluation.classes
    )
    return _rows(head, rows)


def _table(facts: Mapping[str, Any]) -> str:
    return _rows(("", ""), facts.items())


def _rows(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)


def _text(value: Any) -> str:
    """Anybody's text as text: on one line, and nothing in it is Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|&~!])", r"\\\1", " ".join(str(value).split()))
