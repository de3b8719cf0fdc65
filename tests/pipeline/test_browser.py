"""Proves that the report and the index work in a real browser: light and dark, on a desk and on a phone, alone."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from lenet.model import LeNet
from pipeline.index import write_index
from pipeline.registry import promote_by_hand, register
from pipeline.storage import open_store

if TYPE_CHECKING:
    from tests.pipeline.conftest import Receipts

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECTIONS = (
    "Curves", "Calibration", "Confusion matrix", "Classes", "Worst mistakes", "Robustness", "Forms", "Speed",
    "Parameters", "Model", "Data", "Versions", "Lineage",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert program is not None, "Chromium is missing; make test installs it, or: apt-get install chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=120_000)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory, trained: Callable[..., "Receipts"], good_models: list[LeNet]
) -> Path:
    """The page of a published run."""
    store = open_store(str(tmp_path_factory.mktemp("report")))
    trained(store, "r", model=good_models[-1]).publish(store)
    return Path(store.path("runs/r/report.html"))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, trained: Callable[..., "Receipts"]) -> Path:
    """The page of a store with three versions, one the champion, and a run that is none; one name is long."""
    store = open_store(str(tmp_path_factory.mktemp("index")))
    for number, name in enumerate(("a", f"{'long-' * 20}name", "c", "other")):
        trained(store, name, seed=number).publish(store)
        if name != "other":
            register(store, "lenet", name)
    promote_by_hand(store, "lenet", 2)
    write_index(store)
    return Path(store.path("index.html"))


class Visit:
    """The page in a window, with all that the browser complained of and asked for."""

    def __init__(self, browser: Browser, report: Path, width: int, scheme: str) -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri())

    def brightness(self, of: str) -> float:
        """Of a colour of the body, 0 to 255."""
        colour = self.page.evaluate(f"getComputedStyle(document.body).{of}")
        red, green, blue = (int(part) for part in colour[4:-1].split(","))
        return (red + green + blue) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_shows_all_and_asks_for_nothing(browser: Browser, report: Path, width: int, scheme: str) -> None:
    visit = Visit(browser, report, width, scheme)
    page = visit.page
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [report.as_uri()]
    headings = page.get_by_role("heading", level=2)
    assert tuple(headings.all_inner_texts()) == SECTIONS
    assert all(heading.is_visible() for heading in headings.all())
    assert page.get_by_role("heading", level=1).inner_text() == "r"
    # Nothing is wider than the window but what scrolls in a box of its own.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = visit.brightness("color"), visit.brightness("backgroundColor")
    assert (ink < 80 < 200 < paper) if scheme == "light" else (paper < 80 < 200 < ink)
    page.close()


def test_pictures_and_drawings_are_drawn(browser: Browser, report: Path) -> None:
    page = Visit(browser, report, 1280, "light").page
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert widths
    assert set(widths) == {28}
    boxes = [drawing.bounding_box() for drawing in page.locator("svg").all()]
    assert len(boxes) == 3
    assert all(box is not None and box["width"] > 250 and box["height"] > 150 for box in boxes)
    page.close()


def test_tables_open_and_scroll_by_keyboard(browser: Browser, report: Path) -> None:
    page = Visit(browser, report, 375, "light").page
    assert not page.get_by_role("region", name="Calibration, table").is_visible()
    page.get_by_text("All bins in numbers").press("Enter")
    assert page.get_by_role("region", name="Calibration, table").is_visible()
    region = page.get_by_role("region", name="Confusion matrix, table")
    region.press("ArrowRight")
    page.wait_for_function("element => element.scrollLeft > 0", arg=region.element_handle())
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_the_index_shows_all_and_asks_for_nothing(browser: Browser, index: Path, width: int, scheme: str) -> None:
    visit = Visit(browser, index, width, scheme)
    page = visit.page
    assert visit.complaints == []
    assert visit.requests == [index.as_uri()]
    assert page.get_by_role("heading").all_inner_texts() == ["Runs and models", "lenet", "Runs that are no version"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for table in page.get_by_role("region").all():  # nor does a table need to be scrolled
        assert table.evaluate("box => box.scrollWidth <= box.clientWidth")
    ink, paper = visit.brightness("color"), visit.brightness("backgroundColor")
    assert (ink < 80 < 200 < paper) if scheme == "light" else (paper < 80 < 200 < ink)
    (chart,) = [drawing.bounding_box() for drawing in page.get_by_role("img", name="Accuracy of the versions").all()]
    assert chart is not None
    assert chart["width"] > 250
    assert chart["height"] > 150
    rows = page.get_by_role("region", name="lenet, table").get_by_role("row")
    assert [row.get_by_role("rowheader").inner_text() for row in rows.all()[1:]] == ["3", "2", "1"]
    shown = [row.get_by_text("champion", exact=True).locator("visible=true").count() for row in rows.all()]
    assert shown == [0, 0, 1, 0]
    page.close()


def test_the_links_of_the_index_lead_to_the_reports(browser: Browser, index: Path) -> None:
    page = Visit(browser, index, 1280, "light").page
    links = page.get_by_role("link").all()
    assert len(links) == 5  # the champion's twice
    for link in links:
        name = link.inner_text()
        there = Visit(browser, index.parent / str(link.get_attribute("href")), 1280, "light").page
        assert there.get_by_role("heading", level=1).inner_text() == name
        there.close()
    links[0].press("Enter")
    page.wait_for_url("**/report.html")
    page.close()
