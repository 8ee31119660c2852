"""The server's page in a browser: it shows the tide as it comes in, by keyboard alone, on a narrow screen, silently."""

import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.builders import small_tokenizer
from tests.serving import FABLE, FakeEngine, server_here

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]
FIRST_BLOCK = " The"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def gate() -> threading.Semaphore:
    """Released once for each pass."""
    return threading.Semaphore(0)


@pytest.fixture
def engine(gate: threading.Semaphore) -> FakeEngine:
    return FakeEngine(small_tokenizer(), 4, gate)


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with server_here(lambda: engine, small_tokenizer(), engine.gate) as (url, _):
        yield url


class Opened:
    """A page, and whatever it has to complain about."""

    def __init__(self, browser: Browser, url: str, **context: Any):
        self.context = browser.new_context(**context)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def width(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth")

    def written(self) -> str:
        """The text that is shown, marks left out."""
        parts = self.page.locator("#text .token .char").all_text_contents()
        return "".join(parts)


def test_each_block_grows_from_its_end_and_turns_into_its_tokens(
    browser: Browser, url: str, gate: threading.Semaphore
) -> None:
    here = Opened(browser, url)
    page = here.page
    page.fill("#prompt", "At the harbour")
    page.click("#write")
    expect(page.locator("#text .prompt")).to_have_text("At the harbour")
    for count, shown in ((1, "e"), (2, "he"), (3, "The")):
        gate.release()
        expect(page.locator("#lane .cell")).to_have_count(count)
        boxes = [(cell.bounding_box() or {})["x"] for cell in page.locator("#lane .cell").all()]
        assert boxes == sorted(boxes, reverse=True), "a char stands right of the one before it"
        texts = [text.strip() for text in page.locator("#lane .cell").all_text_contents()]
        assert "".join(reversed(texts)) == shown
    assert here.written() == ""
    gate.release(2)
    expect(page.locator("#text .block")).to_have_count(1)
    assert here.written() == FIRST_BLOCK
    tokens = page.locator("#text .token").all_text_contents()
    assert tokens == [small_tokenizer().name(i) for i in small_tokenizer().encode_block(FIRST_BLOCK)]
    gate.release(10_000)
    expect(page.locator("#status")).to_contain_text("The text has ended. 74 bytes in 20 blocks.")
    assert here.written() == FABLE
    expect(page.locator("#spoken")).to_have_text(FABLE)
    page.locator("#text .char", has_text="潮").hover()
    expect(page.locator("#detail h3")).to_contain_text("潮")
    expect(page.locator("#detail dl")).to_have_count(3)
    expect(page.locator("#detail dl").first).to_contain_text("77.9 %")
    expect(page.locator("#detail dl").first).to_contain_text("z")
    assert here.complaints == []
    here.context.close()


def test_by_keyboard_alone_on_a_narrow_screen(
    browser: Browser, url: str, gate: threading.Semaphore, engine: FakeEngine
) -> None:
    here = Opened(browser, url, viewport={"width": 360, "height": 740}, color_scheme="dark")
    page, keys = here.page, here.page.keyboard
    assert page.evaluate("document.activeElement.id") == "prompt"
    keys.press("Control+A")
    keys.type("At the harbour")
    order = []
    for _ in range(6):
        keys.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order == ["temperature", "top-p", "seed", "max-bytes", "write", "slow"]
    page.locator("#max-bytes").focus()
    keys.press("Control+A")
    keys.type("31")
    keys.press("Control+Enter")
    gate.release(12)
    expect(page.locator("#text .block")).to_have_count(2)
    keys.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped.")
    gate.release()  # the pass at hand, after which the engine hears of it
    page.wait_for_function("document.getElementById('stop').disabled")
    keys.press("Control+Enter")
    gate.release(10_000)
    expect(page.locator("#status")).to_contain_text("Stopped at the longest length.")
    expect(page.locator("#status")).to_contain_text("The block at hand did not fit")
    assert here.written() == FABLE[:27]
    assert len(engine.cancelled) == 1
    page.locator("#slow").focus()
    keys.press("Tab")
    expect(page.locator("#detail h3")).to_contain_text("end of block")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    expect(page.locator("#detail h3")).to_contain_text("T 77.9 %")
    keys.press("ArrowDown")
    keys.press("ArrowRight")
    expect(page.locator("#detail h3")).to_contain_text("t 77.9 %")
    keys.press("End")
    expect(page.locator("#detail h3")).to_contain_text("e 77.9 %")
    assert here.width() == 360
    assert here.complaints == []
    here.context.close()


def test_a_mistake_is_told(browser: Browser, url: str) -> None:
    here = Opened(browser, url)
    here.page.fill("#prompt", "x" * 20_000)
    here.page.click("#write")
    expect(here.page.locator("#status.error")).to_contain_text("at most 16,384; shorten it")
    expect(here.page.locator("#write")).to_be_enabled()
    here.context.close()
