"""pipeinfer: one-request LLM decoding over MPI with asynchronous pipelined speculation.

``from pipeinfer import Engine`` is the whole public surface; importing this package loads neither torch nor mpi4py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeinfer.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the engine only when somebody asks for it."""
    if name == "Engine":
        from pipeinfer.engine import Engine

        return Engine
    raise AttributeError(f"module 'pipeinfer' has no attribute {name!r}")
