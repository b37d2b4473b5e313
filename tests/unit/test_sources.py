"""The orchestrator's side of drafting: names, orders, lookups, and what is told to whom."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeinfer.core.addresses import ORCHESTRATOR
from pipeinfer.core.messages import (
    MAX_ROWS,
    Advance,
    Body,
    Calibrate,
    Close,
    DraftNode,
    DraftOrder,
    Message,
    Nodes,
    Prompt,
    Settings,
    accepted_name,
)
from pipeinfer.core.ports import Request, Sampling, Send
from pipeinfer.orchestrator.session import Session
from pipeinfer.orchestrator.sources import LOOKUP, Sources
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import UNLIMITED, Order
from speculation.trees.tree import SLACK, Node

FIRST, SECOND = 0x8000, 0x8001
PROMPT = (5, 6, 7, 5, 6)
ROOT = accepted_name(4)
"""What everybody calls the prompt's last token."""


def say(dest: int, body: Body) -> Send:
    return Send(Message(ORCHESTRATOR, dest, body))


def begun(request: Request, sequence: int, sources: Sources) -> Session:
    """The session of ``request``, as ``sequence``."""
    session = Session(request, 7, 1, list(request.prompt))
    session.begin(sequence, sources.most_nodes())
    return session


class Served:
    """Sources that serve one request, and its tree."""

    def __init__(
        self,
        drafters: tuple[int, ...] = (FIRST, SECOND),
        prompt: tuple[int, ...] = PROMPT,
        most: int = 20,
        stops: frozenset[int] = frozenset(),
        sampling: Sampling | None = None,
        **knobs: Any,
    ) -> None:
        policy = Policy("test", **{"max_rows": 4, "topk": 2, "max_ahead": 8} | knobs)
        self.sources = Sources(drafters, policy, 2000, say, {})
        request = Request(prompt, most, stops, sampling or Sampling())
        session = begun(request, 1, self.sources)
        self.tree = session.tree
        self.told = self.sources.open(session)

    def grow(self, source: int, *rows: tuple[int, int, int], ends: bool = False, sequence: int = 1) -> Any:
        """Nodes as (token, name, parent's name), each claimed to be certain by half."""
        nodes = tuple(DraftNode(*row, math.log(0.5)) for row in rows)
        return self.sources.grow(source, Nodes(sequence, 4, ends, nodes))

    def accept(self, *tokens: int, restart: bool = False, wanted: bool = True) -> list[Send]:
        heirs = []
        for token in tokens:
            self.tree.root.choice = token
            self.sources.verified(self.tree.root)
            heirs.append(self.tree.advance(token)[0])
        return self.sources.advance(1, heirs, restart, wanted)

    def paths(self, node: Node | None = None) -> dict[int, Any]:
        """The tree below the root as tokens in tokens."""
        here = node or self.tree.root
        return {token: self.paths(child) for token, child in here.children.items()}


def kinds(said: list[Send]) -> list[tuple[type, int]]:
    return [(type(send.message.body), send.message.dest) for send in said]


def test_every_drafter_hears_how_tokens_are_drawn_then_the_prompt() -> None:
    sampling = Sampling(0.5, seed=3)
    told = Served(sampling=sampling).told
    assert kinds(told) == [(Settings, FIRST), (Prompt, FIRST), (Settings, SECOND), (Prompt, SECOND)]
    assert [send.message.body for send in told[:2]] == [sampling.settings(1, len(PROMPT)), Prompt(1, 23, True, PROMPT)]


def test_a_long_prompt_comes_in_parts_and_the_last_says_so() -> None:
    prompt = tuple(range(MAX_ROWS + 3))
    parts = [send.message.body for send in Served((FIRST,), prompt=prompt).told[1:]]
    last_position = len(prompt) + 18
    assert parts == [
        Prompt(1, last_position, False, prompt[:MAX_ROWS]), Prompt(1, last_position, True, prompt[MAX_ROWS:]),
    ]  # fmt: skip


def test_each_drafter_has_names_of_its_own() -> None:
    served = Served()
    served.grow(FIRST, (1, 1, ROOT), (2, 2, 1))
    served.grow(SECOND, (3, 1, ROOT), (4, 2, 1))
    assert served.paths() == {1: {2: {}}, 3: {4: {}}}


