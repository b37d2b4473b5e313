"""Tells a drafter what an orchestrator would, step by step."""

from __future__ import annotations

import math
from typing import Any

from pipeinfer.core.addresses import FIRST_DRAFTER, ORCHESTRATOR
from pipeinfer.core.edges import Edges
from pipeinfer.core.messages import Advance, Body, DraftOrder, Nodes, Prompt, accepted_name
from pipeinfer.core.ports import GREEDY, Command, Compute, Computed, Received, Sampling, Send
from speculation.drafter.machine import Drafter
from speculation.schedules.policy import Policy
from speculation.trees.tree import Tree

FIRST, SECOND = 4, 5
"""Sequences."""
PROMPT = (1, 2, 3)
CONTEXT = 64
ROOT = accepted_name(3)
"""What everybody calls the first accepted token."""


class Told:
    """A drafter whose prompt is through, and what it is told; the first token, 7, has been accepted.

    Where no ``sequence`` is named, all is said about the first one."""

    def __init__(self, sampling: Sampling = GREEDY, **knobs: Any) -> None:
        numbers = {name: knobs.pop(name, 0) for name in ("positions", "slots")}
        numbers["max_num_seqs"] = knobs.pop("max_num_seqs", 2)
        settings: dict[str, Any] = {"schedule": "pipeinfer", "max_rows": 3, "max_ahead": 9} | knobs
        self.drafter = Drafter(FIRST_DRAFTER, Policy("test", **settings), CONTEXT, **numbers)
        self._edges = Edges(ORCHESTRATOR)
        self.busy = 0
        self.begin(FIRST, PROMPT, sampling)
        if self.busy:  # else the prompt is longer than what the model was made for
            self.computed([(9, 0.9)])
        assert self.accept(7) == [], "it waits for its order"

    def begin(self, sequence: int, prompt: tuple[int, ...], sampling: Sampling = GREEDY) -> list[Command]:
        assert self.say(sampling.settings(sequence, 0)) == []
        return self.say(Prompt(sequence, 20, True, prompt))

    def say(self, body: Body) -> list[Command]:
        message = self._edges.message(FIRST_DRAFTER, body)
        return self._follow(self.drafter.handle(Received(message), 0.0))

    def _follow(self, commands: list[Command]) -> list[Command]:
        self.busy = next((command.job for command in commands if isinstance(command, Compute)), self.busy)
        return commands

    def order(self, passes: int, cutoff: float = 0.0, restart: bool = False, sequence: int = FIRST) -> list[Command]:
        return self.say(DraftOrder(sequence, restart, passes, cutoff=cutoff))

    def tree(self, sequence: int = FIRST) -> Tree:
        tree = self.drafter._sequences[sequence].tree
        assert tree is not None
        return tree

    def accept(self, *tokens: int, sequence: int = FIRST) -> list[Command]:
        return self.say(Advance(sequence, self.tree(sequence).root.position + 1, False, tokens))

    def computed(self, *choices: list[tuple[int, float]], faulty: tuple[int, ...] = ()) -> list[Command]:
        """The pass ends; for each of its nodes the choices with their probabilities. ``faulty``: rows of it."""
        logged = [[(token, math.log(probability)) for token, probability in best] for best in choices]
        faults = dict.fromkeys(faulty, 1)
        return self._follow(self.drafter.handle(Computed(self.busy, choices=logged, faults=faults), 0.0))


def compute_of(commands: list[Command]) -> Compute:
    (found,) = [command for command in commands if isinstance(command, Compute)]
    return found


def said(commands: list[Command]) -> list[Nodes]:
    """The Nodes messages. No other message leaves."""
    found = [command.message.body for command in commands if isinstance(command, Send)]
    assert all(isinstance(body, Nodes) for body in found)
    return [body for body in found if isinstance(body, Nodes)]


def nodes(commands: list[Command]) -> list[tuple[list[tuple[int, int]], bool]]:
    """Of each: (token, parent's name) of each node, and whether the order is done."""
    return [([(row.token, row.parent) for row in body.nodes], body.ends_order) for body in said(commands)]


def evaluated(commands: list[Command]) -> list[int]:
    return [int(token) for token in compute_of(commands).batch.tokens]
