"""PipeInfer's schedule step by step (see speculation/schedules/pipeinfer.py). In whole worlds L11 watches it."""

from __future__ import annotations

from typing import Any

import pytest

from speculation.schedules.pipeinfer import PipeInfer
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import Launch, Order, Situation, Step
from speculation.trees.tree import Node, Tree


class Game:
    """A schedule and the tree it decides upon; the prompt's last token is at position 4."""

    def __init__(self, **knobs: Any) -> None:
        self.schedule = PipeInfer(
            Policy("test", schedule="pipeinfer", max_ahead=64, **{"max_rows": 3, "p_accept": 0.5} | knobs)
        )
        self.tree = Tree(0, 4, 100)
        self.tree.take(self.tree.root)
        self.schedule.opened(self.tree)
        self.in_flight = 1
        self.credits, self.slots, self.room = 1, 9, 9

    def now(self) -> Situation:
        return Situation([self.tree], self.credits, self.in_flight, self.slots, self.room)

    def step(self) -> Step | None:
        step = self.schedule.next(self.now())
        if isinstance(step, Launch):
            self.in_flight += 1
        return step

    def launch(self) -> Launch:
        step = self.step()
        assert isinstance(step, Launch)
        return step

    def order(self) -> Order:
        step = self.step()
        assert isinstance(step, Order)
        return step

    @property
    def defers_results(self) -> bool:
        return self.schedule.defers_results(self.now())

    def hear(self, *tokens: int) -> None:
        """A result says what follows the root."""
        self.in_flight -= 1
        for token in tokens:
            self.tree.advance(token)
        if tokens:
            self.schedule.accepted(self.tree, len(tokens), 0.0)

    def chain(self, parent: Node, *tokens: int) -> list[Node]:
        nodes = list[Node]()
        for token in tokens:
            node = self.tree.add(nodes[-1] if nodes else parent, token, -0.1)
            assert node is not None
            nodes.append(node)
        return nodes

    def draft(self, *tokens: int) -> list[Node]:
        """An order is done and found this chain below the newest node."""
        tip = self.tree.root
        while tip.children:
            tip = next(iter(tip.children.values()))
        nodes = self.chain(tip, *tokens)
        self.schedule.drafted(self.tree, nodes)
        return nodes


def begun(**knobs: Any) -> Game:
    """The first token is there and its canonical run is out."""
    game = Game(**knobs)
    game.hear(7)
    assert game.launch().is_canonical
    return game


def cutoffs(game: Game, *drafts: bool) -> list[float]:
    """What each order asks for; one that finds something is followed by its launch."""
    found = []
    for finds in drafts:
        found.append(round(game.order().cutoff, 6))
        game.draft(1) if finds else game.schedule.drafted(game.tree, [])
        if finds:
            assert not game.launch().is_canonical
    return found


def test_nothing_is_drafted_before_the_first_token() -> None:
    game = Game()
    assert game.step() is None
    assert not game.defers_results


def test_a_verification_is_followed_by_the_newest_token_alone() -> None:
    game = Game()
    game.hear(7)
    assert game.launch() == Launch([game.tree.root], [], is_canonical=True)
    assert not game.tree.root.pending


def test_a_newest_token_in_flight_goes_out_once_more() -> None:
    game = begun()
    game.order()
    (guess,) = game.draft(8)
    game.launch()
    game.hear(8)
    assert game.tree.root is guess
    assert game.launch() == Launch([], [guess], is_canonical=True)


def test_it_takes_a_slot_to_go_out_once_more() -> None:
    game = begun()
    game.order()
    game.draft(8)
    game.launch()
    game.hear(8)
    game.room = 0
    assert not game.defers_results
    assert isinstance(game.step(), Order), "the copy is left out, and drafting begins"


def test_drafting_starts_again_at_the_newest_token_and_then_goes_on() -> None:
    game = begun()
    assert game.order() == Order(3, 0.5, restart=True)
    game.draft(1, 2, 3)
    game.launch()
    assert game.order() == Order(3, 0.5)
    game.draft(4)
    game.launch()
    game.hear(1)
    game.launch()
    assert game.order() == Order(3, 0.5, restart=True)


def test_what_was_found_goes_out_as_one_run_and_may_be_cancelled() -> None:
    game = begun()
    game.order()
    nodes = game.draft(1, 2, 3)
    assert game.launch() == Launch(nodes, [], is_canonical=False)
    assert not any(node.pending for node in nodes)


def test_what_is_drafted_anew_goes_out_anew() -> None:
    game = begun()
    game.order()
    first, second, third = game.draft(1, 2, 3)
    game.launch()
    game.hear(1)
    game.launch()
    game.order()
    (fourth,) = game.chain(third, 4)
    game.schedule.drafted(game.tree, [second, third, fourth])
    assert game.launch() == Launch([fourth], [second, third])
    assert game.tree.root is first