def test_while_no_guess_is_wanted_drafters_hear_nothing_and_then_all_at_once() -> None:
    served = Served((FIRST,), most=3 * MAX_ROWS, prompt_lookup=4)
    tokens = tuple(5 + index % 3 for index in range(MAX_ROWS + 1))
    assert all(served.accept(token, wanted=False) == [] for token in tokens)
    assert served.sources.order(Order(0)) == [say(FIRST, DraftOrder(1, False, 0, 0, 0.0))]
    assert served.paths() == {}, "nobody has looked the text up either"
    told = [send.message.body for send in served.sources.order(Order(1))]
    assert told[:2] == [Advance(1, 5, False, tokens[:MAX_ROWS]), Advance(1, 5 + MAX_ROWS, False, tokens[MAX_ROWS:])]
    assert isinstance(told[2], DraftOrder) and served.paths()
    assert served.accept(9) == [say(FIRST, Advance(1, 6 + MAX_ROWS, False, (9,)))]


def test_what_two_have_found_is_one_node_of_the_first() -> None:
    served = Served()
    served.grow(FIRST, (1, 1, ROOT))
    served.grow(SECOND, (1, 9, ROOT), (2, 10, 9))
    assert served.paths() == {1: {2: {}}}
    assert served.tree.root.children[1].source == FIRST


def test_accepted_tokens_have_a_name_that_nobody_needs_to_say() -> None:
    served = Served()
    served.accept(8, 9)
    served.grow(SECOND, (3, 1, accepted_name(6)))
    assert served.paths() == {3: {}}


def test_what_hangs_on_a_dead_branch_is_left_out() -> None:
    served = Served()
    served.grow(FIRST, (1, 1, ROOT), (2, 2, 1))
    served.accept(8)
    served.grow(FIRST, (3, 3, 2), (4, 4, 3), (5, 5, 77))
    assert served.paths() == {}
    assert served.tree.size == 1


def test_what_is_of_no_use_to_the_request_is_left_out() -> None:
    served = Served(most=2, stops=frozenset({9}))  # the last position of use is 5
    served.grow(FIRST, (1, 1, ROOT), (2, 2, 1), (9, 3, ROOT), (4, 4, 3))
    assert served.paths() == {1: {}}


def test_words_about_another_sequence_are_ignored() -> None:
    served = Served()
    assert served.grow(FIRST, (1, 1, ROOT), sequence=2) is None
    assert served.paths() == {}
    served.sources.close(1)
    assert served.grow(FIRST, (1, 1, ROOT)) is None


def test_siblings_come_best_first() -> None:
    served = Served((FIRST,))
    served.grow(FIRST, (1, 1, ROOT), (2, 2, ROOT), (3, 3, 1), (4, 4, 1))
    ranks = {node.token: node.rank for node in served.tree.root.children.values()}
    assert ranks == {1: 0, 2: 1}
    assert [node.rank for node in served.tree.root.children[1].children.values()] == [0, 1]


# Orders.


def test_an_order_goes_to_all_and_is_done_when_all_are() -> None:
    served = Served()
    said = served.sources.order(Order(3, 0.25, restart=True, draft_batch=2))
    assert kinds(said) == [(DraftOrder, FIRST), (DraftOrder, SECOND)]
    assert {send.message.body for send in said} == {DraftOrder(1, True, 3, 2, 0.25)}
    assert served.grow(FIRST, (1, 1, ROOT)) is None
    assert served.grow(SECOND, (1, 1, ROOT), (2, 2, 1), ends=True) is None
    found = served.grow(FIRST, (3, 2, 1), ends=True)
    assert [node.token for node in found] == [1, 1, 2, 3]


def test_drafters_share_the_sequences() -> None:
    served = Served()
    said = served.sources.order(Order(UNLIMITED, shared=True))
    passes = {send.message.dest: send.message.body.passes for send in said}  # type: ignore[union-attr]
    assert passes == {FIRST: 0, SECOND: UNLIMITED}, "sequence 1 is the second drafter's"


def test_an_order_that_finds_nothing_is_done_too() -> None:
    served = Served((FIRST,))
    served.sources.order(Order(1))
    assert served.grow(FIRST, ends=True) == []


def test_a_second_answer_is_none() -> None:
    served = Served((FIRST,))
    served.sources.order(Order(1))
    served.grow(FIRST, ends=True)
    assert served.grow(FIRST, ends=True) is None


@pytest.mark.parametrize("passes", [0, UNLIMITED])
def test_nobody_waits_for_an_answer_to_work_without_end_or_not_at_all(passes: int) -> None:
    served = Served((FIRST,))
    assert len(served.sources.order(Order(passes))) == 1
    assert served.grow(FIRST, (1, 1, ROOT), ends=True) is None


