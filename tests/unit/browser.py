"""A headless Chromium, driven over its DevTools protocol through two pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = next((path for name in ("chromium-headless-shell", "chromium") if (path := shutil.which(name))), None)
# Without a sandbox, for tests may run as root; the pages are our own. Nothing is looked for outside this machine.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--remote-debugging-pipe", "--window-size=1100,800",
)  # fmt: skip
# Resolves to the value of an expression of the page as soon as that is not null.
WAIT = """new Promise((done) => {
  const look = () => { const found = (%s); if (found !== null) { watcher.disconnect(); done(found); } };
  const watcher = new MutationObserver(look);
  watcher.observe(document, {subtree: true, childList: true, characterData: true, attributes: true});
  look();
})"""


class Browser:
    """One page. Chromium reads messages from file 3 and writes to file 4, each ended by a zero byte."""

    def __init__(self, url: str) -> None:
        assert PROGRAM is not None
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        from_us, self._out = os.pipe()
        self._in, to_us = os.pipe()
        shell = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
        line = ["bash", "-c", shell, PROGRAM, *FLAGS, f"--user-data-dir={self._folder.name}"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            line, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=(from_us, to_us), start_new_session=True
        )
        os.close(from_us)
        os.close(to_us)
        self._rest = b""
        self._number = 0
        self.refused: list[str] = []  # what the page was not allowed, and errors of its script
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self._call("Page.navigate", url=url)

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._out, json.dumps(message | self._at_session()).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            if answer.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.refused.append(json.dumps(answer["params"]))
        assert "error" not in answer, answer
        return answer["result"]

    def _at_session(self) -> dict[str, str]:
        return {} if self._session is None else {"sessionId": self._session}

    def _read(self) -> Any:
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 16)
            assert part, "Chromium has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        """The value of an ``expression`` of JavaScript, a promise's once it has one."""
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The value of ``expression`` as soon as that is not null; it is looked at whenever the page changes."""
        while self.value("document.readyState") != "complete":
            pass
        return self.value(WAIT % expression)

    def picture(self, path: Path) -> None:
        """Write what is to be seen to ``path``, as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # its renderers, too
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._folder.cleanup()
