"""One pass of a draft model over rows of several sequences, and which leaves it evaluates.

Each sequence with passes left offers nodes: the accepted ones that the draft has not seen, then its best guesses. The
accepted ones all go; without them a sequence could not go on. Of the guesses of all sequences the most probable go, as
many as give the most useful rows per second. Equally probable guesses go in the order in which their sequences were
served last. A sequence that has been passed over PATIENCE times has its best guess evaluated whatever its probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.messages import MAX_ROWS
from speculation.drafter.sequence import DraftSequence
from speculation.schedules.cost_curve import CostCurve
from speculation.schedules.schedule import UNLIMITED
from speculation.trees.tree import Node

Chosen = list[tuple[DraftSequence, list[Node]]]
"""Of each sequence that a pass serves the nodes that it evaluates."""
PATIENCE = 4
"""Passes over leaves in a row that may leave out a sequence which offered some."""


@dataclass(slots=True)
class Part:
    """What a pass has of one sequence. ``wanted``: rows of the pass after which choices are wanted; ``nodes``: theirs,
    none where the choices are of no use any more."""

    sequence: int
    wanted: tuple[int, ...]
    nodes: list[Node]


@dataclass(slots=True)
class Pass:
    """The pass under way: its number of rows, and its parts in the order of their rows."""

    rows: int
    parts: list[Part]

    @property
    def nodes(self) -> list[Node]:
        """The nodes whose choices it is to find."""
        return [node for part in self.parts for node in part.nodes]

    def evaluated(self, sequence: int) -> list[Node]:
        """Those of ``sequence``."""
        return [node for part in self.parts if part.sequence == sequence for node in part.nodes]


@dataclass(slots=True)
class Offer:
    """Nodes that ``sequence`` has taken from its tree for the next pass, best first. ``useful``: the probability of
    each that it is of use. ``certain``: so many of them, the first ones, are accepted tokens."""

    sequence: DraftSequence
    nodes: list[Node]
    useful: list[float]
    certain: int


def take_back(offers: Sequence[Offer]) -> None:
    """What was offered waits for a later pass."""
    for offer in offers:
        if offer.sequence.tree is not None:
            offer.sequence.tree.give_back(offer.nodes)


def choose(
    offers: list[Offer], allocator: SlotAllocator, curve: CostCurve | None, number: int
) -> tuple[Chosen, list[DraftSequence]]:
    """What pass ``number`` evaluates of ``offers``; the rest goes back to the trees. Also the sequences of which it can
    evaluate nothing before the target has accepted more, as their guesses find no slot. A sequence whose accepted
    tokens find no slot goes mute."""
    offers.sort(key=lambda offer: offer.sequence.served)
    fitting, later, rows = list[Offer](), list[Offer](), MAX_ROWS
    for offer in offers:
        if MAX_ROWS - rows + offer.certain > allocator.free_slots():
            offer.sequence.silence(allocator)
        elif offer.certain > rows:
            later.append(offer)
        else:
            fitting.append(offer)
            rows -= offer.certain
    take_back(later)
    room = allocator.room(reserve=MAX_ROWS - rows)
    chosen: Chosen = []
    for offer, count in zip(fitting, best_counts(fitting, curve, room), strict=True):
        sequence, tree, nodes = offer.sequence, offer.sequence.tree, offer.nodes[:count]
        if tree is None:
            continue
        tree.give_back(offer.nodes[count:])
        sequence.ahead.update(node for node in nodes if node.position > tree.root.position)
        sequence.passed_over = 0 if nodes else sequence.passed_over + 1
        if nodes:
            sequence.served = number
            sequence.passes -= sequence.passes != UNLIMITED
            chosen.append((sequence, nodes))
    return chosen, [offer.sequence for offer in offers if offer.sequence.is_mute or not (room or offer.certain)]


def best_counts(offers: Sequence[Offer], curve: CostCurve | None, guesses: int) -> list[int]:
    """How many nodes of each of ``offers`` a pass evaluates, from the first on. The offers are sorted by when their
    sequences were served last. All certain nodes go, and at most ``guesses`` others."""
    counts = [offer.certain for offer in offers]
    certain = sum(counts)
    room = min(guesses, MAX_ROWS - certain)
    merged = sorted(
        (-offer.useful[index], rank, index)
        for rank, offer in enumerate(offers)
        for index in range(offer.certain, len(offer.nodes))
    )[:room]
    if curve is not None:
        useful = [probability for offer in offers for probability in offer.useful[: offer.certain]]
        useful += [-negative for negative, _, _ in merged]
        del merged[max(0, curve.best_count(useful) - certain) :]
    for _, rank, _ in merged:
        counts[rank] += 1
    room -= len(merged)
    for rank, offer in enumerate(offers):
        if room > 0 and counts[rank] == 0 and offer.sequence.passed_over >= PATIENCE:
            counts[rank], room = 1, room - 1
    return counts
