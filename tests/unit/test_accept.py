from __future__ import annotations

from pipeinfer.core.messages import fault_token
from speculation.trees.accept import accept
from speculation.trees.tree import Node, Tree


def chain(*tokens: int) -> tuple[Tree, list[Node]]:
    """A tree of one branch; the root's token is 100."""
    tree = Tree(100, 0, 50)
    nodes = [tree.root]
    for token in tokens:
        node = tree.add(nodes[-1], token, -0.1)
        assert node is not None
        nodes.append(node)
    return tree, nodes


def verify(nodes: list[Node], *choices: int) -> None:
    for node, choice in zip(nodes, choices, strict=False):
        node.choice = choice


def test_nothing_is_accepted_before_the_root_is_verified() -> None:
    tree, nodes = chain(1, 2)
    nodes[1].choice = 2
    assert accept(tree, 9, frozenset()).accepted == []
    assert tree.root is nodes[0]


def test_right_guesses_and_the_targets_own_token_are_accepted() -> None:
    tree, nodes = chain(1, 2)
    verify(nodes, 1, 2, 3)
    outcome = accept(tree, 9, frozenset())
    assert [node.token for node in outcome.accepted] == [1, 2, 3]
    assert outcome.accepted[:2] == nodes[1:]
    assert outcome.accepted[2].slot is None
    assert outcome.died == []
    assert tree.root.token == 3


def test_a_wrong_guess_dies_with_all_below_it() -> None:
    tree, nodes = chain(1, 2, 3)
    verify(nodes, 1, 9, 3, 4)
    outcome = accept(tree, 9, frozenset())
    assert [node.token for node in outcome.accepted] == [1, 9]
    assert outcome.died == nodes[2:]


def test_a_sibling_that_is_right_survives() -> None:
    tree, nodes = chain(1, 2)
    sibling = tree.add(tree.root, 5, -3.0)
    verify(nodes, 5)
    outcome = accept(tree, 9, frozenset())
    assert outcome.accepted == [sibling]
    assert outcome.died == nodes[1:]


def test_no_more_than_most() -> None:
    tree, nodes = chain(1, 2)
    verify(nodes, 1, 2, 3)
    assert [node.token for node in accept(tree, 2, frozenset()).accepted] == [1, 2]
    assert [node.token for node in accept(tree, 0, frozenset()).accepted] == []


def test_a_stop_token_is_the_last_one_accepted() -> None:
    tree, nodes = chain(1, 2)
    verify(nodes, 1, 2, 3)
    outcome = accept(tree, 9, frozenset({1, 3}))
    assert [node.token for node in outcome.accepted] == [1]
    assert outcome.stopped


def test_the_walk_ends_at_an_accepted_row_whose_numbers_are_not_finite() -> None:
    tree, nodes = chain(1, 2)
    verify(nodes, 1, fault_token(4), 3)
    verified = list[Node]()
    outcome = accept(tree, 9, frozenset(), verified.append)
    assert ([node.token for node in outcome.accepted], outcome.fault, verified) == ([1], 4, nodes[:1])


def test_a_faulty_guess_that_is_not_accepted_is_a_wrong_guess() -> None:
    tree, nodes = chain(1)
    verify(nodes, 7, fault_token(0))
    outcome = accept(tree, 9, frozenset())
    assert ([node.token for node in outcome.accepted], outcome.fault) == ([7], None)
