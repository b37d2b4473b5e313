"""pipeinfer: one-request LLM decoding over MPI with asynchronous pipelined speculation.

``from pipeinfer import Engine, Sampling`` is the whole public surface; importing this package loads neither torch nor
mpi4py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeinfer.engine import Engine
    from pipeinfer.ports import Sampling

__version__ = "0.1.0"
__all__ = ["Engine", "Sampling", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the engine only when somebody asks for it."""
    if name in ("Engine", "Sampling"):
        import pipeinfer.engine

        return getattr(pipeinfer.engine, name)
    raise AttributeError(f"module 'pipeinfer' has no attribute {name!r}")
