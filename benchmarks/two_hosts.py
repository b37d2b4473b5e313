"""Two ranks on two hosts that a slow link joins: what the link costs a token, and the first one.

    python -m benchmarks.two_hosts [--rate 1gbit] [--prompt 512] [--tokens 32] [--repeats 3] [-- OPTION ...]

The hosts are network namespaces of this machine, joined by a pair of virtual interfaces; one rank runs in each. OPTIONs
are those of `pipeinfer run` (`--target DIR --policy plain`). Runs with the link as it is and with the link limited to
--rate take turns. Their tokens must be equal. What the limited link adds is all that hiding transfers behind
computation could save: `at most` is that ceiling. A first run of each kind is not counted. Needs root, Open MPI from
the environment, and the programs ip, tc and unshare.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.mpiexec import find_mpiexec
from pipeinfer.core.errors import PipeinferError, refuse

HOSTS = {"pipeinfer-a": "10.213.7.1", "pipeinfer-b": "10.213.7.2"}
NETWORK = "10.213.7.0/24"
INTERFACE = "pipeinfer0"
BURST = "64kb"
DEADLINE_S = 900
AGENT = """#!/bin/sh
# Open MPI calls this as it calls ssh: a host, then a command for its shell.
while [ "${1#-}" != "$1" ]; do shift; done
shift
exec ip netns exec pipeinfer-b unshare -u sh -c "hostname pipeinfer-b; $*"
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit", help="of the limited link, as tc says it")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="new ones")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("option", nargs="*", help="of `pipeinfer run`")
    args = parser.parse_args()
    try:
        refuse_missing()
        with tempfile.TemporaryDirectory(prefix="pipeinfer-hosts-") as place, two_hosts():
            return compare(args, Path(place))
    except PipeinferError as error:
        print(f"benchmarks.two_hosts: {error}", file=sys.stderr)
        return error.exit_code


def refuse_missing() -> None:
    if os.geteuid():
        refuse("network namespaces need root", "run as root, in a machine or container of your own")
    for program in ("ip", "tc", "unshare"):
        if shutil.which(program) is None:
            refuse(f"the program {program} is missing", "on Debian: apt install iproute2 util-linux")


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two namespaces with an interface each."""
    try:
        for name in HOSTS:
            call("ip", "netns", "add", name)
            call("ip", "-n", name, "link", "set", "lo", "up")
        first, second = HOSTS
        call("ip", "link", "add", INTERFACE, "netns", first, "type", "veth", "peer", INTERFACE, "netns", second)
        for name, address in HOSTS.items():
            call("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            call("ip", "-n", name, "link", "set", INTERFACE, "up")
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        refuse(f"`{' '.join(command)}` failed: {done.stderr.strip()}", "run as root, where namespaces are allowed")


def limit(rate: str) -> None:
    """Limit the link to ``rate`` in both directions; not at all if that is empty."""
    for name in HOSTS:
        if rate:
            shape = ["tbf", "rate", rate, "burst", BURST, "latency", "50ms"]
            call("tc", "-n", name, "qdisc", "replace", "dev", INTERFACE, "root", *shape)
        else:
            subprocess.run(
                ["tc", "-n", name, "qdisc", "delete", "dev", INTERFACE, "root"], check=False, stderr=subprocess.DEVNULL
            )


def run(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """What `pipeinfer run --json` says, on a rank of each host."""
    agent = place / "agent"
    agent.write_text(AGENT)
    agent.chmod(0o755)
    first, second = HOSTS.values()
    prompt = ",".join(str(7 + 13 * index % 241) for index in range(args.prompt))
    program = [sys.executable, "-m", "pipeinfer", "run", "--json", "--ignore-eos", "--prompt-tokens", prompt]
    program += ["--max-new-tokens", str(args.tokens), *args.option]
    flags = ["--allow-run-as-root", "--prtemca", "plm_ssh_agent", str(agent), "--host", f"{first}:1,{second}:1"]
    flags += ["-x", "PYTHONPATH", "--bind-to", "none"] if "PYTHONPATH" in os.environ else ["--bind-to", "none"]
    for layer, name, value in (
        ("--mca", "pml", "ob1"),
        ("--mca", "btl", "self,tcp"),
        ("--mca", "btl_tcp_if_include", NETWORK),
        ("--prtemca", "prte_if_include", NETWORK),
    ):
        flags += [layer, name, value]
    inside = 'hostname pipeinfer-a; exec "$@"'
    command = ["ip", "netns", "exec", "pipeinfer-a", "unshare", "-u", "sh", "-c", inside, "sh"]
    done = subprocess.run(
        [*command, find_mpiexec(), *flags, *program], capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    if done.returncode:
        refuse(f"`pipeinfer run` ended with {done.returncode}: {done.stderr.strip()[-2000:]}", "see its message")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(args: argparse.Namespace, place: Path) -> int:
    rates = {"free": "", args.rate: args.rate}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rates}
    for turn in range(1 + args.repeats):
        for name in [*rates] if turn % 2 else [*rates][::-1]:
            limit(rates[name])
            answer = run(args, place)
            if turn:
                found[name].append(answer)
    tokens = {tuple(answer["tokens"]) for answers in found.values() for answer in answers}
    medians = {
        name: {key: statistics.median(one["metrics"][key] for one in answers) for key in ("ttft_ms", "tpot_ms")}
        for name, answers in found.items()
    }
    for name, times in medians.items():
        print(f"link {name}: first token {times['ttft_ms']:.1f} ms, each further one {times['tpot_ms']:.2f} ms")
    free, limited = medians.values()
    gains = {key: limited[key] / free[key] for key in free}
    print(f"at most {gains['ttft_ms']:.3f} times as fast to the first token, {gains['tpot_ms']:.3f} after it")
    print(f"tokens {'equal' if len(tokens) == 1 else 'DIFFER'}")
    return int(len(tokens) > 1)


if __name__ == "__main__":
    sys.exit(main())
