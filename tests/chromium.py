"""A pytest plugin: a headless Chromium of this machine, spoken to over its DevTools pipe.

It does not know pages.
Read first: `browser.open(url)` gives a page; `page.wait(expression)` returns once JavaScript finds it true. Where no
Chromium is installed the tests that ask for one are skipped.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LIMIT_S = 30.0
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")


class Browser:
    """A running browser: JSON messages that end in a zero byte, on two pipes."""

    def __init__(self, told: int, heard: int) -> None:
        self._told, self._heard = told, heard
        self._number = 0
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._told, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def open(self, url: str, *, scheme: str = "light") -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        page.call("Network.enable")
        page.call("Runtime.enable")
        page.call("Log.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=1200, height=1400, deviceScaleFactor=1, mobile=False)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.call("Page.navigate", url=url)
        return page

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._heard], [], [], LIMIT_S)[0], "the browser says nothing"
            piece = os.read(self._heard, 1 << 16)
            assert piece, "the browser has ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> Any:
        return self._browser.call(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The value of `expression` once it is true."""
        # The page polls by itself; a promise that looks at every frame needs no sleep here.
        deadline = time.monotonic() + LIMIT_S
        look = f"""new Promise(done => {{
            const end = performance.now() + 5000;
            const look = () => {{
                let value; try {{ value = ({expression}); }} catch {{ value = null; }}
                if (value || performance.now() > end) done(value); else setTimeout(look, 20);
            }}; look(); }})"""
        while time.monotonic() < deadline:
            if value := self.evaluate(look):
                return value
        raise AssertionError(f"never true: {expression}; the page says: {self.text()}")

    def press(self, key: str, *, code: int = 0, modifiers: int = 0) -> None:
        text = {"Enter": "\r", " ": " "}.get(key, "")
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="" if modifiers else text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def text(self) -> str:
        return str(self.evaluate("document.body.innerText"))

    def requested(self) -> list[str]:
        """Every address that the page has asked for."""
        self.evaluate("0")
        return [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event.get("sessionId") == self._session and event.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """Errors that the page raised or that its policy refused."""
        self.evaluate("0")
        own = [event for event in self._browser.events if event.get("sessionId") == self._session]
        thrown = [str(event) for event in own if event["method"] == "Runtime.exceptionThrown"]
        logged = [event["params"]["entry"] for event in own if event["method"] == "Log.entryAdded"]
        return thrown + [entry["text"] for entry in logged if entry["level"] in {"warning", "error"}]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The browser, started once."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here: looked for {', '.join(NAMES)}")
    profile = tmp_path_factory.mktemp("chromium")
    browser_hears, tell = os.pipe()
    hear, browser_tells = os.pipe()
    # The browser reads from its descriptor 3 and writes to 4.
    wiring = f'exec 3<&{browser_hears} 4>&{browser_tells}; exec "$@"'
    command = ["bash", "-c", wiring, "browser", found, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    with subprocess.Popen(
        command, pass_fds=(browser_hears, browser_tells), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(browser_hears)
        os.close(browser_tells)
        try:
            yield Browser(tell, hear)
        finally:
            os.close(tell)
            process.terminate()
            process.wait(LIMIT_S)
            os.close(hear)
