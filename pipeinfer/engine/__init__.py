"""The engine: what a Python program opens to decode."""

from pipeinfer.core.errors import UserError
from pipeinfer.core.ports import Sampling
from pipeinfer.engine.answer import Completion, Handle
from pipeinfer.engine.engine import Engine

__all__ = ["Completion", "Engine", "Handle", "Sampling", "UserError"]
