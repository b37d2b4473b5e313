"""Where guesses come from: draft models on ranks of their own, and the text itself. All feed one tree per sequence.

The orchestrator's side of drafting. Drafters stream nodes in and receive the accepted tokens; a lookup of the text's
end in the text (lookup.py) needs no other rank, so it also serves where the drafter is slow, wrong or silent.
Every outcome teaches what each source's probabilities mean (calibration.py); the tree is ordered by what was learnt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeinfer.core.addresses import address_name
from pipeinfer.core.messages import (
    MAX_ROWS,
    Advance,
    Body,
    Close,
    DraftOrder,
    Nodes,
    Prompt,
    accepted_name,
)
from pipeinfer.core.ports import RequestStats, Send
from pipeinfer.orchestrator.session import Session
from speculation.schedules.continuous import RIGHT
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import UNLIMITED, Order
from speculation.trees.calibration import Calibration, Reliability
from speculation.trees.lookup import CLAIMS, Lookup
from speculation.trees.tree import SLACK, Node

LOOKUP = -1
"""The source of nodes that were looked up; drafters are sources by their addresses."""


def source_name(source: int) -> str:
    """A source as people read it: ``lookup``, ``drafter 0``."""
    return "lookup" if source == LOOKUP else address_name(source)


SendTo = Callable[[int, Body], Send]
"""The command that sends a message to an address."""


@dataclass(slots=True)
class _Served:
    """What is known of a sequence that is being decoded. ``lookup``: of its text, if there is one."""

    session: Session
    names: dict[int, dict[int, Node]]
    lookup: Lookup | None
    awaited: set[int] = field(default_factory=set)  # drafters that still work on an order
    found: list[Node] = field(default_factory=list)  # by that order
    untold: list[Node] = field(default_factory=list)  # accepted, of which the sources know nothing yet
    restart: bool = False  # whether guesses begin anew with what is untold


class Sources:
    """The sources of ``policy``: ``drafters`` by address, and the lookup. ``send_to`` makes a command;
    ``calibrations``: what is known of them already, by ``source_name``."""

    def __init__(
        self,
        drafters: Sequence[int],
        policy: Policy,
        context: int,
        send_to: SendTo,
        calibrations: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._drafters = drafters
        self._policy = policy
        self._send_to = send_to
        self._context = context
        self._served: dict[int, _Served] = {}  # by sequence
        self._lookups: list[Lookup] = []  # that no sequence uses
        self.calibrations = {
            source: Calibration.from_words(calibrations[name]) if name in calibrations else Calibration()
            for source, name in ((source, source_name(source)) for source in (LOOKUP, *drafters))
        }
        self._sent_revisions = dict.fromkeys(drafters, 0)  # the revision of its calibration that a drafter has
        self.claimed, self.believed = Reliability(), Reliability()

    @property
    def right(self) -> float:
        """How often a good draft's first choice is right, by what is known of the drafters already."""
        drafters = [self.calibrations[drafter] for drafter in self._drafters if self._policy.calibrate]
        return max((math.exp(one.logp(0, math.log(RIGHT))) for one in drafters), default=RIGHT)

    def most_nodes(self) -> int:
        """A bound on the living nodes of the tree."""
        return 1 + max(1, len(self._drafters)) * self._policy.most_nodes() + 4 * self._policy.prompt_lookup

    def open(self, session: Session) -> list[Send]:
        """A sequence begins: the messages about it to the drafters."""
        root = {accepted_name(session.tree.root.position): session.tree.root}
        lookup = None
        if self._policy.prompt_lookup:
            lookup = self._lookups.pop() if self._lookups else Lookup(most_tokens=self._context)
            lookup.clear()
            lookup.extend(session.text)
        names = {drafter: dict(root) for drafter in self._drafters}
        served = self._served[session.sequence] = _Served(session, names, lookup)
        sends = [send for drafter in self._drafters for send in self._prompt(drafter, session)]
        self._look_up(served)
        return sends

    def _teach(self, drafter: int) -> list[Send]:
        """The calibration of ``drafter``, if it has changed since it was last sent."""
        calibration = self.calibrations[drafter]
        if calibration.revision <= self._sent_revisions[drafter]:
            return []
        self._sent_revisions[drafter] = calibration.revision
        return [self._send_to(drafter, calibration.message())]

    def _prompt(self, drafter: int, session: Session) -> list[Send]:
        prompt, sequence = tuple(session.text), session.sequence
        settings = session.request.sampling.settings(sequence, len(session.request.prompt))
        sends = [self._send_to(drafter, settings), *self._teach(drafter)]
        for start in range(0, len(prompt), MAX_ROWS):
            is_last = start + MAX_ROWS >= len(prompt)
            part = Prompt(sequence, session.last_position, is_last, prompt[start : start + MAX_ROWS])
            sends.append(self._send_to(drafter, part))
        return sends

    def close(self, sequence: int) -> list[Send]:
        """``sequence`` is over."""
        served = self._served.pop(sequence)
        if served.lookup is not None:
            self._lookups.append(served.lookup)
        return [self._send_to(drafter, Close(sequence)) for drafter in self._drafters]

    def order(self, order: Order) -> list[Send]:
        """Pass an order on to all drafters."""
        sends = []
        for sequence in self._served if order.sequence is None else (order.sequence,):
            sends += self._order(self._served[sequence], order)
        return sends

    def _order(self, served: _Served, order: Order) -> list[Send]:
        sends = self._tell(served) if order.passes else []
        if order.passes not in (0, UNLIMITED):
            served.awaited, served.found = set(self._drafters), []
            self._look_up(served)  # what was thrown away for this order is guessed again
        sequence, count = served.session.sequence, len(self._drafters)
        for index, drafter in enumerate(self._drafters):
            passes = 0 if order.shared and index != sequence % count else order.passes
            message = DraftOrder(sequence, order.restart, passes, order.draft_batch, order.cutoff)
            sends.append(self._send_to(drafter, message))
        return sends

    def grow(self, source: int, message: Nodes) -> list[Node] | None:
        """Take the nodes of drafter ``source`` into the tree of their sequence; what hangs on a dead branch is left
        out.

        Returns what an order has found once all drafters are done with it, else None."""
        served = self._served.get(message.sequence)
        if served is None:
            return None
        tree, session = served.session.tree, served.session
        names, calibration = served.names[source], self._calibration(source)
        last_position, stop_tokens = session.last_position, session.request.stop_tokens
        last, parent, rank = None, None, 0
        for token, name, parent_name, claim in message.nodes:
            if parent_name == last:
                rank += 1
            else:  # its children come together, best first
                last, parent, rank = parent_name, names.get(parent_name), 0
                if parent is not None:
                    parent.is_drafted = True
                    parent = parent if parent.position < last_position else None
            if parent is None or token in stop_tokens:
                continue
            logp = calibration.logp(rank, claim) if calibration else claim
            node = tree.add(parent, token, logp, source, rank, claim)
            if node is not None:
                names[name] = node
                if served.awaited:
                    served.found.append(node)
        # The drafter names no node above its own root any more (at position ``root``).
        if len(names) > SLACK + 2 * tree.size:
            keep = {name: node for name, node in names.items() if node.alive and node.position >= message.root}
            served.names[source] = keep
        if source not in served.awaited or not message.ends_order:
            return None
        served.awaited.discard(source)
        if served.awaited:
            return None
        return [node for node in served.found if node.alive and node.position > tree.root.position]

    def _calibration(self, source: int) -> Calibration | None:
        return self.calibrations[source] if self._policy.calibrate else None

    def verified(self, node: Node) -> None:
        """The target has verified ``node``, which is accepted: learn from the guesses after it."""
        by_source: dict[int, list[Node]] = {}
        for child in node.children.values():
            if child.source is not None:
                by_source.setdefault(child.source, []).append(child)
        for source, children in by_source.items():
            for child in children:
                hit = child.token == node.choice
                self.claimed.add(math.exp(min(0.0, child.claim)), hit)
                self.believed.add(math.exp(child.logp - node.logp), hit)
            if self._policy.calibrate:
                outcomes = [(child.rank, child.claim, child.token == node.choice) for child in children]
                self.calibrations[source].learn(outcomes)

    def advance(self, sequence: int, accepted: Sequence[Node], restart: bool, wanted: bool) -> list[Send]:
        """Take the accepted tokens of ``sequence``; with ``restart`` guesses begin anew. Unless guesses are ``wanted``
        now, the sources hear of these tokens when one is ordered: an event per token costs more than a short pass may
        take."""
        served = self._served[sequence]
        for drafter in self._drafters:
            served.names[drafter].update((accepted_name(node.position), node) for node in accepted)
        served.untold += accepted
        served.restart |= restart
        return self._tell(served) if wanted else []

    def _tell(self, served: _Served) -> list[Send]:
        """Pass what is untold on to all sources."""
        untold, restart = served.untold, served.restart
        served.untold, served.restart = [], False
        if not untold:
            return []
        tokens, sequence = tuple(node.token for node in untold), served.session.sequence
        sends = []
        for drafter in self._drafters:
            for start in range(0, len(tokens), MAX_ROWS):
                part = tokens[start : start + MAX_ROWS]
                sends.append(self._send_to(drafter, Advance(sequence, untold[start].position, restart, part)))
            sends += self._teach(drafter)
        if served.lookup is not None:
            served.lookup.extend(tokens)
            self._look_up(served)
        return sends

    def _look_up(self, served: _Served) -> None:
        """Hang a chain of looked-up tokens below the root, along what others have guessed where that is the same."""
        if served.lookup is None:
            return
        session = served.session
        node: Node | None = session.tree.root
        calibration = self._calibration(LOOKUP)
        for token, rank in served.lookup.propose(self._policy.prompt_lookup):
            if node is None or node.position >= session.last_position or token in session.request.stop_tokens:
                break
            logp = calibration.logp(rank, CLAIMS[rank]) if calibration else CLAIMS[rank]
            node = session.tree.add(node, token, logp, LOOKUP, rank, CLAIMS[rank])

    def account(self, stats: RequestStats) -> None:
        """Write down how good the guesses' probabilities were, and what was learnt of them."""
        stats.verified_guesses = sum(row.events for row in self.claimed.rows())
        stats.claimed_error, stats.believed_error = self.claimed.error(), self.believed.error()
        stats.calibrations = {
            source_name(source): calibration.to_words()
            for source, calibration in self.calibrations.items()
            if calibration.outcomes
        }

    @property
    def names(self) -> list[int]:
        """How many names of nodes are kept for each drafter, of all sequences."""
        return [sum(len(one.names[drafter]) for one in self._served.values()) for drafter in self._drafters]
