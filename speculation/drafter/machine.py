"""The drafter: keeps guessing, never waits for the target.

It follows one request at a time. The prompt comes in chunks and is prefilled; from then on every pass of the draft
model evaluates the most probable leaves of its tree, and the children it finds are sent to the orchestrator at once.
Words from the orchestrator only re-root the tree: what survives a correction is kept, and what the drafter computed
below its own second choices is ready when one of them turns out right. It pauses only when it is ``lead`` nodes ahead.

Under schedules that are not continuous it works to ORDER: so many passes, then a NODES message that says LAST.
"""

from __future__ import annotations

import math

from kvbuffers.slot_allocator import SlotAllocator
from kvbuffers.slot_table import SlotTable
from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.ports import (
    GREEDY,
    Abandon,
    Batch,
    Command,
    Compute,
    Computed,
    Event,
    Halt,
    Received,
    SampledToken,
    Sampling,
    SamplingInputs,
    Send,
    Started,
)
from pipeinfer.core.protocol import (
    ORCHESTRATOR,
    DraftRow,
    Edges,
    Flag,
    Kind,
    Message,
    Row,
    SettingRow,
    accepted_name,
    address_name,
)
from speculation.schedules.cost_curve import LEAF_WORTH, CostCurve
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import UNLIMITED
from speculation.trees.calibration import Calibration
from speculation.trees.tree import Node, Tree

LEAST_PATH = math.log(4.5e-4)
"""No child whose path is less probable than this is worth a name, even where rows are free; first choices are.
Found by trying, see docs/log.md."""


MOST_FAULTY = 8
"""Passes in a row whose numbers are not finite, after which the draft says nothing more in this request."""


