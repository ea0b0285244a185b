"""The page at `/`, in a real browser, by keyboard alone.

It does not know models: the engine plays a script.
Read first: without a Chromium on this machine the tests with `page` are skipped; those of the policy are not.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator

import pytest
from chromium import Browser, Page
from scripted_engine import ScriptedEngine
from serving import Serving

from runtime import errors
from runtime.service.guard import Guard
from runtime.service.page import FILE, policy
from runtime.service.tokens import TokenEntry, Tokens, digest_of, new_secret

CONTROL = 2
TAB, ENTER = 9, 13


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine({"full": errors.QueueFullError("no room for it")})


@pytest.fixture
def serving(engine: ScriptedEngine) -> Iterator[Serving]:
    with Serving(engine, http=True) as server:
        yield server


@pytest.fixture
def page(browser: Browser, serving: Serving) -> Page:
    opened = browser.open(f"{serving.url}/")
    opened.wait("document.getElementById('state')?.textContent === 'ready'")
    return opened


def ask(page: Page, text: str) -> None:
    page.evaluate("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter", code=ENTER, modifiers=CONTROL)


def cells(page: Page, rows: str) -> list[list[str]]:
    found = page.evaluate(
        f"JSON.stringify([...document.querySelectorAll('{rows}')].map(row => [...row.cells].map(c => c.innerText)))"
    )
    return list(json.loads(found))


def test_the_status_tells_of_memory_engine_tasks_and_requests(serving: Serving) -> None:
    with urllib.request.urlopen(f"{serving.url}/status", timeout=20) as response:
        status = json.load(response)
    assert (status["name"], status["ready"], status["engine"]["generation"]) == ("greenroom", True, 3)
    assert (status["memory"]["hits"], status["memory"]["misses"]) == (5, 6)
    dates, orders = status["tasks"]
    assert (dates["name"], dates["layers"], dates["disk_bytes"]) == ("dates", [], 0)
    assert orders["layers"] == [{"layer": 2, "state": "ready"}, {"layer": 3, "state": "loading"}]
    assert (orders["disk_bytes"], orders["host_bytes"], orders["pinned"]) == (4096, 2048, True)
    assert status["requests"] == []


def test_the_page_shows_where_experts_are_and_how_often_that_hit(page: Page) -> None:
    tasks = cells(page, "#tasks tr")
    assert [row[:3] for row in tasks] == [["dates", "0 B", "0 B"], ["orders", "4.0 KiB", "2.0 KiB"]]
    assert tasks[1][4] == "pinned"
    label = page.evaluate("document.querySelectorAll('#tasks .units')[1].getAttribute('aria-label')")
    assert label == "1 of 2 layers in memory"
    states = page.evaluate("[...document.querySelectorAll('#tasks i')].map(unit => unit.className).join()")
    assert states == "ready,loading"
    assert "45 %" in page.evaluate("document.getElementById('memory-figures').innerText")


def test_a_request_is_seen_while_it_runs_and_gone_afterwards(page: Page, engine: ScriptedEngine) -> None:
    ask(page, "hold my hat")
    page.wait("document.getElementById('answer').textContent === 'hold'")
    page.wait("document.querySelector('#requests tr').cells.length === 4")
    assert cells(page, "#requests tr")[0][:3] == ["answering", "orders", "located"]
    engine.release()
    page.wait("document.getElementById('requests').innerText.includes('none right now')")


def test_an_answer_shows_the_scores_of_all_tasks_and_the_weights_per_layer(page: Page) -> None:
    ask(page, "one two three")
    page.wait("document.getElementById('outcome').textContent.includes('after a prompt of 7')")
    assert page.evaluate("document.getElementById('answer').textContent") == "one two three"
    assert [row[:2] for row in cells(page, "#scores tr")] == [["orders", "1.000"], ["dates", "1.125"]]
    assert "orders is nearest, by a margin of 0.125" in page.text()
    assert cells(page, "#heat tr") == [["Layer", "orders"], ["2", "0.75"]]
    shade = page.evaluate("getComputedStyle(document.querySelector('#heat td')).backgroundColor")
    assert round(float(re.split(r"[ ,/)]+", shade)[-2]), 3) == round(0.7 * 0.75, 3)


def test_a_task_can_be_chosen(page: Page, engine: ScriptedEngine) -> None:
    page.evaluate("document.getElementById('model').value = 'greenroom:dates'")
    ask(page, "a")
    page.wait("document.getElementById('decision').textContent.startsWith('dates was asked for')")
    assert engine.requests[0].task == "dates"


def test_an_answer_can_be_stopped(page: Page, engine: ScriptedEngine) -> None:
    ask(page, "hold my hat")
    page.wait("document.getElementById('answer').textContent === 'hold'")
    page.evaluate("document.getElementById('stop').focus()")
    page.press("Enter", code=ENTER)
    page.wait("document.getElementById('outcome').textContent === 'stopped'")
    engine.wait_cancelled()


def test_a_refusal_is_shown(page: Page) -> None:
    ask(page, "refuse full")
    page.wait("document.getElementById('outcome').className === 'error'")
    assert "no room for it" in page.evaluate("document.getElementById('outcome').textContent")


def test_the_keyboard_reaches_everything_in_order(page: Page) -> None:
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(6):
        page.press("Tab", code=TAB)
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached == ["SUMMARY", "prompt", "model", "tokens", "temperature", "send"]


def test_the_page_asks_nobody_but_its_own_server_and_complains_of_nothing(page: Page, serving: Serving) -> None:
    ask(page, "a b")
    page.wait("document.getElementById('outcome').textContent.startsWith('complete')")
    outside = [url for url in page.requested() if not url.startswith((serving.url, "data:"))]
    assert outside == []
    assert page.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_its_ground(browser: Browser, serving: Serving, scheme: str) -> None:
    page = browser.open(f"{serving.url}/", scheme=scheme)
    page.wait("document.getElementById('state')?.textContent === 'ready'")
    for name in ("ink", "quiet", "green", "red"):
        for ground in ("card", "ground"):
            assert contrast(colour(page, name), colour(page, ground)) >= 4.5, (name, ground)


def test_with_tokens_configured_the_page_asks_for_one(browser: Browser, engine: ScriptedEngine) -> None:
    secret = new_secret()
    entry = TokenEntry(name="user", sha256=digest_of(secret), scopes=["infer"])
    with Serving(engine, http=True, guard=Guard.of(Tokens([entry], []))) as serving:
        page = browser.open(f"{serving.url}/")
        page.wait("document.getElementById('state')?.textContent.includes('a bearer token is needed')")
        page.evaluate("document.querySelector('summary').click(); document.getElementById('token').focus()")
        page.type(secret)
        page.wait("document.getElementById('state').textContent === 'ready'")


def test_the_policy_lets_only_the_pages_own_script_and_style_run(serving: Serving) -> None:
    with urllib.request.urlopen(f"{serving.url}/", timeout=20) as response:
        text, sent = response.read().decode(), response.headers["content-security-policy"]
    assert text == FILE.read_text(encoding="utf-8")
    assert sent == policy(text)
    assert policy(text.replace('"use strict";', '"use strict"; alert(1);')) != sent
    assert "default-src 'none'" in sent
    assert "unsafe" not in sent


def test_the_file_names_no_other_place() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert re.findall(r"https?://|src=|@import|url\(", text) == []


def colour(page: Page, name: str) -> tuple[int, ...]:
    value = str(page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()"))
    return tuple(int(value[at : at + 2], 16) for at in (1, 3, 5))


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Contrast ratio (WCAG 2.2, definition of relative luminance)."""

    def luminance(channels: tuple[int, ...]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
