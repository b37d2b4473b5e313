"""Many clients of `pipeinfer serve` at once, good and bad ones: whoever asks properly gets the first time's answer.

    python -m tests.cli.serve_storm --requests 10000 --clients 64 --seed 1      # the long run

Distinct requests are answered alone first. Then clients repeat them in any order. A tenth are given up at a random
moment. Beside them other clients send half a request, nothing, nonsense or a gigabyte, take an answer byte by byte, or
are killed. At the end the server holds no request, no more files than before, and hardly more memory.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.cli.serving import HANG_S, KEY, Client, events, marked, serving

GIVEN_UP = 0.1
"""The share of requests that their clients give up."""
GROWTH_SHARE, GROWTH_NBYTES = 0.05, 48 << 20
"""How much memory a process may gain after the first quarter of the requests."""
BEGINNINGS = ("def read_lines(path):\n", "import os\n", "class Node:\n    def ", "for index in range(", "# a list of ")


def draw_body(dice: random.Random) -> dict[str, Any]:
    """A random request to /v1/completions."""
    body: dict[str, Any] = {
        "prompt": f"x{dice.randrange(1000)} = {dice.randrange(1000)}\n" + dice.choice(BEGINNINGS),
        "max_tokens": dice.randrange(1, 17),
        "ignore_eos": dice.random() < 0.5,
        "logprobs": dice.randrange(3),
    }
    if dice.random() < 0.5:
        body |= {"temperature": round(dice.uniform(0.2, 1.5), 2), "seed": dice.randrange(1000)}
    if dice.random() < 0.2:
        body |= {"presence_penalty": 0.5, "frequency_penalty": 1.0, "repetition_penalty": 1.1}
    return body


def answer(client: Client, body: dict[str, Any], stream: bool) -> Any:
    """Text, finish reason, tokens and log-probabilities of all kinds, whichever way they come."""
    with client.open("/v1/completions", body | {"stream": stream}) as response:
        if response.status != 200:
            return response.status, response.read()
        found = [chunk["choices"][0] for chunk in (events(response) if stream else [json.loads(response.read())])]
    logprobs = [
        [each for choice in found for each in choice["logprobs"][name] or ()]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    ]
    return "".join(choice["text"] for choice in found), found[-1]["finish_reason"], logprobs


def wire(client: Client) -> socket.socket:
    host, port = client.address.split(":")
    return socket.create_connection((host, int(port)), HANG_S)


def written(body: dict[str, Any]) -> bytes:
    """A request as it is sent."""
    data = json.dumps(body).encode()
    return head(f"Content-Length: {len(data)}") + data


def head(*lines: str) -> bytes:
    first = ["POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", "Connection: close"]
    return "\r\n".join([*first, *lines, "", ""]).encode()


def give_up(client: Client, body: dict[str, Any], dice: random.Random) -> None:
    """Send a request, or a part of it, take a part of the answer, and close or reset the connection."""
    data = written(body | {"stream": dice.random() < 0.7, "max_tokens": 64})
    with wire(client) as connection, contextlib.suppress(ConnectionError):
        if dice.random() < 0.3:
            connection.sendall(data[: dice.randrange(len(data))])
        else:
            connection.sendall(data)
            for _ in range(dice.randrange(4)):
                connection.recv(dice.choice((1, 100, 10_000)))
        if dice.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset


def leave_open(client: Client, dice: random.Random, held: list[socket.socket]) -> None:
    """Say nothing, or half a request, and stay."""
    connection = wire(client)
    held.append(connection)
    data = written(draw_body(dice))
    connection.sendall(data[: dice.choice((0, 9, len(data) - 1))])


def send_a_gigabyte(client: Client, dice: random.Random, held: list[socket.socket]) -> None:
    """Say that a gigabyte follows, or send it in chunks; and send until somebody ends that."""
    with wire(client) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(head("Content-Length: 1073741824" if dice.random() < 0.5 else "Transfer-Encoding: chunked"))
        for _ in range(1 << 14):
            connection.sendall(b"10000\r\n" + b" " * (1 << 16) + b"\r\n")
        raise AssertionError("a gigabyte was taken")


def send_nonsense(client: Client, dice: random.Random, held: list[socket.socket]) -> None:
    """Send random bytes, or a body that is none."""
    noise = dice.randbytes(dice.randrange(1, 2000))
    with wire(client) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(noise if dice.random() < 0.5 else head(f"Content-Length: {len(noise)}") + noise)
        connection.shutdown(socket.SHUT_WR)
        assert not connection.recv(1 << 16).startswith(b"HTTP/1.1 5")


def take_slowly(client: Client, dice: random.Random, held: list[socket.socket]) -> None:
    """Take a stream byte by byte."""
    body = draw_body(dice) | {"stream": True, "max_tokens": 8}
    with wire(client) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(written(body))
        found = b""
        while part := connection.recv(1):
            found += part
    assert b"[DONE]" in found, found


def be_killed(client: Client, dice: random.Random, held: list[socket.socket]) -> None:
    """A process that is killed while it takes a stream."""
    host, port = client.address.split(":")
    line = (
        f"import socket; w = socket.create_connection(({host!r}, {port})); "
        f"w.sendall({written(draw_body(dice) | {'stream': True, 'max_tokens': 64})!r}); "
        "print(len(w.recv(9)), flush=True); w.recv(1 << 30, socket.MSG_WAITALL)"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", line], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.kill()


BAD: list[Callable[[Client, random.Random, list[socket.socket]], None]] = [
    leave_open, send_a_gigabyte, send_nonsense, take_slowly, be_killed,
]  # fmt: skip


class Storm:
    """The requests that were answered alone, and what goes wrong with them later. ``seed``: of all random choices."""

    def __init__(self, client: Client, distinct: int, seed: int) -> None:
        self._client, self._seed = client, seed
        dice = random.Random(seed)
        self._bodies = [draw_body(dice) for _ in range(distinct)]
        self._answers = [answer(client, body, stream=False) for body in self._bodies]
        self.wrong: list[Any] = []
        self.counts: Counter[str] = Counter()

    def blow(self, requests: int, clients: int) -> None:
        """Have ``clients`` clients send ``requests`` requests, among bad clients."""
        held: list[socket.socket] = []
        shares = [len(range(index, requests, clients)) for index in range(clients)]
        with ThreadPoolExecutor(clients + len(BAD)) as pool:
            done = threading.Event()
            bad = [pool.submit(self._misbehave, kind, done, held) for kind in BAD]
            for asking in [pool.submit(self._ask, index, share) for index, share in enumerate(shares)]:
                asking.result()
            done.set()
            for misbehaving in bad:
                misbehaving.result()
        for connection in held:
            connection.close()

    def _ask(self, client: int, requests: int) -> None:
        dice = random.Random(f"{self._seed} {client}")
        for _ in range(requests):
            number = dice.randrange(len(self._bodies))
            if dice.random() < GIVEN_UP:
                give_up(self._client, self._bodies[number], dice)
                self.counts["given up"] += 1
                continue
            body = self._bodies[number] | {"priority": dice.randrange(-2, 3)}
            found = answer(self._client, body, stream=dice.random() < 0.5)
            self.counts["answered"] += 1
            if found != self._answers[number]:
                self.wrong.append((self._bodies[number], self._answers[number], found))

    def _misbehave(self, kind: Callable[..., None], done: threading.Event, held: list[socket.socket]) -> None:
        dice = random.Random(f"{self._seed} {kind.__name__}")
        for _ in range(50):
            kind(self._client, dice, held)
            self.counts[kind.__name__] += 1
            if done.is_set():
                return


def memory(client: Client) -> dict[str, int]:
    """Resident bytes of the server's processes."""
    found = {}
    for process in marked(client.mark):
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
            found[process] = pages * os.sysconf("SC_PAGE_SIZE")
    return found


