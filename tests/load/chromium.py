"""A real browser without a window, spoken to by its DevTools protocol over a pipe."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIMIT_S = 60
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it shows nothing but our own pages, and root has no other way
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
)


def find() -> str | None:
    """The browser that is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Chromium:
    """One process; ``open`` it with ``running``."""

    def __init__(self, writes: int, reads: int) -> None:
        self._writes, self._reads = writes, reads
        self._received = b""
        self._last_id = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Its result. Events that come before it are kept."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + LIMIT_S
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._reads], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser says nothing"
            more = os.read(self._reads, 1 << 20)
            assert more, "the browser has gone"
            self._received += more
        message, _, self._received = self._received.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    def open(self, path: Path, *, scheme: str = "light", width: int = 1200, height: int = 900) -> "Page":
        """A file, when it has loaded, in the colours that a reader prefers."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable", session)
        preferred = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", session, features=preferred)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        url = path.as_uri()
        self.call("Page.navigate", session, url=url)
        page = Page(self, session)
        deadline = time.monotonic() + LIMIT_S
        while page.evaluate("location.href + document.readyState") != f"{url}complete":
            assert time.monotonic() < deadline, f"{url} does not load"
        return page


class Page:
    """That has loaded."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser, self._session = browser, session

    def evaluate(self, expression: str) -> Any:
        """The value of some JavaScript, which the page itself could not run."""
        answer = self._browser.call("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _events(self, method: str) -> list[dict[str, Any]]:
        found = (event for event in self._browser.events if event.get("sessionId") == self._session)
        return [event["params"] for event in found if event["method"] == method]

    @property
    def requested(self) -> list[str]:
        """What it has asked for, by URL; what is in the page itself is no request."""
        urls = [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """What went wrong on it, and whatever it said on the console."""
        methods = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed")
        return [event for method in methods for event in self._events(method)]

    def screenshot(self, path: Path) -> None:
        """All of it, as a PNG."""
        picture = self._browser.call("Page.captureScreenshot", self._session, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))


@contextmanager
def running(binary: str, profile: Path) -> Iterator[Chromium]:
    """With a fresh profile in this directory."""
    child_reads, writes = os.pipe()
    reads, child_writes = os.pipe()
    # It wants them as 3 and 4, which one of them may be already.
    given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (child_reads, child_writes)]
    for fd in (child_reads, child_writes):
        os.close(fd)
    script = f'exec "$@" 3<&{given[0]} 4>&{given[1]}'
    command = ["bash", "-c", script, "bash", binary, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        command, pass_fds=given, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for fd in given:
        os.close(fd)
    try:
        browser = Chromium(writes, reads)
        yield browser
        browser.call("Browser.close")
        process.wait(LIMIT_S)
    finally:
        process.kill()
        process.wait()
        os.close(writes)
        os.close(reads)
