"""The threads that this process computes with."""

from __future__ import annotations

import ctypes

from launch.cores import Cores, alone, asked_threads
from stages.kernels.library import SPIN_US, library


def thread_count(asked: int | None, cores: Cores | None, has_kernels: bool) -> int:
    """How many threads a rank has. ``asked``: by its user; None for as many as it can use. ``cores``: those of a rank
    among others; None for a rank that is alone.

    Where ranks share cores, the kernels have threads for all of them and use the idle ones. Without the kernels, or
    where ranks cannot count the idle ones, a rank has its fair share."""
    if cores is None:
        return alone(asked)
    usable = cores.count if has_kernels and cores.busy is not None else cores.fair
    return asked or asked_threads() or usable


def start_threads(asked: int | None, cores: Cores | None) -> int:
    """Start the kernels' threads, if there are kernels. Returns how many threads this rank has: see thread_count."""
    kernels = library()
    threads = thread_count(asked, cores, kernels is not None)
    if kernels is not None:
        shared = cores.busy if cores is not None else None
        owns = cores is None or threads <= cores.fair
        kernels.set_threads(threads, SPIN_US if owns else 0)
        kernels.share(None if shared is None else ctypes.c_int32.from_buffer(shared), cores.count if cores else threads)
    return threads
