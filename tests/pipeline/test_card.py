"""Proves that the model card can be read by the hub's own library, and that nobody's text becomes markup in it."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
from huggingface_hub import ModelCard

from pipeline.card import render_card
from pipeline.publish import read_report
from pipeline.report import Report
from pipeline.storage import Store

if TYPE_CHECKING:
    from tests.pipeline.conftest import Receipts

HOSTILE = ["---\nlicense: mit\n---", "a | b\n| c", "<script>alert(1)</script>", "[x](javascript:alert(1))", "'\": {}#"]


@pytest.fixture
def report(local_store: Store, trained: Callable[..., "Receipts"]) -> Report:
    trained(local_store, "r").publish(local_store)
    return read_report(local_store, "r")


def test_the_card_is_published_and_read_by_the_hubs_library(report: Report, local_store: Store) -> None:
    text = local_store.read("runs/r/README.md").decode()
    assert text == render_card(report, 28)
    card = ModelCard(text)
    assert card.data.model_name == "r"
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", report.evaluation.accuracy)
    assert (result.dataset_name, result.dataset_revision) == ("fashion-mnist", report.dataset.digest)
    for part in ("## Use", "## Data", "## Training", "## Limits", "## Lineage", "61,706 parameters", "| lock | l |"):
        assert part in card.text, part
    assert f"**{report.evaluation.accuracy:.2%}**" in card.text
    assert "When it was published, it was not proposed as the champion: promote is off for" in card.text


def test_the_forms_take_images_of_the_shape_that_the_card_states(report: Report, local_store: Store) -> None:
    text = local_store.read("runs/r/README.md").decode()
    [shape] = re.findall(r"take float32 images \(batch, 1, (\d+), (\d+)\)", text)
    images = np.zeros((2, 1, *map(int, shape)), np.float32)
    session = onnxruntime.InferenceSession(local_store.read("runs/r/model.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(["logits"], {"images": images})[0].shape == (2, len(report.evaluation.classes))


def test_data_of_ones_own_has_no_home_page(report: Report) -> None:
    assert f"| home page | {report.dataset.homepage} |" in render_card(report, 28)
    own = report.dataset.model_copy(update={"homepage": ""})
    assert "home page" not in render_card(report.model_copy(update={"dataset": own}), 28)


def test_the_card_tells_of_test_images_that_were_trained_on_and_of_classes_that_were_not_tested(report: Report) -> None:
    assert "training images too" not in render_card(report, 28)
    leaky = report.dataset.model_copy(update={"duplicates": {"validation": 0, "test": 1234}})
    evaluation, (first, *others) = report.evaluation, report.evaluation.classes
    evaluation = evaluation.model_copy(update={"classes": [first.model_copy(update={"support": 0}), *others]})
    card = render_card(report.model_copy(update={"dataset": leaky, "evaluation": evaluation}), 28)
    assert "| test images that are training images too | 1,234 |" in card
    assert "validation images that are" not in card
    assert "| T-shirt/top | – | – | – | – | 0 |" in card


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nobodys_text_becomes_markup(report: Report, hostile: str) -> None:
    classes = [metrics.model_copy(update={"name": hostile}) for metrics in report.evaluation.classes]
    changed = report.model_copy(
        update={
            "run_id": hostile,
            "parameters": {hostile: hostile},
            "lineage": {hostile: hostile},
            "dataset": report.dataset.model_copy(update={"name": hostile, "licence": hostile}),
            "evaluation": report.evaluation.model_copy(update={"classes": classes}),
            "comparison": report.comparison.model_copy(update={"reasons": [hostile]}),
        }
    )
    card = ModelCard(render_card(changed, 28))
    assert card.data.model_name == hostile
    assert card.data.to_dict().get("license") is None
    plain = ModelCard(render_card(report, 28))
    assert not re.search(r"(?<!\\)<script|(?<!\\)\]\(|\n---\n", card.text)
    rows = len(report.parameters) + len(report.lineage)
    assert card.text.count("\n| ") == plain.text.count("\n| ") - rows + 2
