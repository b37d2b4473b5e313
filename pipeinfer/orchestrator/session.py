"""Sessions: requests that are being decoded, and the queue of those that wait."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.messages import NO_TOKEN
from pipeinfer.core.ports import Request, RequestStats, Submitted
from speculation.trees.tree import Tree


@dataclass(slots=True, eq=False)
class Session:
    """How far a request is: ``prefilled`` tokens of its prompt are on their way, ``emitted`` tokens are out.
    ``scored``: how many of the first tokens of the request's prompt need no log-probabilities any more.

    ``caller_number``: the caller's id of the request; ``sequence``: the id that messages carry, 0 while the request
    waits. ``text``: the request's prompt and all tokens that are out. ``prompt``: how many of them were known when the
    sequence began; more than the request's prompt if the request was preempted. ``runs``: in flight with rows of it."""

    request: Request
    caller_number: int
    arrival: int
    text: list[int]
    sequence: int = 0
    tree: Tree = field(default_factory=lambda: Tree(0, 0, 0))
    stats: RequestStats = field(default_factory=RequestStats)
    prompt: int = 0
    prefilled: int = 0
    shared: int = 0  # tokens of the prompt whose slots another sequence had when this one began
    emitted: int = 0
    runs: int = 0
    has_result: bool = False  # whether the target has read the whole prompt
    is_over: bool = False
    is_preempted: bool = False  # over for now: it begins again
    scored: int = 0

    def __post_init__(self) -> None:
        sampling, prompt = self.request.sampling, self.request.prompt
        self.scored = len(prompt) if sampling.prompt_logprobs is None else 1

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of its prompt are still wanted."""
        return self.scored < len(self.request.prompt)

    def next_token(self, position: int) -> int:
        """The token after ``position``, if its log-probability is wanted, else NO_TOKEN."""
        is_wanted = self.scored <= position + 1 < len(self.request.prompt)
        return self.text[position + 1] if is_wanted else NO_TOKEN

    @property
    def last_position(self) -> int:
        """The last position whose choice may still be emitted, or the prompt's last one."""
        return len(self.request.prompt) + max(1, self.request.max_new_tokens) - 2

    @property
    def left(self) -> int:
        """Tokens that may still be emitted."""
        return self.request.max_new_tokens - self.emitted

    @property
    def rank(self) -> tuple[int, int]:
        """Its place in every queue: the lowest is served first, and preempted last."""
        return self.request.priority, self.arrival

    def begin(self, sequence: int, max_nodes: int) -> None:
        """Begin as ``sequence``: nothing of the text is on its way yet, and all of it is a prompt."""
        self.sequence, self.prompt, self.prefilled = sequence, len(self.text), 0
        self.has_result = self.is_over = self.is_preempted = False
        self.tree = Tree(self.text[-1], len(self.text) - 1, max_nodes, sequence)
        self.tree.take(self.tree.root)  # it leaves with the prompt


class Split(NamedTuple):
    """Sessions by what they do: those that are ``decoding``, those whose ``prompts`` have not left whole. ``trees``: of
    the former, or of the latter where there are none."""

    decoding: list[Session]
    prompts: list[Session]
    trees: list[Tree]


class Active(dict[int, Session]):
    """The sessions that have a place, by sequence, in the order in which they began."""

    def __init__(self) -> None:
        super().__init__()
        self._split: Split | None = None

    def __setitem__(self, sequence: int, session: Session) -> None:
        super().__setitem__(sequence, session)
        self._split = None

    def __delitem__(self, sequence: int) -> None:
        super().__delitem__(sequence)
        self._split = None

    def prefilled(self) -> None:
        """More of a prompt has left."""
        self._split = None

    def split(self) -> Split:
        """See Split. It is kept until a session comes, goes, or is prefilled, as every event asks for it."""
        if self._split is None:
            decoding = [one for one in self.values() if one.prefilled == one.prompt]
            prompts = [one for one in self.values() if one.prefilled < one.prompt]
            self._split = Split(decoding, prompts, [one.tree for one in decoding or prompts])
        return self._split


class Waiting:
    """Requests that wait to be served, by priority, then first come first served. ``context``: most tokens of one."""

    def __init__(self, context: int) -> None:
        self._context = context
        self._sessions: list[Session] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def numbers(self) -> list[int]:
        """The callers' numbers, the next one first."""
        return [session.caller_number for session in self._sessions]

    @property
    def next(self) -> Session | None:
        """The next one to be served."""
        return self._sessions[0] if self._sessions else None

    def submit(self, submitted: Submitted) -> None:
        """Put a new request in its place. Raises LocalProtocolError for one that cannot be served."""
        request = submitted.request
        least = 1 if request.sampling.prompt_logprobs is None else 0
        if not request.prompt or request.max_new_tokens < least:
            raise LocalProtocolError("a request needs a prompt and at least one new token, or log-probabilities of it")
        if len(request.prompt) + request.max_new_tokens > self._context:
            raise LocalProtocolError(f"the request needs more than the context of {self._context} tokens")
        self._arrivals += 1
        self.put(Session(request, submitted.number, self._arrivals, list(request.prompt)))

    def put(self, session: Session) -> None:
        """Put ``session`` in its place."""
        bisect.insort(self._sessions, session, key=lambda one: one.rank)

    def take(self) -> Session:
        """The next one; it does not wait any more."""
        return self._sessions.pop(0)

    def remove(self, number: int) -> Session | None:
        """Forget request ``number``; it, if it was waiting."""
        for index, session in enumerate(self._sessions):
            if session.caller_number == number:
                return self._sessions.pop(index)
        return None