def files(client: Client) -> int:
    """Open files of the process that serves."""
    return len(os.listdir(f"/proc/{client.process.pid}/fd"))


def settle(client: Client) -> None:
    """Wait until the server holds no request."""
    while True:
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            status, found = client.ask("/status")
            if status == 200 and not found["requests"] and not found["running"] + found["waiting"]:
                return


def run(requests: int, clients: int, distinct: int, seed: int, ranks: int) -> list[str]:
    """What has gone wrong, and on the way a line for each finding."""
    with serving("--ranks", str(ranks), "--max-queue", str(2 * clients), "--grace", str(HANG_S)) as client:
        storm = Storm(client, distinct, seed)
        settle(client)
        open_files = files(client)
        storm.blow(requests // 4, clients)
        settle(client)
        before = memory(client)
        storm.blow(requests - requests // 4, clients)
        settle(client)
        after = memory(client)
        while files(client) > open_files:
            settle(client)
        print(f"seed {seed}: " + ", ".join(f"{name} {count}" for name, count in sorted(storm.counts.items())))
        problems = [f"seed {seed}: {body} gave {found}, not {wanted}" for body, wanted, found in storm.wrong]
        for process, nbytes in after.items():
            print(f"process {process}: {before.get(process, 0) >> 20} MiB, then {nbytes >> 20} MiB")
            if nbytes > before.get(process, 0) * (1 + GROWTH_SHARE) + GROWTH_NBYTES:
                problems.append(f"seed {seed}: process {process} grew from {before.get(process)} to {nbytes} bytes")
        return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--distinct", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    problems = run(args.requests, args.clients, args.distinct, args.seed, args.ranks)
    print("\n".join(problems) or "all answers are those of the first time")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
