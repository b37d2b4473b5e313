"""Schedules: when the target gets which nodes of the tree, and when drafters are asked for more.

The orchestrator has the means (credits, slots, messages); a schedule has the say. Whenever something has changed the
orchestrator asks ``next`` until there is nothing more to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from speculation.trees.tree import Node, Tree

Placement = Literal["spread", "oversubscribed", "alone"]
"""What processors a job's roles have. "spread": every rank its own. "oversubscribed": ranks are more than cores, and
take each other's time. "alone": one rank is everything; draft and target take turns, the target first."""
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


@dataclass(slots=True)
class Situation:
    """What a schedule decides upon: the tree, how many ``credits`` the first stage has given, how many runs are
    ``in_flight`` and how many more may be (``slots``), for how many guesses there are slots (``room``)."""

    tree: Tree
    credits: int
    in_flight: int
    slots: int
    room: int
    now: float = 0.0


@dataclass(slots=True)
class Launch:
    """Send these nodes as one run, parents first. ``nodes`` have been taken from the tree. ``copies`` are in flight
    already and go once more, in vain: rivals do that, and pay for it. ``is_canonical``: never cancelled."""

    nodes: list[Node]
    copies: list[Node] = field(default_factory=list)
    is_canonical: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """Have drafters do ``passes`` more passes, or UNLIMITED, taking no token less probable than ``cutoff`` and no more
    than ``draft_batch`` at a time (0: as the policy says); ``restart``: from the last accepted token, with all guesses
    forgotten. A counted number of passes is answered when they are done."""

    passes: int
    cutoff: float = 0.0
    restart: bool = False
    draft_batch: int = 0


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again at time ``until``, even if nothing has changed by then. Not said again before something has."""

    until: float


UNLIMITED = 0xFFFFFFFF

Step = Launch | Order | Wait


class Schedule(Protocol):
    """Says what is to be done next."""

    def opened(self) -> None:
        """A new request begins; its prompt is on its way."""
        ...

    def next(self, now: Situation) -> Step | None:
        """What to do in this situation, or None for nothing until something changes."""
        ...

    def drafted(self, nodes: list[Node]) -> None:
        """An order is done; ``nodes`` are what it found, parents first, whether or not they were new."""
        ...

    def accepted(self, tokens: int, now: float) -> str:
        """The tree has a new root, so many ``tokens`` below the old one. Returns what that decided, in words."""
        ...

    def computed(self, rows: int, seconds: float) -> None:
        """The first stage spent ``seconds`` on ``rows`` rows: an early word of what a run costs, often told again."""
        ...

    def returned(self, rows: int, slowest_s: float | None, trip_s: float, carries_root: bool) -> None:
        """A run of ``rows`` rows was computed: seconds of the slowest stage, None if that did not have all of them, and
        from its launch to its result."""
        ...

    def defers_results(self, now: Situation) -> bool:
        """Whether results have to wait."""
        ...