class Drafter:
    """The machine of one draft model. ``context`` is the most tokens a request may have, prompt included.

    ``positions``: how many the model was made for (0: any number). No token beyond them is evaluated: the tree ends
    there, and of a prompt that is longer nothing is read."""

    def __init__(self, address: int, policy: Policy, context: int, digest: int = 0, positions: int = 0) -> None:
        self.address = address
        self._policy = policy
        self._positions = positions or context
        self._digest = digest
        self._edges = Edges(address)
        self._allocator = SlotAllocator(context, policy.max_ahead + policy.draft_batch)
        self._table = SlotTable(self._allocator.capacity)
        self._request = 0
        self._prompt: list[int] = []
        self._prefilled = 0
        self._tree: Tree | None = None  # made when the prompt is complete
        self._origin: Node | None = None  # its first root, the prompt's last token
        self._last_position = 0  # from it on nodes are of no use to the request, or beyond the model
        self._names = 0
        self._ahead: set[Node] = set()  # evaluated guesses below the root
        self._batch: list[Node] = []  # nodes under evaluation whose children are wanted
        self._job = 0
        self._busy = False
        self._sampling = GREEDY
        self._calibration = Calibration()
        self._passes = 0  # that it may still do
        self._is_ordered = False
        self._cutoff = 0.0
        self._most_leaves = policy.draft_batch
        self._curve = CostCurve() if policy.govern else None
        self._rows = 0
        self._wanted: tuple[int, ...] = ()  # rows of the pass under way whose choices are wanted
        self._faulty_passes = 0  # in a row
        self._is_mute = False  # says nothing more in this request
        self._withheld: list[
            tuple[Node, list[SampledToken]]
        ] = []  # choices below the cutoff: a later order may want them

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; see Machine."""
        if isinstance(event, Received):
            return self._receive(event.message)
        if isinstance(event, Computed):
            return self._computed(event)
        if isinstance(event, Started):
            return [self._send(Kind.HELLO, run=self._digest)]
        raise RemoteProtocolError(f"{address_name(self.address)} cannot handle {type(event).__name__}")

    def _send(self, kind: Kind, run: int = 0, rows: tuple[DraftRow, ...] = (), flags: Flag = Flag.NONE) -> Send:
        txn = self._edges.stamp(ORCHESTRATOR)
        return Send(Message(kind, self.address, ORCHESTRATOR, flags, self._request, txn=txn, run=run, rows=rows))

    def _report(self, rows: list[DraftRow], ends_order: bool) -> list[Command]:
        """What has been found, if it is anything or ends an order."""
        ends = self._is_ordered and ends_order
        if self._tree is None or not (rows or ends):
            return []
        if ends:
            self._is_ordered, self._passes = False, 0  # passes that were not needed are not kept for later
        flags = Flag.LAST if ends else Flag.NONE
        return [self._send(Kind.NODES, self._tree.root.position, tuple(rows), flags)]

    def _receive(self, message: Message) -> list[Command]:
        self._edges.check(message)
        rows = message.rows_as(DraftRow)
        if message.kind is Kind.PROMPT:
            self._open(message, rows)
        elif message.kind is Kind.ADVANCE:
            self._advance(rows)
            if Flag.RESTART in message.flags:
                self._restart()
        elif message.kind is Kind.ORDER:
            return self._order(message) + self._next()
        elif message.kind is Kind.REQUEST:
            self._sampling = Sampling.of(message.rows_as(SettingRow))
        elif message.kind is Kind.CALIBRATE:
            self._calibration = Calibration.of(message.rows_as(SettingRow))
        elif message.kind is Kind.CLOSE:
            self._close()
        elif message.kind is Kind.SHUTDOWN:
            return [Halt()]
        elif message.kind is Kind.PROBE:
            flags = Flag.BUSY if self._busy else Flag.NONE
            return [Send(Message(Kind.STATUS, self.address, ORCHESTRATOR, flags, txn=self._edges.taken, run=self._job))]
        else:
            raise RemoteProtocolError(f"{address_name(self.address)} got {message.kind.name}")
        return self._next()

    def _open(self, message: Message, rows: tuple[DraftRow, ...]) -> None:
        if message.request != self._request:
            self._close()
            self._request = message.request
            self._allocator.clear()
            self._prefilled = self._names = 0
        self._prompt += [row.token for row in rows]
        if Flag.LAST in message.flags:
            position = len(self._prompt) - 1
            self._tree = Tree(self._prompt[-1], position, self._policy.most_nodes())
            self._tree.take(self._tree.root)
            self._tree.root.name = accepted_name(position)
            self._origin = self._tree.root
            self._last_position = min(message.run, self._positions)
            self._passes = UNLIMITED if self._policy.schedule == "continuous" else 0
            self._most_leaves = self._policy.draft_batch
            self._faulty_passes, self._is_mute = 0, len(self._prompt) > self._positions

    def _close(self) -> None:
        self._tree = None
        self._prompt = []
        self._batch = []
        self._ahead.clear()
        self._withheld = []
        self._is_ordered = False
        self._cutoff = 0.0

    def _order(self, message: Message) -> list[Command]:
        """So many passes and no more; children that an earlier order held back may now be welcome."""
        (order,) = message.rows_as(SettingRow)
        self._passes, self._cutoff = order.low, order.value
        self._most_leaves = min(order.high or self._policy.draft_batch, self._policy.draft_batch)
        self._is_ordered = 0 < order.low < UNLIMITED
        if Flag.RESTART in message.flags:
            self._restart()
        withheld, self._withheld = self._withheld, []
        found = [row for node, choices in withheld for row in self._children(node, choices)]
        self._passes -= bool(found) and self._passes not in (0, UNLIMITED)  # what is there need not be computed
        return self._report(found, ends_order=False)

    def _restart(self) -> None:
        """Forget every guess; the root is evaluated again if it has been."""
        tree = self._tree
        if tree is None:
            return
        self._allocator.release(*[node.slot for node in tree.prune() if node.slot is not None])
        self._ahead.clear()
        self._withheld = []
        if tree.root not in self._batch:
            tree.renew()

    def _advance(self, rows: tuple[DraftRow, ...]) -> None:
        tree = self._tree
        if tree is None:
            raise RemoteProtocolError(f"{address_name(self.address)} got ADVANCE before the prompt ended")
        for row in rows:
            heir, died = tree.advance(row.token)
            if heir.name is None:
                heir.name = row.node
            self._ahead.discard(heir)
            self._ahead.difference_update(died)
            self._allocator.release(*[node.slot for node in died if node.slot is not None])
            if heir.slot is not None:
                self._allocator.commit(heir.slot)

    def _next(self) -> list[Command]:
        """Start the next pass, or give up one that nobody needs any more."""
        if self._busy:
            wanted = self._tree is not None and (not self._batch or any(node.alive for node in self._batch))
            return [] if wanted else [Abandon(self._job)]
        if self._prefilled < len(self._prompt) and self._tree is not None and not self._is_mute:
            return [self._prefill(self._tree)]
        nodes = self._leaves() if self._passes and not self._is_mute else []
        if not nodes:
            return self._report([], ends_order=True)
        if self._passes != UNLIMITED:
            self._passes -= 1
        return [self._evaluate(nodes)]

    def _prefill(self, tree: Tree) -> Compute:
        ops, rows = self._allocator.prompt_rows(self._prompt[self._prefilled :][: self._policy.prefill_chunk])
        self._prefilled += len(rows)
        ends = self._prefilled == len(self._prompt)
        self._table.apply(ops)
        if ends and self._origin is not None:
            self._origin.slot = rows[-1].slot
        # The prompt's last token is the tree's first root, unless the target has already passed it.
        self._batch = [tree.root] if ends and tree.root.position == len(self._prompt) - 1 else []
        return self._compute(rows, canonical=True, wanted=(len(rows) - 1,) if ends else ())

    def _floor(self) -> float:
        """The least path probability that is worth evaluating: none is too small where leaves cost nothing."""
        floor = self._policy.min_path_prob
        return self._curve.least_probability(self._most_leaves, floor, LEAF_WORTH) if self._curve else floor

    def _leaves(self) -> list[Node]:
        """Take the nodes of the next pass: every accepted one that it has not seen, and of the best ``leaves`` guesses
        as many as give the most useful ones per second."""
        tree, nodes, useful = self._tree, list[Node](), list[float]()
        if tree is None:
            return nodes
        floor, guesses, ahead = self._floor(), 0, len(self._ahead)
        while len(nodes) < self._policy.prefill_chunk and (node := tree.best()) is not None:
            if node.position >= self._last_position:
                break
            probability = 1.0
            if node.position > tree.root.position:
                probability = tree.probability(node)
                if guesses >= self._most_leaves or ahead >= self._policy.max_ahead or probability < floor:
                    break
                ahead += 1
            guesses += node.position >= tree.root.position
            tree.take(node)
            useful.append(probability)
            nodes.append(node)
        if self._curve:
            count = self._curve.best_count(useful)
            tree.give_back(nodes[count:])
            del nodes[count:]
        self._ahead.update(node for node in nodes if node.position > tree.root.position)
        return nodes

    def _evaluate(self, nodes: list[Node]) -> Compute:
        assert self._tree is not None
        root = self._tree.root.position
        self._batch = [node for node in nodes if node.position >= root]
        ops = self._allocator.operations()
        self._table.apply(ops)
        rows = []
        for node, slot in zip(nodes, self._allocator.lease(len(nodes)), strict=True):
            if node.slot is not None:
                rows.append(node.row(slot))
                self._allocator.release(slot)  # a second look: its first slot is the one that counts
                continue
            node.slot = slot
            rows.append(node.row(slot))
            if node.position <= root:
                self._allocator.commit(slot)  # it is accepted already
        wanted = tuple(index for index, node in enumerate(nodes) if node.position >= root)
        return self._compute(rows, canonical=False, wanted=wanted)

    def _compute(self, rows: list[Row], canonical: bool, wanted: tuple[int, ...]) -> Compute:
        self._job += 1
        self._busy = True
        self._rows, self._wanted = len(rows), wanted
        batch = self._table.allocate(rows, canonical)
        if not wanted:
            return Compute(self._job, batch)
        return Compute(self._job, batch, rows=wanted, choices=self._policy.topk, draw=self._draw(batch, wanted))

    def _draw(self, batch: Batch, wanted: tuple[int, ...]) -> SamplingInputs:
        return self._table.draw(self._sampling, batch, wanted, is_guess=True)

    def _computed(self, event: Computed) -> list[Command]:
        self._busy = False
        nodes, self._batch = self._batch, []
        if self._curve and nodes and event.choices:
            self._curve.observe(self._rows, event.seconds)
        found: list[DraftRow] = []
        faulty = [index in event.faults for index in self._wanted]
        for node, choices, is_faulty in zip(nodes, event.choices or (), faulty, strict=False):
            if not is_faulty:  # else nothing is known of what follows it
                found += self._children(node, choices)
        if faulty and event.choices:
            self._faulty_passes = self._faulty_passes + 1 if all(faulty) else 0
            self._is_mute |= self._faulty_passes >= MOST_FAULTY
        return self._report(found, ends_order=self._passes == 0) + self._next()

    def _children(self, node: Node, choices: list[SampledToken]) -> list[DraftRow]:
        tree = self._tree
        if tree is None or not node.alive or node.position < tree.root.position:
            return []
        found, least = [], math.log(self._cutoff) if self._cutoff > 0 else -math.inf
        worth = LEAST_PATH - (node.logp - tree.root.logp)
        if floor := self._floor():
            worth = max(worth, math.log(floor / 4))  # less would hardly ever be sent, even after the root
        for rank, (token, claim) in enumerate(choices):
            if claim < least:
                self._withheld.append((node, choices))
                break
            logp = self._calibration.logp(rank, claim) if self._policy.calibrate else claim
            if logp < worth and rank:
                break
            child = tree.add(node, token, logp)
            if child is not None and child.name is None:
                self._names += 1
                child.name = self._names
                found.append(DraftRow(token, child.name, node.name or 0, claim))
        return found


def draft_slots(policy: Policy, context: int) -> int:
    """Slots of a draft model's shard."""
    return context + policy.max_ahead + policy.draft_batch
