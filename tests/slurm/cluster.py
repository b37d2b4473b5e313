"""A Slurm cluster of virtual nodes on this host: its own daemons, ports, key and configuration, in a directory of its
own; gone, with all that it has started, when it is left. Nothing in it needs root."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # where Debian has daemons
OUTER_JOB = ("SLURM_", "SBATCH_", "SRUN_", "OMPI_", "PMIX_", "PMI_")
START_S, END_S = 120.0, 120.0
UNDER_WAY = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}

# Virtual nodes share /tmp, where Slurm's PMIx plugin makes a directory named for the step alone: hence TmpFS.
# `linear` gives whole nodes, `builtin` in the order of asking: nothing here is about scheduling.
CONFIGURATION = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/%n/spool
TmpFS={place}/%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/%n/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
ReturnToService=2
KillWait=2
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000\n"
PARTITION = "PartitionName=all Nodes=ALL Default=YES MaxTime=10\n"


def missing() -> list[str]:
    """The programs that a cluster needs and this host lacks."""
    return [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not shutil.which(name, path=PATH)]


class Cluster:
    """Slurm's own commands, told of this cluster."""

    def __init__(self, place: Path, nodes: int) -> None:
        self.place = place
        outside = {name: value for name, value in os.environ.items() if not name.startswith(OUTER_JOB)}
        self.environ = {
            **outside,
            "PATH": PATH,
            "SLURM_CONF": str(place / "slurm.conf"),  # every process of the cluster and its jobs inherits it
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        self._nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *line: str | Path, timeout_s: float, **environ: str) -> subprocess.CompletedProcess[str]:
        """A command, in the cluster's directory; raises TimeoutExpired after ``timeout_s``."""
        return subprocess.run(
            line, env={**self.environ, **environ}, cwd=self.place, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def batch(self, script: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Submit ``script`` and wait for its end: the job's exit code and what it wrote."""
        submitted = self.run("sbatch", "--parsable", script, timeout_s=START_S)
        assert submitted.returncode == 0, submitted.stderr
        job: dict[str, str] = {}

        def ended() -> bool:
            told = self.run("scontrol", "show", "job", submitted.stdout.strip(), timeout_s=START_S).stdout
            job.update(re.findall(r"(\w+)=(\S+)", told))
            return job["JobState"] not in UNDER_WAY

        self.wait(ended, "end of the job", timeout_s)
        code, _, killed_by = job["ExitCode"].partition(":")
        output, errors = Path(job["StdOut"]).read_text(), Path(job["StdErr"]).read_text()
        return subprocess.CompletedProcess(str(script), int(code) or -int(killed_by), output, errors)

    def wait(self, done: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Return when ``done``. Fail, with what daemons and jobs said, after ``timeout_s`` or when a daemon ends."""
        deadline = time.monotonic() + timeout_s
        newest = list(self._daemons.values())[-1]
        while not done():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            assert not ended, f"{ended} ended during the wait for {what}\n{self._said()}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s\n{self._said()}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                newest.wait(0.1)  # until it is worth asking again

    def start(self) -> None:
        """Start the daemons and wait until all nodes are idle."""
        self._configure()
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        places = [f"--{option}={self.place}/munge.{suffix}" for option, suffix in files.items()]
        self._daemon("munged", "munged", "--foreground", *places)
        self.wait((self.place / "munge.socket").exists, "munged's socket", START_S)
        self._daemon("slurmctld", "slurmctld", "-D")
        self.wait(lambda: self.run("scontrol", "ping", timeout_s=START_S).returncode == 0, "slurmctld", START_S)
        for node in self._nodes:
            self._daemon(node, "slurmd", "-D", "-N", node)
        self.wait(self._all_idle, "idle nodes", START_S)

    def stop(self) -> None:
        """End the daemons, then whatever they have left."""
        daemons = list(reversed(self._daemons.values()))
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(END_S / 4)
        deadline = time.monotonic() + END_S
        while left := self.processes():
            assert time.monotonic() < deadline, f"processes {left} do not end"
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        for daemon in daemons:
            daemon.wait(END_S)

    def processes(self) -> list[int]:
        """All that this cluster and its jobs have running: what inherited its SLURM_CONF."""
        mark = f"SLURM_CONF={self.environ['SLURM_CONF']}\0".encode()
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has just ended, or is not ours
                if mark in environ.read_bytes():
                    found.append(int(environ.parent.name))
        return found

    def _configure(self) -> None:
        key = self.place / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        for name in ("state", *self._nodes):
            (self.place / name).mkdir()
        host = socket.gethostname().partition(".")[0]
        port, *ports = _free_ports(1 + len(self._nodes))
        user = pwd.getpwuid(os.geteuid()).pw_name
        lines = CONFIGURATION.format(host=host, port=port, user=user, place=self.place)
        lines += "".join(
            NODE.format(name=name, host=host, port=port) for name, port in zip(self._nodes, ports, strict=True)
        )
        (self.place / "slurm.conf").write_text(lines + PARTITION)

    def _daemon(self, name: str, *line: str) -> None:
        """Start one, in the foreground of a session of its own; it dies with us, even if we are killed."""
        with (self.place / f"{name}.out").open("wb") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *line], env=self.environ, cwd=self.place, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _said(self) -> str:
        files = sorted([*self.place.glob("*.out"), *self.place.glob("*.err")])
        return "\n".join(f"--- {file.name}\n{file.read_text()[-2000:]}" for file in files)

    def _all_idle(self) -> bool:
        told = self.run("sinfo", "--noheader", "--format=%T %D", timeout_s=START_S).stdout
        return told.split() == ["idle", str(len(self._nodes))]


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[Cluster]:
    """A cluster of ``nodes`` idle nodes with two cores each."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as place:
        os.chmod(place, 0o711)  # munged asks that its socket can be reached by all
        made = Cluster(Path(place), nodes)
        try:
            made.start()
            yield made
        finally:
            made.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
