"""The page at /, in a real browser: what it shows of requests, ranks and the server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeinfer.core.errors import StallError
from pipeinfer.serve.server import Server
from tests.unit.browser import PROGRAM, Browser
from tests.unit.scripted_engine import Scripted, asked, served, stream, told

in_a_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium (Debian's package chromium-headless-shell)"),
]
RANKS: list[dict[str, Any]] = [
    {"rank": 0, "host": "one", "roles": ["Orchestrator", "Drafter"], "layers": None, "weight_nbytes": 3 << 20,
     "threads": 2, "exchanges": ""},
    {"rank": 1, "host": "two", "roles": ["Stage"], "layers": [0, 7], "weight_nbytes": 5 << 20, "threads": 4,
     "exchanges": ""},
]  # fmt: skip
ROWS = "[...document.querySelectorAll('#%s tr')].map((row) => [...row.children].map((slot) => slot.textContent))"


class Ranked(Scripted):
    """An engine on two ranks."""

    ranks = RANKS


def status(server: Server) -> Any:
    answer = told(asked(server, "/status"))
    assert answer[0] == 200
    return answer[1]


def test_the_status() -> None:
    engine = Ranked()
    with served(engine) as server:
        with stream(server, prompt="xyz", priority=3):
            found = status(server)
            (request,) = found["requests"]
            assert (found["state"], found["ranks"], found["running"], found["waiting"]) == ("ready", RANKS, 1, 0)
            assert (request["state"], request["text"], request["tokens"]) == ("decoding", "ab", 2)
            assert (request["prompt_tokens"], request["priority"]) == (3, 3)
        while found["requests"]:
            found = status(server)
        assert (found["tokens"], found["prompt_tokens"]) == (2, 3)
        engine.failure = StallError("rank 1 waits")
        assert status(server)["state"] == "failed"
    with served(None) as server:
        assert (status(server)["state"], status(server)["ranks"]) == ("loading", [])


def test_only_the_end_of_a_long_text_is_shown() -> None:
    engine = Scripted()
    with served(engine) as server, stream(server) as response:
        engine.emit(0, "c" * 500)
        while len(response.readline()) < 500:
            pass
        assert status(server)["requests"][0]["text"] == "c" * 400


def test_texts_need_the_key_and_the_page_does_not() -> None:
    with served(Scripted(), api_key="secret") as server:
        assert told(asked(server, "/status"))[0] == 401
        for path in ("/", "/page.js"):
            with asked(server, path) as response:
                assert response.status == 200
                assert "default-src 'self'" in response.headers["content-security-policy"]
                assert b"http" not in response.read().replace(b"http-equiv", b"")


class TestInABrowser:
    """With Chromium."""

    pytestmark = in_a_browser

    def test_tokens_grow_and_a_cancelled_request_vanishes(self) -> None:
        engine = Ranked()
        with served(engine) as server, Browser(server.url) as browser:
            browser.wait("document.getElementById('state').textContent === 'ready' || null")
            assert browser.value(ROWS % "ranks") == [
                ["0", "one", "Orchestrator, Drafter", "", "3 MiB", "2"],
                ["1", "two", "Stage", "0 to 7", "5 MiB", "4"],
            ]
            assert browser.value("document.getElementById('idle').hidden") is False
            first, second = stream(server, prompt="xyz"), stream(server, prompt="x")
            both = browser.wait(f"((rows) => rows.length === 2 ? rows : null)({ROWS % 'requests'})")
            assert [row[1:4] + row[5:] for row in both] == [
                ["decoding", "3", "2", "ab"],
                ["decoding", "1", "2", "ab"],
            ]
            assert browser.value("document.getElementById('kv').textContent") == "25 %"
            engine.emit(1, "<b>&")
            grown = f"((rows) => rows[1] && rows[1][3] === '6' ? rows[1][5] : null)({ROWS % 'requests'})"
            assert browser.wait(grown) == "ab<b>&"
            self._keep(browser)
            first.close()
            left = browser.wait(f"((rows) => rows.length === 1 ? rows[0] : null)({ROWS % 'requests'})")
            assert (left[0], left[5]) == (both[1][0], "ab<b>&")
            engine.end(1)
            second.close()
            assert browser.wait("document.getElementById('idle').hidden ? null : 'none'") == "none"
            assert browser.value("document.getElementById('tokens').textContent") == "8"
            assert browser.refused == []

    def _keep(self, browser: Browser) -> None:
        """For people: a picture of the page, where the environment says in which folder."""
        if folder := os.environ.get("PIPEINFER_PICTURES"):
            browser.picture(Path(folder) / "page.png")

    def test_the_key_is_asked_for(self) -> None:
        with served(Ranked(is_brief=True), api_key="secret") as server, Browser(server.url) as browser:
            state = "document.getElementById('state').textContent"
            browser.wait(f"{state} === 'the key is needed' || null")
            browser.value("document.getElementById('key').value = 'secret'")
            browser.value("document.getElementById('ask').requestSubmit()")
            browser.wait(f"{state} === 'ready' || null")

    def test_a_server_that_has_gone(self) -> None:
        with served(Ranked()) as server:
            browser = Browser(server.url)
            browser.wait("document.getElementById('state').textContent === 'ready' || null")
        with browser:
            browser.wait("document.getElementById('state').textContent === 'no answer from the server' || null")