def test_what_died_meanwhile_is_not_among_what_was_found() -> None:
    served = Served((FIRST,))
    served.sources.order(Order(2))
    served.grow(FIRST, (1, 1, ROOT), (2, 2, 1), (3, 3, ROOT))
    served.accept(1)
    found = served.grow(FIRST, ends=True)
    assert [node.token for node in found] == [2], "the accepted one is no guess any more"


# What is told of acceptance.


def test_accepted_tokens_are_told_to_all_with_the_position_of_the_first() -> None:
    said = Served().accept(8, 9)
    assert kinds(said) == [(Advance, FIRST), (Advance, SECOND)]
    assert {send.message.body for send in said} == {Advance(1, 5, False, (8, 9))}
    assert Served().accept(8, restart=True)[0].message.body == Advance(1, 5, True, (8,))


def test_the_end_is_told_to_all() -> None:
    served = Served()
    said = served.sources.close(1)
    assert kinds(said) == [(Close, FIRST), (Close, SECOND)]
    assert {send.message.body for send in said} == {Close(1)}
    assert served.sources.names == [0, 0]
    assert served.sources.order(Order(1)) == [], "nobody is left to draft for"


def test_only_a_drafter_of_which_something_was_learnt_is_told() -> None:
    served, told = Served(calibrate=True), list[tuple[type, int]]()
    for position in range(4, 16):
        served.grow(SECOND, (1, position, accepted_name(position)))
        told += kinds(served.accept(8))
    assert (Calibrate, SECOND) in told
    assert (Calibrate, FIRST) not in told
    assert told.count((Calibrate, SECOND)) == served.sources.calibrations[SECOND].revision


def test_the_tree_believes_what_was_learnt() -> None:
    served = Served((FIRST,), calibrate=True, most=100)
    for position in range(4, 60):
        served.grow(FIRST, (1, position, accepted_name(position)))
        served.accept(8)
    served.grow(FIRST, (1, 99, accepted_name(60)))
    (node,) = served.tree.root.children.values()
    assert node.claim == math.log(0.5)
    assert served.tree.probability(node) < 0.1, "it never was right"
    assert served.sources.claimed.rows()[0].observed == 0.0


def test_without_calibration_claims_are_taken_as_they_are() -> None:
    served = Served((FIRST,), most=100)
    for position in range(4, 60):
        served.grow(FIRST, (1, position, accepted_name(position)))
        assert served.tree.probability(served.tree.root.children[1]) == pytest.approx(0.5)
        served.accept(8)


def test_old_names_are_forgotten() -> None:
    served = Served((FIRST,), most=1000)
    for name in range(1000):
        root = served.tree.root.position
        served.sources.grow(FIRST, Nodes(1, root, nodes=(DraftNode(1, name, accepted_name(root), -1.0),)))
        served.accept(8)
    assert max(served.sources.names) <= SLACK + 2 * served.tree.size + 2


# Lookup.


def test_what_has_been_said_before_is_guessed_again() -> None:
    served = Served((), prompt_lookup=2)
    assert served.paths() == {7: {5: {}}}, "after 5 6 came 7 5"
    assert [node.source for node in served.tree.root.children.values()] == [LOOKUP]
    served.accept(7)
    assert served.paths() == {5: {6: {}}}


def test_a_lookup_follows_what_others_have_guessed() -> None:
    served = Served((FIRST,), prompt_lookup=1)
    served.grow(FIRST, (7, 1, ROOT), (5, 2, 1), (9, 3, 1))
    served.accept(7)
    assert served.paths() == {5: {}, 9: {}}
    assert served.tree.root.children[5].source == FIRST


def test_a_lookup_stops_where_the_request_does() -> None:
    assert Served((), prompt_lookup=9, most=2).paths() == {7: {}}
    assert Served((), prompt_lookup=9, stops=frozenset({5})).paths() == {7: {}}


def test_a_new_round_looks_up_again_what_was_thrown_away() -> None:
    served = Served((FIRST,), prompt_lookup=2)
    served.tree.prune()
    served.sources.order(Order(1, restart=True))
    assert served.paths() == {7: {5: {}}}


def test_the_last_request_is_not_looked_up() -> None:
    served = Served((), prompt=(1, 2, 3, 1, 2), prompt_lookup=2)
    served.sources.close(1)
    session = begun(Request((1, 2), 9), 2, served.sources)
    served.sources.open(session)
    assert session.tree.root.children == {}