def test_a_run_has_so_many_rows_and_no_more() -> None:
    game = begun(max_rows=2)
    game.order()
    nodes = game.draft(1, 2, 3)
    assert game.launch().nodes == nodes[:2]


def test_ends_of_other_chains_are_left_out() -> None:
    game = begun()
    game.order()
    kept, dead = game.chain(game.tree.root, 1)[0], game.chain(game.tree.root, 5, 6)
    dead[0].alive = False
    game.schedule.drafted(game.tree, [dead[1], kept, kept, dead[0]])
    assert game.launch().nodes == [kept]


def test_drafting_and_the_first_stages_work_never_overlap() -> None:
    game = begun()
    game.credits = 0
    assert game.defers_results, "the first stage works"
    assert game.step() is None
    game.credits = 1
    assert not game.defers_results
    game.order()
    assert game.defers_results, "tokens are drafted"
    assert game.step() is None


def test_results_wait_until_what_was_drafted_is_on_its_way() -> None:
    game = begun()
    game.order()
    game.draft(1, 2)
    assert game.defers_results
    game.launch()
    assert not game.defers_results


def test_results_wait_until_the_canonical_run_is_on_its_way() -> None:
    game = Game()
    game.hear(7)
    assert game.defers_results
    game.launch()
    assert not game.defers_results


@pytest.mark.parametrize("bound", [{"room": 1}, {"slots": 0}], ids=str)
def test_results_are_heard_where_nothing_can_be_sent(bound: dict[str, int]) -> None:
    game = begun()
    game.order()
    nodes = game.draft(1, 2)
    vars(game).update(bound)
    assert game.step() is None
    assert not game.defers_results
    game.room, game.slots = 2, 1
    assert game.launch().nodes == nodes


def test_each_launch_raises_the_cutoff() -> None:
    """The teeth of a saw: where nothing could pass any more the loop is left, and entered again."""
    teeth = [0.001, 0.401, 0.801]
    assert cutoffs(begun(p_accept=0.001, p_recovery=0.4), *[True] * 7) == [*teeth, *teeth, 0.001]


def test_whatever_comes_back_lowers_it_again() -> None:
    game = begun(p_accept=0.1, p_recovery=0.2)
    assert cutoffs(game, True, True) == [0.1, 0.3]
    game.hear()  # of a run that had been cancelled, say
    assert cutoffs(game, True, True) == [0.1, 0.3]
    game.hear(1)
    game.launch()
    assert cutoffs(game, True) == [0.1]


def test_a_refusal_leaves_the_loop_and_lowers_it() -> None:
    game = begun(p_accept=0.5, p_recovery=0.2, p_decay=0.1)
    assert cutoffs(game, True, True, False, False, True, True) == [0.5, 0.7, 0.9, 0.4, 0.3, 0.5]


def test_a_refusal_without_decay_is_final_at_the_lowest_cutoff_only() -> None:
    game = begun(p_accept=0.5, p_recovery=0.2)
    assert cutoffs(game, True, False, False) == [0.5, 0.7, 0.5]
    assert game.step() is None
    game.hear()
    assert game.step() is None, "the drafter would say the same"
    game.hear(1)
    assert game.launch().is_canonical
    assert game.order().cutoff == 0.5


def test_refusals_are_forgotten_with_the_next_token() -> None:
    game = begun(p_accept=0.5, p_decay=0.2)
    assert cutoffs(game, False, False) == [0.5, 0.3]
    game.hear(1)
    game.launch()
    assert cutoffs(game, False) == [0.5]


def test_a_drafter_with_nothing_to_give_is_left_in_peace() -> None:
    game = begun(p_accept=0.5, p_decay=0.2)
    assert cutoffs(game, False, False, False, False) == [0.5, 0.3, 0.1, 0.0]
    assert game.step() is None


def test_a_cutoff_that_no_token_can_pass_is_plain_decoding() -> None:
    game = begun(p_accept=1.0)
    assert game.step() is None
    assert not game.defers_results


@pytest.mark.parametrize("busy", [{"credits": 0}, {"slots": 0}], ids=str)
def test_nothing_leaves_without_a_credit_and_a_slot(busy: dict[str, int]) -> None:
    game = Game()
    game.hear(7)
    vars(game).update(busy)
    assert game.step() is None
    game.credits, game.slots = 1, 1
    assert game.launch().is_canonical


def test_a_new_request_begins_anew() -> None:
    game = begun(p_recovery=0.2)
    game.order()
    game.schedule.opened(game.tree)
    assert game.step() is None
    assert not game.defers_results
