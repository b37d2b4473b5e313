"""Requests: the one being served, and those that wait."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.ports import Request, RequestStats, Submitted
from speculation.trees.tree import Tree


@dataclass(slots=True)
class Session:
    """How far a request is: ``prefilled`` tokens of its prompt are on their way, ``emitted`` tokens are out.

    ``caller_number``: the caller's id of the request; ``sequence``: the id that messages carry."""

    request: Request
    caller_number: int
    sequence: int
    tree: Tree
    stats: RequestStats = field(default_factory=RequestStats)
    prefilled: int = 0
    emitted: int = 0
    is_over: bool = False

    @property
    def last_position(self) -> int:
        """The last position whose choice may still be emitted."""
        return len(self.request.prompt) + self.request.max_new_tokens - 2


class Waiting:
    """Requests that wait to be served, first come first served. ``context``: most tokens of a request."""

    def __init__(self, context: int) -> None:
        self._context = context
        self._requests: dict[int, Request] = {}  # by the caller's number, in the order of submission

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def numbers(self) -> list[int]:
        """The callers' numbers, the next one first."""
        return list(self._requests)

    def add(self, submitted: Submitted) -> None:
        """Put a request at the end. Raises LocalProtocolError for one that cannot be served."""
        request = submitted.request
        if submitted.number in self._requests:
            raise LocalProtocolError(f"request {submitted.number} was submitted while another one of that number waits")
        if not request.prompt or request.max_new_tokens < 1:
            raise LocalProtocolError("a request needs a prompt and at least one new token")
        if len(request.prompt) + request.max_new_tokens > self._context:
            raise LocalProtocolError(f"the request needs more than the context of {self._context} tokens")
        self._requests[submitted.number] = request

    def take(self) -> tuple[int, Request]:
        """The next request and its number; it does not wait any more."""
        number = next(iter(self._requests))
        return number, self._requests.pop(number)

    def remove(self, number: int) -> bool:
        """Forget request ``number``; whether it was waiting."""
        return self._requests.pop(number, None) is not None
