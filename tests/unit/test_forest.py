"""Several trees are taken from as if they were one: best path first, whatever the sequence."""

from __future__ import annotations

import random

import pytest

from speculation.trees.forest import give_back, probabilities, take_best
from speculation.trees.tree import Node, Tree, descendants

MANY = 1000


def grown(sequence: int, *logps: float, shift: float = 0.0) -> Tree:
    """A chain whose nodes have these log-probabilities, each given the one before. Its tree has been ``shift`` less
    probable for long."""
    tree = Tree(0, 4, 100, sequence)
    tree.root.logp += shift
    parent: Node | None = tree.root
    for token, logp in enumerate(logps):
        assert parent is not None
        parent = tree.add(parent, token, logp)
    return tree


def names(nodes: list[Node]) -> list[tuple[int, int]]:
    return [(node.sequence, node.position) for node in nodes]


def test_nodes_of_all_trees_leave_best_path_first() -> None:
    trees = [grown(7, -0.5, -0.5), grown(8, -0.1, -0.2, -0.4)]
    assert names(take_best(trees, MANY, MANY, MANY, 0.0)) == [(7, 4), (8, 4), (8, 5), (8, 6), (7, 5), (8, 7), (7, 6)]
    assert take_best(trees, MANY, MANY, MANY, 0.0) == []


def test_a_path_counts_from_the_root_of_its_own_tree() -> None:
    trees = [grown(7, -0.5, shift=-90.0), grown(8, -0.6)]
    assert names(take_best(trees, MANY, MANY, MANY, 0.0)) == [(7, 4), (8, 4), (7, 5), (8, 5)]


def test_among_equals_the_first_tree_is_served_first() -> None:
    trees = [grown(9, -0.5), grown(3, -0.5), grown(5, -0.5)]
    assert names(take_best(trees, 4, MANY, MANY, 0.0)) == [(9, 4), (3, 4), (5, 4), (9, 5)]


@pytest.mark.parametrize("roots", [0, 1, 2, 3])
def test_a_tree_whose_root_stays_is_left_alone(roots: int) -> None:
    trees = [grown(sequence, -0.1) for sequence in (1, 2, 3)]
    taken = take_best(trees, MANY, roots, MANY, 0.0)
    assert names(taken) == [(one, 4) for one in range(1, roots + 1)] + [(one, 5) for one in range(1, roots + 1)]
    assert [tree.root.pending for tree in trees] == [index >= roots for index in range(3)]


def test_roots_are_no_guesses_and_always_probable_enough() -> None:
    trees = [grown(1, -0.1, -0.1), grown(2, -0.2)]
    assert names(take_best(trees, MANY, MANY, 0, 1.0)) == [(1, 4), (2, 4)]
    assert names(take_best(trees, MANY, 0, 2, 0.0)) == [(1, 5), (1, 6)], "equals: the first tree"


def test_no_node_below_the_least_path_probability() -> None:
    trees = [grown(1, -0.5, -0.1), grown(2, -0.7, -0.01), grown(3, -0.6)]
    assert names(take_best(trees, MANY, MANY, MANY, 0.54)) == [(1, 4), (2, 4), (3, 4), (1, 5), (1, 6), (3, 5)]


def test_a_dead_or_taken_node_is_passed_over() -> None:
    trees = [grown(1, -0.1, -0.1), grown(2, -0.2)]
    take_best(trees, 2, MANY, MANY, 0.0)
    trees[0].advance(9)
    assert names(take_best(trees, MANY, MANY, MANY, 0.0)) == [(1, 5), (2, 5)], "the new root is nobody's guess"


def test_what_is_given_back_is_taken_again_in_the_same_order() -> None:
    trees = [grown(1, -0.3, -0.3), grown(2, -0.1, -0.1, -0.3), grown(3)]
    by_sequence = {tree.sequence: tree for tree in trees}
    for count in (9, 5, 2, 0):
        taken = take_best(trees, MANY, MANY, MANY, 0.0)
        assert len(taken) == 8
        give_back(by_sequence, taken[count:])
        assert names(take_best(trees, MANY, MANY, MANY, 0.0)) == names(taken[count:])
        give_back(by_sequence, taken)


def test_probabilities_are_those_of_each_tree() -> None:
    trees = [grown(1, -0.5, shift=-3.0), grown(2, -0.25, -0.25)]
    taken = take_best(trees, MANY, MANY, MANY, 0.0)
    found = probabilities({tree.sequence: tree for tree in trees}, taken)
    assert found == pytest.approx([trees[node.sequence - 1].probability(node) for node in taken])
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(20))
def test_one_tree_is_taken_as_it_takes_itself(seed: int) -> None:
    forests = []
    for _ in range(2):
        rng, tree = random.Random(seed), Tree(0, 0, 200)
        for _ in range(60):
            parent = rng.choice([tree.root, *descendants(tree.root)])
            tree.add(parent, rng.randrange(3), -rng.random())
        forests.append(tree)
    rng = random.Random(seed)
    while True:
        most, guesses, least = rng.randint(1, 9), rng.randint(0, 9), rng.choice([0.0, 0.01])
        one = take_best([forests[0]], most, 1, guesses, least)
        assert names(one) == names(forests[1].take_best(most, guesses, least)), f"seed {seed}"
        if not one and guesses:
            break
