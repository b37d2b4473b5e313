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
