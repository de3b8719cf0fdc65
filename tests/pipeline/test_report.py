"""Proves that the report page holds everything, needs nothing from outside, and lets no text become markup."""

import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from lenet.model import LeNet, layer_table
from pipeline.artifacts import FORMS, Artifact
from pipeline.checkpoint import EpochMetrics
from pipeline.evaluate import Evaluation, FormCheck
from pipeline.metrics import CalibrationBin, ClassMetrics, Confusion, Interval, Mistake
from pipeline.probe import Robustness, Speed
from pipeline.promotion import Comparison
from pipeline.report import DatasetFacts, Report, render_html
from tests.pipeline.conftest import Page

HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}'&"]  # fmt: skip
PIXELS = [np.arange(784, dtype=np.uint8).reshape(28, 28)]


def epoch(number: int) -> EpochMetrics:
    return EpochMetrics(epoch=number, train_loss=2 / number, train_accuracy=0.3, held_out_loss=1.5,
                        held_out_accuracy=0.25, seconds=2.0, images_per_second=30_000.4, world_size=2)  # fmt: skip


def a_report(names: list[str] | None = None, text: str = "r1", homepage: str = "https://example.org/data",
             epochs: int = 2, mistakes: int = 1) -> Report:  # fmt: skip
    around = {f"{which}_interval": Interval(low=0.1, high=0.9) for which in ("precision", "recall", "f1")}
    classes = [ClassMetrics(name=n, precision=0.5, recall=0.25, f1=1 / 3, support=4, **around)
               for n in names or ["a", "b", "c"]]  # fmt: skip
    comparison = Comparison(champion=text, champion_accuracy=0.5, gain=-0.25, only_champion=4, only_candidate=1,
                            p=0.375, promoted=False, reasons=[text, "it recognises 3 images fewer"])  # fmt: skip
    wrong = Mistake(row=7, label=0, predicted=1, probability=0.997, label_probability=0.001)
    evaluation = Evaluation(
        candidate_sha256="c" * 64, dataset_digest="d" * 64, images=12, correct=3, accuracy=0.25, accuracy_low=0.0889,
        accuracy_high=0.5323, loss=1.5, brier=0.75, ece=0.0625,
        calibration=[CalibrationBin(low=0.2, high=0.6, images=12, confidence=0.4, accuracy=0.25),
                     CalibrationBin(low=0.6, high=1, images=0, confidence=0, accuracy=0)],
        confusions=[Confusion(label=2, predicted=0, images=4)], test_digest="t" * 64,
        forms={name: FormCheck(bytes=1000, sha256="e" * 64, largest_difference=2e-6, correct=3) for name in FORMS},
        predictions={"predictions/00000.parquet": Artifact(bytes=1, sha256="f" * 64)},
        robustness=[Robustness(change="blur", strength=1.5, unit="pixels", images=12, accuracy=0.125,
                               accuracy_low=0.03, accuracy_high=0.4)],
        speed=[Speed(batch=256, images_per_second=12345.6, latency_ms=20.74, latency_p95_ms=33.3)],
        classes=classes, confusion=[[2, 1, 1], [3, 1, 0], [4, 0, 0]],
        mistakes=[wrong] * mistakes, seconds=0.1,
    )  # fmt: skip
    return Report(
        format_version=2, run_id=text, finished=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        parameters={"lr": 0.9, "epochs": None, text: text},
        dataset=DatasetFacts(name=text, digest="d" * 64, rows={"train": 60_000, "test": 12}, licence=text,
                             homepage=homepage),
        layers=[*layer_table(LeNet())],
        history=[epoch(number + 1) for number in range(epochs)],
        world_size=2, device="cpu", training_seconds=84.4, evaluation=evaluation, comparison=comparison,
        versions={"torch": "2", text: text}, lineage={"lock": "9" * 64, text: text},
    )  # fmt: skip


def test_the_page_holds_the_run_in_numbers() -> None:
    page = Page(render_html(a_report(), PIXELS))
    for text in [
        "25.0 % test accuracy, 95% interval 8.9 to 53.2 %",
        "3 of 12 images",
        "2 epochs in 84 s",
        "2026-01-02 03:04:05 UTC",
        "Dataset version dddddddddddd Training",
        "1 2.0000 0.3000 1.5000 0.2500 30,000 2 1.0000",
        "a 0.500 0.100–0.900 0.250 0.100–0.900 0.333 0.100–0.900 4",
        "Not proposed as champion when it was published, against r1: r1; it recognises 3 images fewer.",
        "-25.00 points of accuracy; 1 images are right here alone, 4 in the champion alone; McNemar's exact test gives "
        "p = 0.38.",
        "Calibration error 6.2 %",
        "0.20 to 0.60 12 0.400 0.250 0.60 to 1.00 0 – –",
        "Brier score 0.7500",
        "Taken for each other most: c → a (4).",
        "blur 1.5 pixels 12.5 % 3.0 to 40.0",
        "model.onnx 1,000 3 2e-06",
        "256 12,346 20.74 ms 33.30 ms",
        "lock " + "9" * 64,
        "a → b 99.7 % label 0.1 %",
        "true \\ predicted a b c a 2 1 1 b 3 1 0 c 4 0 0",
        "lr 0.9 epochs none",
        "61,706 parameters in all.",
        "d" * 64,
    ]:
        assert text in page.text, text
    assert [tag for tag, _ in page.tags if tag in ("h1", "h2")] == ["h1"] + ["h2"] * 13
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert sum(tag == "table" for tag, _ in page.tags) == sum(tag == "caption" for tag, _ in page.tags) == 11


