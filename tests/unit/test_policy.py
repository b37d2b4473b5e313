from __future__ import annotations

from typing import Any

import pytest

from pipeinfer.core.messages import MAX_ROWS
from speculation.schedules.continuous import choose_rows
from speculation.schedules.policy import CONTINUOUS, PLAIN, Policy
from speculation.trees.tree import Tree

WIDE = Policy("wide", max_rows=4, topk=2, draft_batch=2, max_ahead=8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_rows": 0}, {"max_rows": MAX_ROWS + 1}, {"topk": 0}, {"draft_batch": 0}, {"prefill_chunk": 0},
        {"max_ahead": -1},
        {"window": -1}, {"min_path_prob": -0.1}, {"min_path_prob": 1.1}, {"cancel": "perhaps"},
        {"draft_batch": 64, "topk": 64},
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="policy odd: .*" + next(iter(wrong))):
        Policy("odd", **wrong)


def test_the_window_follows_the_stages_unless_it_is_given() -> None:
    assert [PLAIN.most_runs(stages) for stages in (1, 8)] == [4, 18]
    assert Policy("narrow", window=3).most_runs(8) == 3


def test_the_published_policies_are_what_they_say() -> None:
    assert not PLAIN.speculate
    assert CONTINUOUS.speculate
    assert CONTINUOUS.max_rows > 1


def tree_of(*logps: float, taken: bool) -> Tree:
    tree = Tree(0, 0, 50)
    for token, logp in enumerate(logps):
        tree.add(tree.root, token, logp)
    if taken:
        tree.take(tree.root)
    return tree


def tokens(tree: Tree, policy: Policy, room: int) -> list[tuple[int, int]]:
    return [(node.position, node.token) for node in choose_rows(tree, policy, room)]


def test_the_best_guesses_go_as_many_as_a_run_holds() -> None:
    tree = tree_of(-0.3, -0.1, -0.2, -0.5, -0.4, taken=True)
    assert tokens(tree, WIDE, 100) == [(1, 1), (1, 2), (1, 0), (1, 4)]
    assert tokens(tree, WIDE, 100) == [(1, 3)]
    assert tokens(tree, WIDE, 100) == []


def test_a_root_that_was_not_sent_leads_and_needs_no_room() -> None:
    assert tokens(tree_of(-0.1, taken=False), WIDE, 0) == [(0, 0)]
    assert tokens(tree_of(-0.1, -0.2, taken=False), WIDE, 1) == [(0, 0), (1, 0)]


def test_guesses_go_only_where_there_is_room() -> None:
    assert tokens(tree_of(-0.1, -0.2, -0.3, taken=True), WIDE, 2) == [(1, 0), (1, 1)]


def test_min_path_prob_keeps_improbable_nodes_unsent() -> None:
    policy = Policy("careful", max_rows=4, min_path_prob=0.5)
    assert tokens(tree_of(-0.1, -0.6, -0.8, taken=True), policy, 9) == [(1, 0), (1, 1)]


def test_plain_decoding_sends_the_root_alone() -> None:
    assert tokens(tree_of(-0.1, taken=False), PLAIN, 9) == [(0, 0)]
    assert tokens(tree_of(-0.1, taken=True), PLAIN, 9) == []
