"""A headless Chromium driven over a pipe by its DevTools protocol: pages as a reader sees them, for screenshots and for
tests of pages whose content a script draws."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
ANSWER_SECONDS = 60.0


def find() -> str | None:
    """The path of an installed Chromium or Chrome."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. Commands go over a pipe, so that no port of this machine is open to other users."""

    def __init__(self, process: "subprocess.Popen[bytes]", write: int, read: int) -> None:
        self.process, self._write, self._read = process, write, read
        self._numbers, self._buffer = itertools.count(1), b""
        target = self._call("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, None)["sessionId"]
        for domain in ("Page", "Runtime"):
            self._call(f"{domain}.enable")

    def open(self, url: str, width: int = 1400, height: int = 900, dark: bool = False) -> None:
        """Go to `url` in a window of `width` by `height` CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._call("Page.navigate", {"url": url})

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page. Raises RuntimeError if it throws."""
        found = self._call("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", "the script failed"))
        return found["result"].get("value")

    def text(self) -> str:
        """What the page shows as text."""
        return str(self.run("document.body ? document.body.innerText : ''"))

    def wait_for(self, script: str, seconds: float = 60) -> Any:
        """The value of a JavaScript expression as soon as it is true. Raises TimeoutError with the page's text."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"{script} did not become true; the page shows: {self.text()[:2000]}")
            time.sleep(0.1)
        return value

    def screenshot(self, path: Path, full: bool = False) -> None:
        """Write the window, or the `full` page, as PNG."""
        options = {"format": "png", "captureBeyondViewport": full}
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", options)["data"]))

    def print(self, path: Path) -> None:
        """Write the page as it would be printed, as PDF."""
        path.write_bytes(base64.b64decode(self._call("Page.printToPDF", {"preferCSSPageSize": True})["data"]))

    def _call(self, method: str, params: Any = None, session: str | None = "") -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params or {}}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + ANSWER_SECONDS
        while True:
            answer = self._receive(end)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the browser did not answer within {ANSWER_SECONDS:.0f} s")
            if not (more := os.read(self._read, 1 << 16)):
                raise RuntimeError("the browser has ended")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with an empty profile. Raises FileNotFoundError if none is installed."""
    program = find()
    if program is None:
        raise FileNotFoundError(f"no browser: install one of {', '.join(NAMES)}")
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{from_write}'  # the descriptors that --remote-debugging-pipe names
        options = [
            "--headless=new",
            "--hide-scrollbars",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-dev-shm-usage",
        ]
        process = subprocess.Popen(
            ["bash", "-c", command, program, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            pass_fds=(to_read, from_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_read)
        os.close(from_write)
        try:
            yield Browser(process, to_write, from_read)
        finally:
            os.close(to_write)
            os.close(from_read)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
