"""Synchronous speculation step by step (see speculation/schedules/rounds.py). In whole worlds L11 watches it."""

from __future__ import annotations

from typing import Any

import pytest

from speculation.schedules.policy import Policy
from speculation.schedules.rounds import Rounds
from speculation.schedules.schedule import Launch, Order, Situation, Step
from speculation.trees.tree import Tree


class Game:
    """A schedule and the tree it decides upon; the prompt is on its way."""

    def __init__(self, **knobs: Any) -> None:
        self.schedule = Rounds(Policy("test", schedule="rounds", **{"max_rows": 4, "num_steps": 3} | knobs))
        self.tree = Tree(0, 4, 100)
        self.tree.take(self.tree.root)
        self.schedule.opened(self.tree)
        self.slots = self.room = 9

    def step(self) -> Step | None:
        return self.schedule.next(Situation([self.tree], 1, 0, self.slots, self.room))

    def verified(self, *tokens: int) -> None:
        for token in tokens:
            self.tree.advance(token)
        self.schedule.accepted(self.tree, len(tokens), 0.0)

    def guess(self, *logps: float) -> None:
        """Guesses below the root: tokens 0, 1, ..."""
        for token, logp in enumerate(logps):
            assert self.tree.add(self.tree.root, token, logp) is not None


def drafting(**knobs: Any) -> Game:
    game = Game(**knobs)
    game.verified(7)
    assert isinstance(game.step(), Order)
    return game


def test_nothing_is_done_while_the_prompt_is_verified() -> None:
    game = Game()
    assert game.step() is None
    game.schedule.drafted(game.tree, [])
    assert game.step() is None, "what a drafter finds after the prompt was not ordered"


def test_a_new_token_has_the_drafters_begin_anew_on_a_fresh_tree() -> None:
    game = Game()
    game.verified(7)
    game.guess(-0.1, -0.2)
    assert game.step() == Order(3, restart=True, sequence=0)
    assert game.tree.root.children == {}
    assert game.tree.size == 1


def test_the_round_waits_for_its_drafts() -> None:
    game = drafting()
    game.guess(-0.1)
    assert game.step() is None
    game.schedule.drafted(game.tree, [])
    assert isinstance(game.step(), Launch)


def test_a_round_is_the_newest_token_and_the_best_guesses() -> None:
    game = drafting(max_rows=3)
    game.guess(-0.3, -0.1, -0.2)
    game.schedule.drafted(game.tree, [])
    step = game.step()
    assert isinstance(step, Launch)
    assert step.nodes[0] is game.tree.root
    assert [node.token for node in step.nodes[1:]] == [1, 2]
    assert (step.copies, step.is_canonical) == ([], False)


def test_then_everybody_waits_for_the_verdict() -> None:
    game = drafting()
    game.guess(-0.1, -0.2, -0.3, -0.4, -0.5)
    game.schedule.drafted(game.tree, [])
    assert isinstance(game.step(), Launch)
    assert game.step() is None
    game.schedule.drafted(game.tree, [])
    assert game.step() is None
    game.verified(0, 8)
    assert game.step() == Order(3, restart=True, sequence=0)


@pytest.mark.parametrize("room", [0, 1])
def test_guesses_go_as_far_as_there_are_slots_and_the_newest_token_always(room: int) -> None:
    game = drafting()
    game.guess(-0.1, -0.2)
    game.schedule.drafted(game.tree, [])
    game.room = room
    step = game.step()
    assert isinstance(step, Launch)
    assert len(step.nodes) == 1 + room


def test_a_round_waits_for_a_slot() -> None:
    game = drafting()
    game.schedule.drafted(game.tree, [])
    game.slots = 0
    assert game.step() is None
    game.slots = 1
    assert isinstance(game.step(), Launch)


def test_results_are_always_heard() -> None:
    game = drafting()
    assert not game.schedule.defers_results(Situation([game.tree], 0, 1, 0, 0))


def test_a_new_request_begins_anew() -> None:
    game = drafting()
    game.schedule.opened(game.tree)
    game.schedule.drafted(game.tree, [])
    assert game.step() is None