def test_a_p_that_the_exact_test_rounds_to_0_is_shown_as_small() -> None:
    report = a_report()
    sure = report.comparison.model_copy(update={"p": 0.0})
    page = Page(render_html(report.model_copy(update={"comparison": sure}), PIXELS))
    assert "McNemar's exact test gives p < 1e-12." in page.text


def test_the_page_tells_of_test_images_that_were_trained_on_and_of_classes_that_were_not_tested() -> None:
    report = a_report()
    assert "training images too" not in Page(render_html(report, PIXELS)).text
    leaky = report.dataset.model_copy(update={"duplicates": {"validation": 0, "test": 1234}})
    evaluation, (first, *others) = report.evaluation, report.evaluation.classes
    evaluation = evaluation.model_copy(update={"classes": [first.model_copy(update={"support": 0}), *others]})
    text = Page(render_html(report.model_copy(update={"dataset": leaky, "evaluation": evaluation}), PIXELS)).text
    assert "Test images that are training images too 1,234" in text
    assert "Validation images that are" not in text
    assert f"{first.name} – – – 0" in text


def test_data_of_ones_own_has_no_home_page() -> None:
    assert "Home page https://example.org/data" in Page(render_html(a_report(), PIXELS)).text
    assert "Home page" not in Page(render_html(a_report(homepage=""), PIXELS)).text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_becomes_markup(hostile: str) -> None:
    page = Page(render_html(a_report(names=[hostile, "b", "c"], text=hostile), PIXELS))
    assert hostile in page.text
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == [f"Test image 7: {hostile}, taken for b"]
    harmless = Page(render_html(a_report(), PIXELS))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]


def test_the_page_asks_nothing_of_the_network() -> None:
    html = render_html(a_report(), PIXELS)
    for tag, attributes in Page(html).tags:
        for name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            target = attributes.get(name)
            if target is not None and not target.startswith(("data:image/png", "#")):
                assert (tag, target) == ("a", "https://example.org/data")
    assert "@import" not in html
    assert html.count("url(") == html.count("url(#")
    drawings = html[html.index("<svg") : html.rindex("</svg>")]
    assert "://" not in drawings


def test_no_id_stands_twice_and_every_reference_finds_its_id() -> None:
    html = render_html(a_report(), PIXELS)
    ids = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', html)) <= set(ids)


def test_every_table_wider_than_a_phone_scrolls_by_keyboard_too() -> None:
    page = Page(render_html(a_report(), PIXELS))
    scrolling = [attributes for _, attributes in page.tags if attributes.get("class") == "scroll"]
    assert len(scrolling) == sum(tag == "table" for tag, _ in page.tags)
    assert all(a["role"] == "region" and a["tabindex"] == "0" and a["aria-label"] for a in scrolling)


def test_the_end_of_the_run_is_in_utc() -> None:
    elsewhere = datetime(2026, 1, 2, 1, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    page = Page(render_html(a_report().model_copy(update={"finished": elsewhere}), PIXELS))
    assert "2026-01-01 23:04:05 UTC" in page.text
    assert [a["datetime"] for tag, a in page.tags if tag == "time"] == ["2026-01-01T23:04:05+00:00"]


@pytest.mark.parametrize("homepage", ["javascript:alert(1)", " JavaScript:alert(1)//https://", "data:text/html,x"])
def test_a_homepage_that_is_a_script_is_no_link(homepage: str) -> None:
    page = Page(render_html(a_report(homepage=homepage), PIXELS))
    assert "a" not in [tag for tag, _ in page.tags]
    assert homepage.strip() in page.text


def test_a_run_whose_loss_diverged_has_a_page() -> None:
    diverged = epoch(2).model_copy(update={"train_loss": float("nan"), "held_out_loss": float("inf")})
    for history in ([epoch(1), diverged], [diverged]):
        page = Page(render_html(a_report().model_copy(update={"history": history}), PIXELS))
        assert "nan" in page.text


@pytest.mark.parametrize(("epochs", "ticks"), [(1, ["1"]), (2, ["1", "2"]), (3, ["1", "2", "3"])])
def test_the_axis_counts_whole_epochs(epochs: int, ticks: list[str]) -> None:
    html = render_html(a_report(epochs=epochs), PIXELS)
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", html)
    assert texts[: texts.index("epoch")] == ticks


def test_one_epoch_and_no_mistakes_make_a_page_too() -> None:
    page = Page(render_html(a_report(epochs=1, mistakes=0), []))
    assert "1 epoch in" in page.text
    assert "None: every test image was recognised." in page.text


@pytest.mark.parametrize("settings", ["", "lines.linewidth: 5\naxes.facecolor: red\naxes.grid.axis: x\n"])
def test_the_same_report_gives_the_same_bytes_in_another_process(tmp_path: Path, settings: str) -> None:
    report = a_report()
    script = (
        "import sys; import numpy as np; from pipeline.report import *; pixels = np.arange(784, dtype=np.uint8); "
        "print(render_html(Report.model_validate_json(sys.argv[1]), [pixels.reshape(28, 28)]))"
    )
    command = [sys.executable, "-c", script, report.model_dump_json()]
    (tmp_path / "matplotlibrc").write_text(settings)  # matplotlib looks for one where it is started, too
    env = os.environ | {"MATPLOTLIBRC": str(tmp_path)}
    other = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert other == render_html(report, PIXELS) + "\n"
    assert render_html(report, PIXELS) == render_html(report, PIXELS)
