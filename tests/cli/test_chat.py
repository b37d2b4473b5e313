"""`pipeinfer chat`, scripted and at a terminal, with the built-in pair."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeinfer.core.config import BUILTIN, model_directory
from tests.cli.run import ROOT, here, pipeinfer

TEMPLATE = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}{{ '# assistant\\n' }}"
TURNS = ["def read_lines(path):", "import os"]
HANG_S, LOOK_S = 300.0, 0.2
TOKENS = ["--max-new-tokens", "16"]


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Options that name the built-in pair with a chat template."""
    target = tmp_path / "chatty"
    target.mkdir()
    for path in model_directory(BUILTIN, "target").iterdir():
        (target / path.name).symlink_to(path)
    config = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").unlink()
    (target / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return ["--target", str(target), "--draft", str(model_directory(BUILTIN, "draft"))]


def run(prompt: str, *arguments: str) -> str:
    """What the model says to ``prompt``."""
    done = here("run", "--json", *TOKENS, "--prompt", prompt, *arguments)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["text"])


@pytest.mark.slow
def test_every_turn_has_the_whole_conversation(models: list[str]) -> None:
    said = "\n".join([TURNS[0], "", TURNS[1] + "\\", "import sys", "/reset", TURNS[0], "/quit", "never"])
    done = pipeinfer("chat", *models, "--ranks", "2", "--system", "Be brief.", *TOKENS, stdin=said.encode())
    assert done.returncode == 0, done.stderr
    begin = f"# system\nBe brief.\n# user\n{TURNS[0]}\n# assistant\n"
    first = run(begin, *models)
    second = run(f"{begin}{first}\n# user\n{TURNS[1]}\nimport sys\n# assistant\n", *models)
    assert done.stdout == f"{first}\n{second}\n{first}\n"
    assert done.stderr == "the conversation is forgotten\n"


@pytest.mark.slow
def test_without_a_template_it_is_one_text() -> None:
    done = here("chat", "--no-template", *TOKENS, stdin="\n".join(TURNS).encode())
    first = run(TURNS[0] + "\n")
    answer = first if first.endswith("\n") else first + "\n"
    assert done.stdout == first + "\n" + run(f"{TURNS[0]}\n{answer}{TURNS[1]}\n") + "\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_refused() -> None:
    for arguments, words in [
        ([], ["has no chat template", "--no-template"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens 0"]),
        (["--stop", ""], ["stop string"]),
        (["--top-p", "7"], ["top_p"]),
        (["--draft", "x"], ["--draft without --target"]),
    ]:
        done = here("chat", *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "word"), [(b"x " * 3000, "context"), (b"\xff\n", "not UTF-8")], ids=["too long", "no text"]
)
def test_a_script_ends_where_a_turn_cannot_be_answered(said: bytes, word: str) -> None:
    done = here("chat", "--no-template", stdin=said)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert word in done.stderr


STATISTICS = (
    r"\x1b\[2m[^\x1b]* tokens, [\d.]+ tokens/s, TTFT \d+ ms, acceptance rate [\d.]+, accept length [\d.]+\x1b\[0m"
)


class Terminal:
    """A program at a terminal, and what stands there."""

    def __init__(self, *arguments: str) -> None:
        self.ours, theirs = os.openpty()
        line = [sys.executable, "-m", "pipeinfer", "chat", *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
        self.process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
        os.close(theirs)
        self.said = ""

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def until(self, pattern: str, repeat: Callable[[], object] | None = None) -> str:
        """Read until ``pattern`` is there; what came up to its end. A terminal that closes ends the wait. ``repeat`` is
        called whenever nothing comes for a while."""
        left = HANG_S
        while not (found := re.search(pattern, self.said, re.DOTALL)):
            if not select.select([self.ours], [], [], LOOK_S)[0]:
                left -= LOOK_S
                assert left > 0, f"{pattern!r} is not in {self.said!r}"
                if repeat is not None:
                    repeat()
                continue
            try:
                more = os.read(self.ours, 1 << 16)
            except OSError:  # Linux's way to say that the other end is closed
                raise AssertionError(f"{pattern!r} is not in {self.said!r}") from None
            self.said += more.decode().replace("\r\n", "\n")
        read, self.said = self.said[: found.end()], self.said[found.end() :]
        return read

    def interrupted(self, turn: str) -> str:
        """Say ``turn`` and send Ctrl-C once the answer has begun; it may end before. What came up to its statistics."""
        self.type(turn + "\n")
        self.until(re.escape(turn) + ".*\n.*\n")  # its echo, and some of the answer
        self.process.send_signal(signal.SIGINT)
        return self.until(STATISTICS)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_terminal(ranks: str) -> None:
    with Terminal("--no-template", "--ranks", ranks) as terminal:
        terminal.until("/help shows the commands.*> ")
        terminal.type("import sys")
        # At the prompt: the line is forgotten. Python misses a signal that comes just before it waits for a key.
        terminal.until("import sys.*\n> ", repeat=lambda: terminal.process.send_signal(signal.SIGINT))
        # Another signal may still be on its way, and take what is typed now.
        terminal.until("there is no /ready.*> ", repeat=lambda: terminal.type("/ready\n"))
        assert any("\x1b[2mstopped; " in terminal.interrupted("def read_lines(path):") for _ in range(20))
        terminal.until("> ")
        terminal.type("/nothing\n")
        terminal.until("there is no /nothing.*> ")
        terminal.interrupted("import os")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(300) == 0
