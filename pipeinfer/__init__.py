"""pipeinfer: LLM decoding over MPI with asynchronous pipelined speculation.

``from pipeinfer import Engine, Sampling`` is all that most programs need; ``Completion`` and ``Handle`` are what an
engine returns, ``UserError`` what it raises for what cannot be served. Importing this package loads neither torch nor
mpi4py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeinfer.core.version import __version__

if TYPE_CHECKING:
    from pipeinfer.core.errors import UserError
    from pipeinfer.core.ports import Sampling
    from pipeinfer.engine.answer import Completion, Handle
    from pipeinfer.engine.engine import Engine

__all__ = ["Completion", "Engine", "Handle", "Sampling", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the engine only when somebody asks for it."""
    if name in __all__:
        return getattr(importlib.import_module("pipeinfer.engine"), name)
    raise AttributeError(f"module 'pipeinfer' has no attribute {name!r}")
