"""The drafter: keeps guessing, never waits for the target.

It follows one request at a time. The prompt comes in chunks and is prefilled; from then on every pass of the draft
model evaluates the most probable leaves of its tree, and the children it finds are sent to the orchestrator at once.
Words from the orchestrator only re-root the tree: what survives a correction is kept, and what the drafter computed
below its own second choices is ready when one of them turns out right. It pauses only when it is ``lead`` nodes ahead.
"""

from __future__ import annotations

from kvbuffers.cells import CellTable
from kvbuffers.partitions import Partitions
from pipeinfer.errors import RemoteProtocolError
from pipeinfer.ports import Abandon, Choice, Command, Compute, Computed, Event, Halt, Received, Send, Started
from pipeinfer.protocol import (
    ORCHESTRATOR,
    DraftRow,
    Edges,
    Flag,
    Kind,
    Message,
    Row,
    accepted_name,
    address_name,
)
from speculation.policy import Policy
from speculation.tree import Node, Tree


class Drafter:
    """The machine of one draft model. ``context`` is the most tokens a request may have, prompt included."""

    def __init__(self, address: int, policy: Policy, context: int, digest: int = 0) -> None:
        self.address = address
        self._policy = policy
        self._digest = digest
        self._edges = Edges(address)
        self._ledger = Partitions(context, policy.lead + policy.leaves)
        self._cells = CellTable(self._ledger.capacity)
        self._request = 0
        self._prompt: list[int] = []
        self._prefilled = 0
        self._tree: Tree | None = None  # made when the prompt is complete
        self._last_position = 0  # nodes beyond it are of no use to the request
        self._names = 0
        self._ahead: set[Node] = set()  # evaluated guesses below the root
        self._batch: list[Node] = []  # nodes under evaluation
        self._job = 0
        self._busy = False

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; see Machine."""
        if isinstance(event, Received):
            return self._receive(event.message)
        if isinstance(event, Computed):
            return self._computed(event)
        if isinstance(event, Started):
            return [self._send(Kind.HELLO, run=self._digest)]
        raise RemoteProtocolError(f"{address_name(self.address)} cannot handle {type(event).__name__}")

    def _send(self, kind: Kind, run: int = 0, rows: tuple[DraftRow, ...] = ()) -> Send:
        txn = self._edges.stamp(ORCHESTRATOR)
        return Send(Message(kind, self.address, ORCHESTRATOR, request=self._request, txn=txn, run=run, rows=rows))

    def _receive(self, message: Message) -> list[Command]:
        self._edges.check(message)
        rows = message.rows_as(DraftRow)
        if message.kind is Kind.PROMPT:
            self._open(message, rows)
        elif message.kind is Kind.ADVANCE:
            self._advance(rows)
        elif message.kind is Kind.CLOSE:
            self._close()
        elif message.kind is Kind.SHUTDOWN:
            return [Halt()]
        elif message.kind is Kind.PROBE:
            return [Send(Message(Kind.STATUS, self.address, ORCHESTRATOR, txn=self._edges.taken, run=self._job))]
        else:
            raise RemoteProtocolError(f"{address_name(self.address)} got {message.kind.name}")
        return self._next()

    def _open(self, message: Message, rows: tuple[DraftRow, ...]) -> None:
        if message.request != self._request:
            self._close()
            self._request = message.request
            self._ledger.clear()
            self._prefilled = self._names = 0
        self._prompt += [row.token for row in rows]
        if message.flags & Flag.LAST:
            position = len(self._prompt) - 1
            self._tree = Tree(self._prompt[-1], position, self._policy.most_nodes())
            self._tree.take(self._tree.root)
            self._tree.root.name = accepted_name(position)
            self._last_position = message.run

    def _close(self) -> None:
        self._tree = None
        self._prompt = []
        self._batch = []
        self._ahead.clear()

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
            for node in died:
                if node.slot is not None:
                    self._ledger.release(node.slot)
            if heir.slot is not None:
                self._ledger.commit(heir.slot)

    def _next(self) -> list[Command]:
        """Start the next pass, or give up one that nobody needs any more."""
        if self._busy:
            wanted = self._tree is not None and (not self._batch or any(node.alive for node in self._batch))
            return [] if wanted else [Abandon(self._job)]
        if self._prefilled < len(self._prompt) and self._tree is not None:
            return [self._prefill(self._tree)]
        nodes = self._leaves()
        if not nodes:
            return []
        return [self._evaluate(nodes)]

    def _prefill(self, tree: Tree) -> Compute:
        ops, rows = self._ledger.prompt_rows(self._prompt[self._prefilled :][: self._policy.prefill_chunk])
        self._prefilled += len(rows)
        ends = self._prefilled == len(self._prompt)
        self._cells.apply(ops)
        # The prompt's last token is the tree's first root, unless the target has already passed it.
        self._batch = [tree.root] if ends and tree.root.position == len(self._prompt) - 1 else []
        return self._compute(rows, canonical=True, wanted=(len(rows) - 1,) if ends else ())

    def _leaves(self) -> list[Node]:
        """Take the nodes of the next pass: the accepted ones first (they have probability 1), then the best guesses."""
        tree, nodes = self._tree, list[Node]()
        while tree is not None and len(nodes) < self._policy.leaves:
            node = tree.best()
            if node is None or node.position >= self._last_position:
                break
            if node.position > tree.root.position:
                if len(self._ahead) >= self._policy.lead or tree.probability(node) < self._policy.floor:
                    break
                self._ahead.add(node)
            tree.take(node)
            nodes.append(node)
        return nodes

    def _evaluate(self, nodes: list[Node]) -> Compute:
        self._batch = nodes
        ops = self._ledger.operations()
        self._cells.apply(ops)
        for node, slot in zip(nodes, self._ledger.lease(len(nodes)), strict=True):
            node.slot = slot
            if self._tree is not None and node.position <= self._tree.root.position:
                self._ledger.commit(slot)  # it is accepted already
        rows = [node.row() for node in nodes]
        return self._compute(rows, canonical=False, wanted=tuple(range(len(rows))))

    def _compute(self, rows: list[Row], canonical: bool, wanted: tuple[int, ...]) -> Compute:
        self._job += 1
        self._busy = True
        batch = self._cells.admit(rows, canonical)
        return Compute(self._job, batch, rows=wanted, choices=self._policy.width if wanted else 0)

    def _computed(self, event: Computed) -> list[Command]:
        self._busy = False
        nodes, self._batch = self._batch, []
        found: list[DraftRow] = []
        for node, choices in zip(nodes, event.choices or (), strict=False):
            found += self._children(node, choices)
        commands: list[Command] = []
        if found and self._tree is not None:
            commands.append(self._send(Kind.NODES, self._tree.root.position, tuple(found)))
        return commands + self._next()

    def _children(self, node: Node, choices: list[Choice]) -> list[DraftRow]:
        tree = self._tree
        if tree is None or not node.alive or node.position < tree.root.position:
            return []
        found = []
        for token, logp in choices:
            child = tree.add(node, token, logp)
            if child is not None and child.name is None:
                self._names += 1
                child.name = self._names
                found.append(DraftRow(token, child.name, node.name or 0, logp))
        return found


def draft_cells(policy: Policy, context: int) -> int:
    """Cells of a draft model's shard."""
    return context + policy.lead + policy.leaves
