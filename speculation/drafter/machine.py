"""The drafter: a draft model that keeps guessing and never waits for the target.

A sequence begins with its sampling settings; its prompt comes in parts and is prefilled. From then on every pass of the
draft model evaluates the most probable leaves of the sequence's tree, and the children that it finds are sent to the
orchestrator at once. Messages from the orchestrator only move the root: what survives a correction is kept, and what
the drafter computed below its own second choices is ready when one of them turns out right. A drafter pauses when it is
``max_ahead`` nodes ahead.

Under schedules that are not continuous a drafter works to orders: so many passes, then a Nodes message that ends the
order. Sequences are served in the order in which they began.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvbuffers.slot_allocator import SlotAllocator
from kvbuffers.slot_table import SlotTable
from pipeinfer.core.addresses import ORCHESTRATOR, address_name
from pipeinfer.core.edges import Edges
from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import (
    Advance,
    Body,
    Calibrate,
    Close,
    DraftNode,
    DraftOrder,
    Hello,
    Message,
    Nodes,
    Probe,
    Prompt,
    Row,
    Settings,
    Shutdown,
    Status,
)
from pipeinfer.core.ports import (
    GREEDY,
    Abandon,
    Command,
    Compute,
    Computed,
    Event,
    Halt,
    Received,
    SampledToken,
    Sampling,
    Send,
    Started,
)
from speculation.drafter.sequence import DraftSequence
from speculation.schedules.cost_curve import LEAF_WORTH, CostCurve, Costs
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import UNLIMITED
from speculation.trees.calibration import Calibration
from speculation.trees.tree import Node, Tree

LEAST_PATH = math.log(4.5e-4)
"""No child whose path is less probable than this is worth a name, even where rows are free; first choices are.
Found by trying, see docs/log.md."""


MOST_FAULTY = 8
"""Passes in a row whose numbers are not finite, after which the drafter sends nothing more in this request."""


@dataclass(slots=True)
class _Pass:
    """The pass under way: of which sequence, its rows, the rows whose choices are wanted, and their nodes."""

    sequence: int
    rows: int
    wanted: tuple[int, ...]
    nodes: list[Node]


class Drafter:
    """The machine of one draft model. ``context`` is the most tokens a request may have, prompt included.

    ``positions``: how many the model was made for (0: any number). No token beyond them is evaluated: the tree ends
    there, and of a prompt that is longer nothing is read. ``prior``: what passes are known to take."""

    def __init__(
        self, address: int, policy: Policy, context: int, digest: int = 0, positions: int = 0, prior: Costs = ()
    ) -> None:
        self.address = address
        self._policy = policy
        self._positions = positions or context
        self._digest = digest
        self._edges = Edges(address)
        self._allocator = SlotAllocator(context, policy.max_ahead + policy.draft_batch)
        self._table = SlotTable(self._allocator.capacity)
        self._sequences: dict[int, DraftSequence] = {}  # in the order in which they began
        self._pass: _Pass | None = None
        self._job = 0
        self._calibration = Calibration()
        self._curve = CostCurve(prior) if policy.govern else None

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; see Machine."""
        if isinstance(event, Received):
            return self._receive(event.message)
        if isinstance(event, Computed):
            return self._computed(event)
        if isinstance(event, Started):
            return [self._send(Hello(self._digest))]
        raise RemoteProtocolError(f"{address_name(self.address)} cannot handle {type(event).__name__}")

    def _send(self, body: Body) -> Send:
        return Send(self._edges.message(ORCHESTRATOR, body))

    def _report(self, sequence: DraftSequence, nodes: list[DraftNode], ends_order: bool) -> list[Command]:
        """What has been found, if it is anything or ends an order."""
        ends = sequence.is_ordered and ends_order
        if sequence.tree is None or not (nodes or ends):
            return []
        if ends:
            sequence.is_ordered, sequence.passes = False, 0  # passes that were not needed are not kept for later
        return [self._send(Nodes(sequence.id, sequence.tree.root.position, ends, tuple(nodes)))]

    def _receive(self, message: Message) -> list[Command]:
        self._edges.check(message)
        match message.body:
            case Settings() as settings:
                self._begin(settings.sequence, Sampling.of(settings))
            case Prompt() as prompt:
                sequence = self._sequences.get(prompt.sequence) or self._begin(prompt.sequence, GREEDY)
                sequence.take_prompt(prompt, self._policy, self._positions)
            case Advance() as advance:
                self._advance(advance)
            case DraftOrder() as order:
                return self._order(order) + self._next()
            case Calibrate() as calibrate:
                self._calibration = Calibration.of(calibrate)
            case Close(sequence_id):
                if self._sequences.pop(sequence_id, None):
                    self._allocator.free(sequence_id)
            case Shutdown():
                return [Halt()]
            case Probe():
                status = Status(self._pass is not None, self._job, 0, self._edges.taken)
                return [Send(Message(self.address, ORCHESTRATOR, status))]
            case _:
                raise RemoteProtocolError(f"{address_name(self.address)} got {message.kind}")
        return self._next()

    def _begin(self, sequence_id: int, sampling: Sampling) -> DraftSequence:
        sequence = self._sequences[sequence_id] = DraftSequence(sequence_id, sampling, self._policy.draft_batch)
        return sequence

    def _evaluated(self, sequence: DraftSequence) -> list[Node]:
        """The nodes of ``sequence`` whose choices the pass under way is to find."""
        return self._pass.nodes if self._pass and self._pass.sequence == sequence.id else []

    def _order(self, order: DraftOrder) -> list[Command]:
        """So many passes and no more; children that an earlier order held back may now be welcome."""
        sequence = self._sequences.get(order.sequence)
        if sequence is None:
            raise RemoteProtocolError(f"{address_name(self.address)} got an order before the sequence began")
        sequence.passes, sequence.cutoff = order.passes, order.cutoff
        sequence.draft_batch = min(order.draft_batch or self._policy.draft_batch, self._policy.draft_batch)
        sequence.is_ordered = 0 < order.passes < UNLIMITED
        if order.restart:
            self._restart(sequence)
        withheld, sequence.withheld = sequence.withheld, []
        found = [child for node, choices in withheld for child in self._children(sequence, node, choices)]
        sequence.passes -= bool(found) and sequence.passes not in (0, UNLIMITED)  # what is there is not computed again
        return self._report(sequence, found, ends_order=False)

    def _restart(self, sequence: DraftSequence) -> None:
        tree = sequence.tree
        sequence.restart(self._allocator, tree is not None and tree.root in self._evaluated(sequence))

    def _advance(self, message: Advance) -> None:
        sequence = self._sequences.get(message.sequence)
        if sequence is None or sequence.tree is None:
            raise RemoteProtocolError(f"{address_name(self.address)} got Advance before the prompt ended")
        sequence.advance(sequence.tree, message, self._allocator)
        if message.restart:
            self._restart(sequence)

    def _next(self) -> list[Command]:
        """Start the next pass, or give up one that nobody needs any more."""
        if self._pass is not None:
            nodes = self._pass.nodes
            wanted = self._pass.sequence in self._sequences and (not nodes or any(node.alive for node in nodes))
            return [] if wanted else [Abandon(self._job)]
        commands: list[Command] = []
        for sequence in self._sequences.values():
            if sequence.prefilled < len(sequence.prompt) and sequence.tree is not None and not sequence.is_mute:
                return [*commands, self._prefill(sequence, sequence.tree)]
            nodes = self._leaves(sequence) if sequence.passes and not sequence.is_mute else []
            if nodes and sequence.tree is not None:
                sequence.passes -= sequence.passes != UNLIMITED
                return [*commands, self._evaluate(sequence, nodes, sequence.tree.root.position)]
            commands += self._report(sequence, [], ends_order=True)
        return commands

    def _prefill(self, sequence: DraftSequence, tree: Tree) -> Compute:
        chunk = sequence.prompt[sequence.prefilled :][: self._policy.prefill_chunk]
        ops, rows = self._allocator.prompt_rows(sequence.id, chunk)
        sequence.prefilled += len(rows)
        ends = sequence.prefilled == len(sequence.prompt)
        self._table.apply(ops)
        if ends and sequence.origin is not None:
            sequence.origin.slot = rows[-1].slot
        # The prompt's last token is the tree's first root, unless the target has already passed it.
        nodes = [tree.root] if ends and tree.root.position == len(sequence.prompt) - 1 else []
        return self._compute(sequence, rows, nodes, (len(rows) - 1,) if ends else (), canonical=True)

    def _least_path_prob(self, sequence: DraftSequence) -> float:
        """The least path probability that is worth evaluating: none is too small where leaves cost nothing."""
        least_prob = self._policy.min_path_prob
        return (
            self._curve.least_probability(sequence.draft_batch, least_prob, LEAF_WORTH) if self._curve else least_prob
        )

    def _leaves(self, sequence: DraftSequence) -> list[Node]:
        """Take the nodes of the next pass: every accepted one that it has not seen, and of the best guesses, at most
        ``draft_batch``, as many as give the most useful ones per second."""
        tree, nodes, useful = sequence.tree, list[Node](), list[float]()
        if tree is None:
            return nodes
        least_prob, guesses, ahead = self._least_path_prob(sequence), 0, len(sequence.ahead)
        while len(nodes) < self._policy.prefill_chunk and (node := tree.best()) is not None:
            if node.position >= sequence.last_position:
                break
            probability = 1.0
            if node.position > tree.root.position:
                probability = tree.probability(node)
                if guesses >= sequence.draft_batch or ahead >= self._policy.max_ahead or probability < least_prob:
                    break
                ahead += 1
            guesses += node.position >= tree.root.position
            tree.take(node)
            useful.append(probability)
            nodes.append(node)
        if self._curve:
            # A pass that ends above the root finds nothing, and the next token would leave the draft as far behind.
            certain = sum(node.position <= tree.root.position for node in nodes)
            count = max(self._curve.best_count(useful), certain)
            tree.give_back(nodes[count:])
            del nodes[count:]
        sequence.ahead.update(node for node in nodes if node.position > tree.root.position)
        return nodes

    def _evaluate(self, sequence: DraftSequence, nodes: list[Node], root: int) -> Compute:
        ops = self._allocator.operations()
        self._table.apply(ops)
        rows = []
        for node, slot in zip(nodes, self._allocator.lease(sequence.id, len(nodes)), strict=True):
            rows.append(node.row(slot, sequence.id))
            if node.slot is not None:
                self._allocator.release(sequence.id, slot)  # a second look: its first slot is the one that counts
                continue
            node.slot = slot
            if node.position <= root:
                self._allocator.commit(sequence.id, slot)  # it is accepted already
        wanted = tuple(index for index, node in enumerate(nodes) if node.position >= root)
        return self._compute(sequence, rows, [nodes[index] for index in wanted], wanted, canonical=False)

    def _compute(
        self, sequence: DraftSequence, rows: list[Row], nodes: list[Node], wanted: tuple[int, ...], canonical: bool
    ) -> Compute:
        self._job += 1
        self._pass = _Pass(sequence.id, len(rows), wanted, nodes)
        batch = self._table.allocate(rows, canonical)
        if not wanted:
            return Compute(self._job, batch)
        draw = self._table.draw((sequence.sampling,) * len(wanted), batch, wanted, is_guess=True)
        return Compute(self._job, batch, rows=wanted, choices=self._policy.topk, draw=draw)

    def _computed(self, event: Computed) -> list[Command]:
        done, self._pass = self._pass, None
        sequence = self._sequences.get(done.sequence) if done else None
        if done is None or sequence is None:
            return self._next()
        if self._curve and done.nodes and event.choices:
            self._curve.observe(done.rows, event.seconds)
        found: list[DraftNode] = []
        faulty = [index in event.faults for index in done.wanted]
        for node, choices, is_faulty in zip(done.nodes, event.choices or (), faulty, strict=False):
            if not is_faulty:  # else nothing is known of what follows it
                found += self._children(sequence, node, choices)
        if faulty and event.choices:
            sequence.faulty_passes = sequence.faulty_passes + 1 if all(faulty) else 0
            sequence.is_mute |= sequence.faulty_passes >= MOST_FAULTY
        return self._report(sequence, found, ends_order=sequence.passes == 0) + self._next()

    def _children(self, sequence: DraftSequence, node: Node, choices: list[SampledToken]) -> list[DraftNode]:
        tree = sequence.tree
        if tree is None or not node.alive or node.position < tree.root.position:
            return []
        found, least = [], math.log(sequence.cutoff) if sequence.cutoff > 0 else -math.inf
        worth = LEAST_PATH - (node.logp - tree.root.logp)
        if least_prob := self._least_path_prob(sequence):
            worth = max(worth, math.log(least_prob / 4))  # less would hardly ever be sent, even after the root
        for rank, (token, claim) in enumerate(choices):
            if claim < least:
                sequence.withheld.append((node, choices))
                break
            logp = self._calibration.logp(rank, claim) if self._policy.calibrate else claim
            if logp < worth and rank:
                break
            child = tree.add(node, token, logp)
            if child is not None and child.name is None:
                sequence.names += 1
                child.name = sequence.names
                found.append(DraftNode(token, child.name, node.name or 0, claim))
        return found


def draft_slots(policy: Policy, context: int) -> int:
    """Slots of a draft model's shard."""
    return context + policy.max_ahead + policy.draft_batch
