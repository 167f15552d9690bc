"""A headless Chromium for tests, driven over its debugging pipe: no port, no network, nothing to install in Python."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
)


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for path in map(shutil.which, names) if path), None)


class Chromium:
    """One browser with one page. `messages` holds what the page wrote to its console, and its errors."""

    def __init__(self, profile: Path, timeout: float = 240.0) -> None:
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4; the shell moves the pipes there.
        command = f'exec "$0" "$@" 3<&{theirs_read} 4>&{theirs_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(find_chromium()), *FLAGS.split(), f"--user-data-dir={profile}"],
            pass_fds=(theirs_read, theirs_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_read)
        os.close(theirs_write)
        self._read, self._write, self._buffer = ours_read, ours_write, b""
        self._timeout, self._next, self._events = timeout, 0, []
        self.messages: list[str] = []
        target = self._send("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        attached = self._send("Target.attachToTarget", {"targetId": target, "flatten": True}, session=None)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._read)
        os.close(self._write)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        return self._send(method, parameters, self._session)

    def open(self, page: Path, width: int = 1280, height: int = 900, scripts: bool = True, media: str = "") -> None:
        """Loads a local page at a width in CSS pixels; below 600 as a phone would."""
        self.messages.clear()
        phone = width < 600
        self.send("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.send("Emulation.setEmulatedMedia", media=media)
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )  # fmt: skip
        self._events.clear()
        self.send("Page.navigate", url=page.resolve().as_uri())
        self._wait("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page (also where the page's own scripts are off)."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path, clip: tuple[float, float, float, float] | None = None) -> Path:
        """A PNG of what is in view, or of `clip` = x, y, width, height of the page."""
        more: dict[str, Any] = {}
        if clip is not None:
            x, y, width, height = clip
            more = {
                "clip": {"x": x, "y": y, "width": width, "height": height, "scale": 1},
                "captureBeyondViewport": True,
            }
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png", **more)["data"]))
        return path

    def pdf(self, path: Path) -> Path:
        """What the page looks like in print, by its own page sizes."""
        answer = self.send("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path

    def _send(self, method: str, parameters: dict[str, Any], session: str | None) -> dict[str, Any]:
        self._next += 1
        message = {"id": self._next, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._receive(lambda answer: answer.get("id") == self._next, method).get("result", {})

    def _wait(self, event: str) -> None:
        if event not in self._events:
            self._receive(lambda answer: answer.get("method") == event, event)

    def _receive(self, wanted: Any, what: str) -> dict[str, Any]:
        deadline = time.monotonic() + self._timeout
        while True:
            while b"\0" not in self._buffer:
                ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
                chunk = os.read(self._read, 1 << 20) if ready else b""
                assert chunk, f"chromium gave no answer to {what} in {self._timeout:g} s"
                self._buffer += chunk
            raw, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(raw)
            self._note(answer)
            if wanted(answer):
                assert "error" not in answer, f"{what}: {answer['error']}"
                return answer

    def _note(self, answer: dict[str, Any]) -> None:
        method, parameters = answer.get("method", ""), answer.get("params", {})
        self._events.append(method)
        if method == "Log.entryAdded":
            self.messages.append(parameters["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(f"console.{parameters['type']}: {parameters['args']}")
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith(("file:", "data:")):
                self.messages.append(f"request to {url}")
