"""Schedules: when the target gets which nodes of the tree, and when drafters are asked for more.

The orchestrator owns credits, slots and messages; a schedule decides. After every change the orchestrator calls
``next`` until ``next`` returns None or a Wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from speculation.trees.tree import Node, Tree

Placement = Literal["spread", "oversubscribed", "alone"]
"""The processors of a job's roles. "spread": every rank has its own. "oversubscribed": ranks are more than cores and
slow each other down. "alone": one rank has all roles; draft and target alternate, the target first."""
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


ANY = 1 << 30
"""Any number of sequences, or of slots."""


@dataclass(slots=True)
class Situation:
    """The input of a decision: the ``trees`` of all sequences that are decoded, in the order in which they began,
    unused ``credits`` of the first stage, runs ``in_flight``, further runs that may be in flight (``slots``), free KV
    slots for drafted nodes (``room``) and for roots (``root_room``), and the number of further sequences of whose
    ``prompts`` a part waits."""

    trees: Sequence[Tree]
    credits: int
    in_flight: int
    slots: int
    room: int
    now: float = 0.0
    root_room: int = ANY
    prompts: int = 0

    @property
    def tree(self) -> Tree:
        """The tree of the sequence that is decoded alone."""
        return self.trees[0]


@dataclass(slots=True)
class Launch:
    """Send ``nodes`` as one run, parents first; they have been taken from the tree. ``copies`` are nodes that are
    already in flight and are sent again without effect, as PipeInfer's schedule does. ``is_canonical``: never
    cancelled."""

    nodes: list[Node]
    copies: list[Node] = field(default_factory=list)
    is_canonical: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """Order drafters to make ``passes`` more passes on ``sequence`` (None: on each one), or UNLIMITED. Drafters take no
    token with a probability below ``cutoff`` and evaluate at most ``draft_batch`` leaves per pass (0: the policy's
    number). ``restart``: drafters discard their trees and start at the last accepted token. ``shared``: of several
    drafters one makes the passes, and the others none; they share the sequences. Drafters answer when a finite number
    of passes is done."""

    passes: int
    cutoff: float = 0.0
    restart: bool = False
    draft_batch: int = 0
    sequence: int | None = None
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """Call ``next`` again at time ``until``, even without a change. ``next`` returns no second Wait before a change."""

    until: float


UNLIMITED = 0xFFFFFFFF

Step = Launch | Order | Wait


class Schedule(Protocol):
    """Decides the next step. ``most_sequences``: that it can decode at once."""

    most_sequences: int

    @property
    def guesses(self) -> bool:
        """Whether the next runs may carry guesses. While they may not, nobody looks for any."""
        ...

    def opened(self, tree: Tree) -> None:
        """A sequence begins with ``tree``; its prompt is about to leave."""
        ...

    def closed(self, tree: Tree) -> None:
        """The sequence of ``tree`` is over."""
        ...

    def next(self, now: Situation) -> Step | None:
        """The next step in this situation; None for no step until the next change."""
        ...

    def drafted(self, tree: Tree, nodes: list[Node]) -> None:
        """An order for ``tree`` is done; ``nodes`` are its nodes, parents first, new or not."""
        ...

    def accepted(self, tree: Tree, tokens: int, now: float) -> str:
        """``tree`` has a new root, ``tokens`` levels below the old one. Returns the schedule's decision as text; "" for
        none."""
        ...

    def restarts(self, accepted: Sequence[Node]) -> bool:
        """Whether drafting begins again at the last of the ``accepted`` nodes, with all guesses forgotten."""
        ...

    def computed(self, rows: int, seconds: float) -> None:
        """The first stage computed ``rows`` rows in ``seconds``: an early measurement of a run, which may be
        repeated."""
        ...

    def returned(self, rows: int, slowest_s: float | None, trip_s: float, carries_root: bool) -> None:
        """A run of ``rows`` rows returned. ``slowest_s``: seconds of the slowest stage, None if that stage did not
        compute all rows. ``trip_s``: seconds from launch to result. ``carries_root``: whether the run held the root."""
        ...

    def defers_results(self, now: Situation) -> bool:
        """Whether a result that arrives now has to wait."""
        ...
