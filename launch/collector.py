"""Python's cyclic garbage collector in processes that we start; a program that uses the engine keeps its settings."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """What is loaded stays while the ``with`` lasts: the collector would look at all of it, for as long as many a run
    takes. For ranks that we start and for our own commands."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """The collector rests while the ``with`` lasts: importing torch makes a million objects and hardly any garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
