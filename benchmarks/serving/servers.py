"""The servers that are compared, each a process of its own that runs while it is measured."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.serving.models import Pair
from pipeinfer.bench.gguf_export import FIX
from pipeinfer.core.errors import PipeinferError, refuse

ROOT = Path(__file__).resolve().parents[2]
MAX_NUM_SEQS = 16
START_S = 300.0
STOP_S = 60.0
POLL_S = 0.1
SHOWN_NBYTES = 2000
OURS, THEIRS = "pipeinfer", "llama.cpp"


@dataclass(frozen=True, slots=True)
class Contender:
    """A server. Ours has ``ranks``; llama.cpp's has none, and drafts ``n_max`` tokens at most (0: it does not
    speculate)."""

    name: str
    ranks: int = 0
    n_max: int = 0

    @property
    def is_ours(self) -> bool:
        """Whether it is `pipeinfer serve`."""
        return self.ranks > 0

    def command(self, pair: Pair, port: int, clients: int, threads: int, program: str) -> list[str]:
        """Its command line at ``port``, for ``clients`` requests at a time on ``threads`` threads in all. ``program``:
        a llama-server; empty: the one in xllamacpp."""
        if self.is_ours:
            return _ours(self, pair, port, clients, threads)
        return (
            _program(self, pair, port, clients, threads, program)
            if program
            else _package(self, pair, port, clients, threads)
        )


def contenders(ranks: Sequence[int], n_max: Sequence[int]) -> list[Contender]:
    """Ours with each number of ``ranks``; llama.cpp's without speculation, and with each of ``n_max``."""
    ours = [Contender(f"{OURS}-{count}", ranks=count) for count in ranks]
    theirs = [Contender(f"{THEIRS}-{most}" if most else THEIRS, n_max=most) for most in (0, *n_max)]
    return ours + theirs


def refuse_missing(program: str) -> None:
    """Raise UserError, in one line, where a package is missing that a contender needs."""
    wanted = ["gguf", "starlette", "uvicorn", *([] if program else ["xllamacpp"])]
    if missing := [name for name in wanted if find_spec(name) is None]:
        refuse(f"{', '.join(missing)} missing", FIX.replace("peers", "peers,serve"))
    if program and not os.access(program, os.X_OK):
        refuse(f"--llama-server {program} cannot be run", "name llama.cpp's program llama-server")


def _ours(contender: Contender, pair: Pair, port: int, clients: int, threads: int) -> list[str]:
    return [
        *(sys.executable, "-m", "pipeinfer", "serve", "--port", str(port)),
        *("--ranks", str(contender.ranks), "--threads", str(max(1, threads // contender.ranks))),
        *("--policy", "continuous", "--max-num-seqs", str(max(MAX_NUM_SEQS, clients))),
        *("--max-queue", str(4 * max(MAX_NUM_SEQS, clients)), "--context", str(pair.context)),
        *("--target", str(pair.directories[0]), "--draft", str(pair.directories[1]), "--dtype", pair.dtype),
    ]  # fmt: skip


def _package(contender: Contender, pair: Pair, port: int, clients: int, threads: int) -> list[str]:
    return [
        *(sys.executable, "-m", "benchmarks.serving.llama_server", "--model", str(pair.files[0])),
        *("--port", str(port), "--parallel", str(clients)),
        *("--context", str(pair.context), "--threads", str(threads)),
        *(("--fp32-cache",) if pair.dtype == "fp32" else ()),
        *(("--draft", str(pair.files[1]), "--n-max", str(contender.n_max)) if contender.n_max else ()),
    ]  # fmt: skip


def _program(contender: Contender, pair: Pair, port: int, clients: int, threads: int, program: str) -> list[str]:
    kind = "f32" if pair.dtype == "fp32" else "f16"
    line = [
        *(program, "--model", str(pair.files[0]), "--host", "127.0.0.1", "--port", str(port)),
        *("--parallel", str(clients), "--ctx-size", str(clients * pair.context), "--cont-batching", "--no-kv-unified"),
        *("--threads", str(threads), "--threads-batch", str(threads), "--fit", "off", "--no-ui"),
        *("--temp", "0", "--top-k", "1", "--cache-type-k", kind, "--cache-type-v", kind),
    ]
    if contender.n_max:
        line += [
            *("--spec-type", "draft-simple", "--spec-draft-model", str(pair.files[1])),
            *("--spec-draft-n-max", str(contender.n_max), "--spec-draft-threads", str(threads)),
            *("--spec-draft-type-k", kind, "--spec-draft-type-v", kind),
        ]
    return line


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(contender: Contender, pair: Pair, clients: int, threads: int, program: str = "") -> Iterator[str]:
    """The address of ``contender`` while it runs (see Contender.command). Raises PipeinferError where it does not
    start."""
    port = free_port()
    line = contender.command(pair, port, clients, threads, program)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":")}
    environ.pop("PIPEINFER_API_KEY", None)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            line, env=environ, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _await(contender, process, f"{url}/health", log)
            yield url
        finally:
            _stop(process)


def _await(contender: Contender, process: subprocess.Popen[bytes], url: str, log: object) -> None:
    """Until the server at ``url`` says that it is ready."""
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=START_S) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(POLL_S)
    log.seek(0)  # type: ignore[attr-defined]
    said = log.read()[-SHOWN_NBYTES:].decode(errors="replace").strip()  # type: ignore[attr-defined]
    raise PipeinferError(f"{contender.name} does not start (exit code {process.poll()}): {said}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server; its whole session where it does not end by itself."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
