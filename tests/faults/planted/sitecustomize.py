"""Loaded by Python itself in every process of a job under test: plants one fault in one rank.

PIPEINFER_FAULT says ``RANK,PHASE,KIND``; rank ``parent`` is the process that starts the others,
``all`` is every rank. When the phase is
reached there, the time is written to the file PIPEINFER_FAULT_AT, and the fault happens, once.
"""

import hashlib
import importlib.abc
import importlib.util
import os
import signal
import sys
import time

PLACES = {
    "joining": (("pipeinfer.core.config", "Config.of", 0),),  # only ranks that we start have it, before MPI
    "inside MPI": (("launch.mpi", "World.__init__", 0),),
    "checking": (("launch.preflight", "clear", 0), ("pipeinfer.cli.installation", "facts", 0)),
    "loading": (("launch.job", "load_shards", 0),),
    "serving": (("pipeinfer.runtime.executor", "Executor.step", 12),),
    "following": (("stages.models.group_shard", "Follower.handle", 300),),  # on ranks that a group's leader commands
    "closing": (("launch.job", "Job._end", 0),),
}
"""Where each phase is: a module, what in it is called, and how many calls go well."""


def own_rank():
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if name in os.environ:
            return os.environ[name]
    return "parent"


def happen(kind):
    with open(os.environ["PIPEINFER_FAULT_AT"], "w") as file:
        file.write(str(time.time()))
    if kind == "exception":
        raise RuntimeError("planted")
    if kind == "exit":
        raise SystemExit(7)
    if kind == "interrupt":
        raise KeyboardInterrupt
    while kind == "spin":  # in C for hours, as MPI does that waits for a message that never comes
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    os.kill(os.getpid(), {"sigterm": signal.SIGTERM, "freeze": signal.SIGSTOP}[kind])


def planted(right, kind, spared):
    left = [spared]

    def wrong(*args, **kwargs):
        left[0] -= 1
        if left[0] == -1:
            happen(kind)
        return right(*args, **kwargs)

    return wrong


class Planter(importlib.abc.MetaPathFinder):
    def __init__(self, places, kind):
        self.places, self.kind = places, kind

    def find_spec(self, name, path, target=None):
        found = [(what, spared) for module, what, spared in self.places if module == name]
        if not found:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for what, spared in found:
                *owners, last = what.split(".")
                owner = module
                for part in owners:
                    owner = getattr(owner, part)
                setattr(owner, last, planted(getattr(owner, last), self.kind, spared))

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("PIPEINFER_FAULT"):
    rank, phase, kind = os.environ["PIPEINFER_FAULT"].split(",")
    if rank in (own_rank(), "all"):
        sys.meta_path.insert(0, Planter(PLACES[phase], kind))
