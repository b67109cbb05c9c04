"""Debian's Chromium without a window, spoken to over its pipe (the DevTools protocol): nothing to install but the browser."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = ("--no-first-run", "--no-default-browser-check", "--disable-background-networking", "--disable-component-update",
          "--disable-sync", "--disable-extensions", "--disable-gpu", "--disable-dev-shm-usage", "--no-sandbox")  # fmt: skip


def found() -> str | None:
    """The browser's path, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


# Chromium reads its orders from descriptor 3 and answers on 4
_MOVE = """
import os, sys
from fcntl import F_DUPFD, fcntl
there, back = (fcntl(int(arg), F_DUPFD, 10) for arg in sys.argv[1:3])
os.dup2(there, 3), os.dup2(back, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """A tab. `problems`: console messages of warning or error, exceptions, log entries; `requests`: all addresses asked for."""

    def __init__(self, send: Any, receive: Any) -> None:
        self._send, self._receive, self._id, self._session = send, receive, 0, ""
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        session = {"sessionId": self._session} if self._session else {}
        self._send({"id": self._id, "method": method, "params": params, **session})
        while True:
            message = self._receive()
            if message.get("id") == self._id:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])

    def open(self, path: Path) -> None:
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self.run("0")

    def look(self, width: int, height: int = 900, dark: bool = False) -> None:
        """The window's size, and which colours are preferred."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script: str) -> Any:
        """The value of an expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser(timeout: float = 60.0) -> Iterator[Page]:
    """A tab of a browser of its own; it is gone afterwards. RuntimeError if the browser ends or says nothing for long."""
    there, ours, theirs, back = *os.pipe(), *os.pipe()
    path = found()
    if path is None:
        raise RuntimeError("no Chromium is installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [path, "--headless", *_QUIET, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        order = [sys.executable, "-S", "-c", _MOVE, str(there), str(back), *command]
        process = subprocess.Popen(
            order, pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        os.close(there)
        os.close(back)
        try:
            with os.fdopen(ours, "wb", buffering=0) as out, os.fdopen(theirs, "rb", buffering=0) as answers:
                yield Page(lambda message: out.write(json.dumps(message).encode() + b"\0"), _reader(answers, timeout))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            process.wait(20)


def _reader(stream: Any, timeout: float) -> Any:
    """Reads one message after the other."""
    import select

    buffer = bytearray()

    def receive() -> dict[str, Any]:
        while b"\0" not in buffer:
            if not select.select([stream], [], [], timeout)[0]:
                raise RuntimeError(f"the browser said nothing for {timeout:g} s")
            part = stream.read(1 << 16)
            if not part:
                raise RuntimeError("the browser ended")
            buffer.extend(part)
        message, _, rest = bytes(buffer).partition(b"\0")
        buffer[:] = rest
        return json.loads(message)

    return receive
