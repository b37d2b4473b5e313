"""The drafter: a draft model that keeps guessing and never waits for the target.

A sequence begins with its sampling settings; its prompt comes in parts and is prefilled. From then on every pass of the
draft model evaluates the most probable leaves of the sequence's tree, and the children that it finds are sent to the
orchestrator at once. Messages from the orchestrator only move the root: what survives a correction is kept, and what
the drafter computed below its own second choices is ready when one of them turns out right. A drafter pauses when it is
``max_ahead`` nodes ahead.

Under schedules that are not continuous a drafter works to orders: so many passes, then a Nodes message that ends the
order. Each sequence has a tree and orders of its own, and one pass serves all of them (see draft_pass.py). Passes over
prompts and passes over leaves take turns where both are waiting; prompts are read in the order in which they came.

A sequence whose prompt or accepted tokens find no slot goes mute: it sends no more guesses, and gives its slots back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvbuffers.slot_allocator import SlotAllocator
from kvbuffers.slot_table import SlotTable
from pipeinfer.core.addresses import ORCHESTRATOR, address_name
from pipeinfer.core.edges import Edges
from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import (
    MAX_ROWS,
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
from speculation.drafter.draft_pass import Chosen, Offer, Part, Pass, choose, take_back
from speculation.drafter.sequence import DraftSequence
from speculation.schedules.cost_curve import LEAF_WORTH, CostCurve, Costs
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import UNLIMITED
from speculation.trees.calibration import Calibration
from speculation.trees.tree import Node

LEAST_PATH = math.log(4.5e-4)
"""No child whose path is less probable than this is worth a name, even where rows are free; first choices are.
Found by trying, see docs/log.md."""


MOST_FAULTY = 8
"""Passes in a row whose numbers are not finite, after which the drafter sends nothing more in this request."""

MOST_GUESSES = 4 * MAX_ROWS
"""Most slots for guesses of all sequences together, unless one sequence alone needs more."""


class Drafter:
    """The machine of one draft model. ``context`` is the most tokens a request may have, prompt included.

    ``positions``: how many the model was made for (0: any number). No token beyond them is evaluated: the tree ends
    there, and of a prompt that is longer nothing is read. ``prior``: what passes are known to take. ``max_num_seqs``:
    how many sequences are drafted for at once. ``slots``: see draft_slots."""

    def __init__(
        self,
        address: int,
        policy: Policy,
        context: int,
        digest: int = 0,
        positions: int = 0,
        prior: Costs = (),
        max_num_seqs: int = 1,
        slots: int = 0,
    ) -> None:
        self.address = address
        self._policy = policy
        self._positions = positions or context
        self._digest = digest
        self._edges = Edges(address)
        self._allocator = SlotAllocator(*_pool(policy, context, max_num_seqs, slots))
        self._table = SlotTable(self._allocator.capacity)
        self._sequences: dict[int, DraftSequence] = {}  # in the order in which they began
        self._pass: Pass | None = None
        self._is_prompts_turn = True  # whether the next pass is one over prompts, if any waits
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
        return self._pass.evaluated(sequence.id) if self._pass else []

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
            return [] if any(map(self._is_needed, self._pass.parts)) else [Abandon(self._job)]
        commands: list[Command] = []
        prompts, offers = list[DraftSequence](), list[Offer]()
        for sequence in self._sequences.values():
            if sequence.tree is not None and sequence.prefilled < len(sequence.prompt) and not sequence.is_mute:
                prompts.append(sequence)
                continue
            offer = self._leaves(sequence) if sequence.passes and not sequence.is_mute else None
            if offer and offer.nodes:
                offers.append(offer)
            else:
                commands += self._report(sequence, [], ends_order=True)
        if prompts and self._is_prompts_turn:
            take_back(offers)
        elif offers:
            commands += self._choose(offers)
        return commands + self._prefill(prompts) if prompts and self._pass is None else commands

    def _is_needed(self, part: Part) -> bool:
        """Whether somebody waits for this part of the pass under way."""
        return part.sequence in self._sequences and (not part.nodes or any(node.alive for node in part.nodes))

    def _prefill(self, prompts: list[DraftSequence]) -> list[Command]:
        """A pass over the next tokens of one prompt, or of several where they fit."""
        self._is_prompts_turn = False
        chosen, left = list[tuple[DraftSequence, int]](), self._policy.prefill_chunk
        free = self._allocator.free_slots() - self._allocator.room()  # slots for guesses are not for prompts
        for sequence in prompts:
            count = min(left, len(sequence.prompt) - sequence.prefilled)
            if count > free:
                sequence.silence(self._allocator)
            elif count:
                chosen.append((sequence, count))
                left, free = left - count, free - count
        if not chosen:
            return self._next()
        rows, parts = list[Row](), list[Part]()
        for sequence, count in sorted(chosen, key=lambda one: one[0].id):
            ops, more = self._allocator.prompt_rows(
                sequence.id, sequence.prompt[sequence.prefilled : sequence.prefilled + count]
            )
            self._table.apply(ops)
            rows += more
            parts.append(self._prefilled(sequence, more, len(rows) - 1))
        return [self._compute(rows, parts, canonical=True)]

    def _prefilled(self, sequence: DraftSequence, rows: list[Row], last: int) -> Part:
        """The part of a pass that reads ``rows`` of the prompt of ``sequence``; ``last``: the index of the last one."""
        sequence.prefilled += len(rows)
        sequence.served = self._job + 1
        if sequence.prefilled < len(sequence.prompt) or sequence.tree is None:
            return Part(sequence.id, (), [])
        if sequence.origin is not None:
            sequence.origin.slot = rows[-1].slot
        # The prompt's last token is the tree's first root, unless the target has already passed it.
        root = sequence.tree.root
        return Part(sequence.id, (last,), [root] if root.position == len(sequence.prompt) - 1 else [])

    def _least_path_prob(self, sequence: DraftSequence) -> float:
        """The least path probability that is worth evaluating: none is too small where leaves cost nothing."""
        least_prob = self._policy.min_path_prob
        return (
            self._curve.least_probability(sequence.draft_batch, least_prob, LEAF_WORTH) if self._curve else least_prob
        )

    def _leaves(self, sequence: DraftSequence) -> Offer:
        """Take what ``sequence`` offers for the next pass: every accepted node that the draft has not seen, and at most
        ``draft_batch`` of the best guesses."""
        tree, nodes, useful = sequence.tree, list[Node](), list[float]()
        if tree is None:
            return Offer(sequence, nodes, useful, 0)
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
        # A pass that ends above the root finds nothing, and the next token would leave the draft as far behind.
        return Offer(sequence, nodes, useful, sum(node.position <= tree.root.position for node in nodes))

    def _choose(self, offers: list[Offer]) -> list[Command]:
        """A pass over the best of what is offered, unless there is no slot for any of it."""
        self._is_prompts_turn = True
        chosen, done = choose(offers, self._allocator, self._curve, self._job + 1)
        commands = [command for sequence in done for command in self._report(sequence, [], ends_order=True)]
        return [*commands, self._evaluate(chosen)] if chosen else commands

    def _evaluate(self, chosen: Chosen) -> Compute:
        ops = self._allocator.operations()
        self._table.apply(ops)
        rows, parts = list[Row](), list[Part]()
        for sequence, nodes in sorted(chosen, key=lambda one: one[0].id):
            root, first = sequence.tree.root.position if sequence.tree else 0, len(rows)
            for node, slot in zip(nodes, self._allocator.lease(sequence.id, len(nodes)), strict=True):
                rows.append(node.row(slot))
                if node.slot is not None:
                    self._allocator.release(sequence.id, slot)  # a second look: its first slot is the one that counts
                    continue
                node.slot = slot
                if node.position <= root:
                    self._allocator.commit(sequence.id, slot)  # it is accepted already
            wanted = [index for index, node in enumerate(nodes) if node.position >= root]
            parts.append(
                Part(sequence.id, tuple(first + index for index in wanted), [nodes[index] for index in wanted])
            )
        return self._compute(rows, parts, canonical=False)

    def _compute(self, rows: list[Row], parts: list[Part], canonical: bool) -> Compute:
        self._job += 1
        self._pass = Pass(len(rows), parts)
        batch = self._table.allocate(rows, canonical)
        wanted = tuple(index for part in parts for index in part.wanted)
        if not wanted:
            return Compute(self._job, batch)
        samplings = tuple(self._sequences[rows[index].sequence].sampling for index in wanted)
        draw = self._table.draw(samplings, batch, wanted, is_guess=True)
        return Compute(self._job, batch, rows=wanted, choices=self._policy.topk, draw=draw)

    def _computed(self, event: Computed) -> list[Command]:
        done, self._pass = self._pass, None
        commands, first = list[Command](), 0
        parts = done.parts if done else []
        is_useful = any(part.nodes and part.sequence in self._sequences for part in parts)
        if done and self._curve and event.choices and is_useful:
            self._curve.observe(done.rows, event.seconds)
        for part in parts:
            choices, first = (event.choices or [])[first : first + len(part.wanted)], first + len(part.wanted)
            if sequence := self._sequences.get(part.sequence):
                commands += self._found(sequence, part, choices, event)
        return commands + self._next()

    def _found(
        self, sequence: DraftSequence, part: Part, choices: Sequence[list[SampledToken]], event: Computed
    ) -> list[Command]:
        """A part of a pass has ended with ``choices`` after its wanted rows; none: it was abandoned."""
        found: list[DraftNode] = []
        faulty = [index in event.faults for index in part.wanted]
        for node, best, is_faulty in zip(part.nodes, choices, faulty, strict=False):
            if not is_faulty:  # else nothing is known of what follows it
                found += self._children(sequence, node, best)
        if faulty and choices:
            sequence.faulty_passes = sequence.faulty_passes + 1 if all(faulty) else 0
            sequence.is_mute |= sequence.faulty_passes >= MOST_FAULTY
        return self._report(sequence, found, ends_order=sequence.passes == 0)

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


def _pool(policy: Policy, context: int, max_num_seqs: int, slots: int) -> tuple[int, int]:
    """Slots for accepted tokens, and for guesses."""
    accepted, guesses = max_num_seqs * context, policy.max_ahead + policy.draft_batch
    return min(accepted, slots or accepted), max(guesses, min(max_num_seqs * guesses, MOST_GUESSES))


def draft_slots(policy: Policy, context: int, max_num_seqs: int = 1, slots: int = 0) -> int:
    """Slots of a draft model's shard for ``max_num_seqs`` sequences of up to ``context`` tokens. ``slots``: so many for
    accepted tokens, if that is less than they may need (0: as many as they may need)."""
    return sum(_pool(policy, context, max_num_seqs, slots))
