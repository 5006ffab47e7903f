"""The page in a headless Chromium, driven by playwright."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium in PATH ({', '.join(NAMES)})")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Visit:
    """A tab on the server's page; what it complained about or asked elsewhere is in `problems`."""

    def __init__(self, browser: Any, served: Any, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.tab = self.context.new_page()
        self.problems: list[str] = []
        self.tab.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.on(
            "request", lambda r: None if r.url.startswith((served.url, "data:")) else self.problems.append(r.url)
        )
        self.tab.goto(served.url)

    def ask(self, text: str) -> None:
        self.tab.fill("#input", text)
        self.tab.press("#input", "Enter")


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    visits: list[Visit] = []

    def go(served: Any, **options: Any) -> Visit:
        visits.append(Visit(browser, served, **options))
        return visits[-1]

    yield go
    for one in visits:
        one.context.close()


def test_a_conversation(serve: Any, visit: Any) -> None:
    served = serve()
    page = visit(served)
    expect(page.tab.locator("#model")).to_have_text("tiny")
    page.tab.click("summary")
    page.tab.fill("#max-tokens", "9")
    page.tab.fill("#system", "Be short")
    page.ask("Hi")
    page.tab.wait_for_selector(".turn.assistant .note")
    assert page.tab.inner_text(".turn.user .text") == "Hi"
    assert page.tab.inner_text(".turn.assistant .text") == "<system>B"
    assert re.search(r"^9 tokens · .* a second · first after", page.tab.inner_text(".turn.assistant .note"))
    assert "cut at its most tokens" in page.tab.inner_text(".turn.assistant .note")
    page.ask("More")
    page.tab.wait_for_selector(".turn.assistant:nth-of-type(4) .note")
    last = served.engine.submitted[-1]
    assert last["prompt"] == "<system>Be short\n<user>Hi\n<assistant><system>B\n<user>More\n<assistant>"
    assert last["params"].temperature == 0.7 and last["params"].max_tokens == 9
    page.tab.click("#reset")
    assert page.tab.locator(".turn").count() == 0
    assert page.problems == []


def test_the_models_words_are_only_text(serve: Any, visit: Any) -> None:
    served = serve()
    evil = "<img src=x onerror=alert(1)><script>document.title='owned'</script>"
    served.engine.text_of = lambda token: evil
    page = visit(served)
    page.tab.click("summary")
    page.tab.fill("#max-tokens", "1")
    page.ask("<b>bold</b>")
    page.tab.wait_for_selector(".turn.assistant .note")
    assert page.tab.inner_text(".turn.assistant .text") == evil
    assert page.tab.inner_text(".turn.user .text") == "<b>bold</b>"
    assert page.tab.locator(".log img, .log script, .log b").count() == 0
    assert page.tab.title() == "tiny · moeforge" and page.problems == []


def test_stop_and_live_numbers(serve: Any, visit: Any) -> None:
    served = serve()
    served.engine.step_seconds = 0.01
    page = visit(served)
    page.ask("Go on")
    page.tab.wait_for_selector(".turn.running")
    expect(page.tab.locator("#rate-value")).to_have_text(re.compile(r"[1-9]"), timeout=10_000)
    assert page.tab.inner_text("#queue-value") == "1" and page.tab.inner_text("#cache-value") == "25 %"
    assert page.tab.locator("#rate polyline").get_attribute("points").count(",") >= 1
    page.tab.click("#stop")
    expect(page.tab.locator(".note")).to_contain_text("stopped")
    served.eventually(lambda: served.engine.reasons == {"abort": 1})
    expect(page.tab.locator("#queue-value")).to_have_text("0")
    assert page.problems == []


def test_trouble_is_shown(serve: Any, visit: Any) -> None:
    served = serve()
    page = visit(served)
    served.engine.queue = 0
    page.ask("Hi")
    page.tab.wait_for_selector(".note.bad")
    assert page.tab.inner_text(".note.bad") == "the queue is full; try again in 1 s"
    served.engine.queue, served.engine.step_seconds = 9, 0.05
    page.ask("Hi")
    page.tab.wait_for_selector(".turn.running")
    served.engine.failed = "rank 2 was killed"
    expect(page.tab.locator(".note.bad").nth(1)).to_contain_text("rank 2 was killed")
    page.tab.wait_for_selector(".health.bad")


def test_a_browser_logs_in_with_the_key(serve: Any, visit: Any) -> None:
    served = serve(keys=(b"open-sesame",))
    page = visit(served, http_credentials={"username": "me", "password": "open-sesame", "origin": served.url})
    page.ask("Hi")
    page.tab.wait_for_selector(".turn.assistant .note:not(.bad)")
    page.tab.wait_for_selector(".health.good")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_reads_in_light_and_dark(serve: Any, visit: Any, scheme: str) -> None:
    served = serve()
    served.engine.text_of = lambda token: "unbreakable" * 20
    page = visit(served, color_scheme=scheme, viewport={"width": 360, "height": 740})
    page.tab.click("summary")
    page.tab.fill("#max-tokens", "9")
    page.ask("word" * 100)
    page.tab.wait_for_selector(".turn.assistant .note")
    wide = page.tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0
    contrast = """() => {
      const light = (color) => { const c = color.match(/\\d+/g).slice(0, 3).map((v) => {
        v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
      const over = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const back = light(getComputedStyle(document.querySelector('.chat')).backgroundColor);
      return ['.turn.assistant .text', '.note', 'summary', '#temperature-value'].map((name) =>
        over(light(getComputedStyle(document.querySelector(name)).color), back)); }"""
    assert min(page.tab.evaluate(contrast)) >= 4.5
    assert page.problems == []
