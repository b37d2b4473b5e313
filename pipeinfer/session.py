"""A request being served."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeinfer.ports import Request, Tally
from speculation.tree import Tree


@dataclass(slots=True)
class Session:
    """How far a request is: ``prefilled`` tokens of its prompt are on their way, ``emitted`` tokens are out."""

    request: Request
    number: int
    tree: Tree
    tally: Tally = field(default_factory=Tally)
    prefilled: int = 0
    emitted: int = 0
    is_over: bool = False

    @property
    def last_position(self) -> int:
        """The last position whose choice may still be emitted."""
        return len(self.request.prompt) + self.request.max_new_tokens - 2
