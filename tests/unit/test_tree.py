from __future__ import annotations

import gc

import pytest

from speculation.trees.tree import SLACK, Node, Tree, descendants


def grow(tree: Tree, parent: Node, token: int, logp: float) -> Node:
    node = tree.add(parent, token, logp)
    assert node is not None
    return node


def taken_root(max_nodes: int = 100) -> Tree:
    tree = Tree(7, 4, max_nodes)
    tree.take(tree.root)
    return tree


def drain(tree: Tree) -> list[int]:
    tokens = []
    while node := tree.best():
        tree.take(node)
        tokens.append(node.token)
    return tokens


def test_nodes_leave_best_path_first_and_parents_before_children() -> None:
    tree = Tree(0, 0, 100)
    a, b = grow(tree, tree.root, 1, -0.5), grow(tree, tree.root, 2, -0.6)
    grow(tree, b, 20, -0.01)  # path -0.61
    grow(tree, a, 10, -2.0)  # path -2.5
    grow(tree, tree.root, 3, -1.0)
    assert drain(tree) == [0, 1, 2, 20, 3, 10]


def test_equals_leave_in_the_order_they_came() -> None:
    tree = taken_root()
    for token in (5, 3, 9):
        grow(tree, tree.root, token, -1.0)
    assert drain(tree) == [5, 3, 9]


@pytest.mark.parametrize("logp", [0.0, -0.5], ids=["as probable as its parent", "less probable"])
def test_what_is_given_back_leaves_again_parents_first(logp: float) -> None:
    tree = Tree(0, 0, 100)
    for parent in (tree.root, grow(tree, tree.root, 1, logp)):
        for token in (2, 3):
            grow(tree, grow(tree, parent, token, logp), 10 * token, logp)
    entries = set()
    for count in (9, 3, 1, 5) * 5:
        taken = []
        while len(taken) < count and (node := tree.best()) is not None:
            tree.take(node)
            taken.append(node)
        assert all(node.parent is None or node.parent in taken[:index] for index, node in enumerate(taken))
        tree.give_back(taken)
        assert tree.best() is tree.root
        entries.add(len(tree._unsent))
    assert max(entries) <= tree.size, "nobody stands in it twice"
    assert sorted(drain(tree)) == [0, 1, 2, 2, 3, 3, 20, 20, 30, 30]


def test_a_child_is_never_more_probable_than_its_parent() -> None:
    tree = taken_root()
    node = grow(tree, tree.root, 1, 0.5)
    assert tree.probability(node) == 1.0


def test_a_token_is_added_once_per_parent() -> None:
    tree = taken_root()
    node = grow(tree, tree.root, 1, -1.0)
    assert tree.add(tree.root, 1, -0.1) is node
    assert tree.size == 2
    assert node.logp == -1.0


def test_advance_keeps_what_was_guessed_below_and_kills_the_rest() -> None:
    tree = taken_root()
    a, b = grow(tree, tree.root, 1, -0.5), grow(tree, tree.root, 2, -0.6)
    below_a, below_b = grow(tree, a, 10, -0.5), grow(tree, b, 20, -0.5)
    heir, dead = tree.advance(1)
    assert heir is a is tree.root
    assert set(dead) == {b, below_b}
    assert [node.alive for node in (a, below_a, b, below_b)] == [True, True, False, False]
    assert tree.size == 2 == 1 + len(descendants(tree.root))
    assert tree.probability(a) == 1.0
    assert drain(tree) == [1, 10]


def test_advance_makes_the_heir_that_nobody_guessed() -> None:
    tree = taken_root()
    a = grow(tree, tree.root, 1, -0.5)
    heir, dead = tree.advance(3)
    assert dead == [a]
    assert (heir.token, heir.position, tree.size) == (3, 5, 1)
    assert tree.best() is heir
    assert tree.probability(heir) == 1.0


def test_it_counts_the_tokens_that_a_draft_could_have_guessed_and_those_that_it_had() -> None:
    tree = Tree(0, 0, 100)
    for token, is_drafted in ((1, False), (2, True), (9, True), (1, True)):
        tree.add(tree.root, 1 + tree.root.token, -0.1)
        tree.root.is_drafted = is_drafted
        tree.advance(token)
    assert (tree.asked, tree.guessed) == (3, 1)


def test_late_words_about_the_old_root_find_its_heir_only() -> None:
    tree = taken_root()
    old = tree.root
    heir, _ = tree.advance(3)
    assert tree.add(old, 3, -0.1) is heir
    assert tree.add(old, 4, -0.1) is None
    assert tree.size == 1


def test_nothing_grows_on_a_dead_branch() -> None:
    tree = taken_root()
    dead = grow(tree, tree.root, 1, -0.5)
    tree.advance(2)
    assert tree.add(dead, 5, -0.1) is None


def test_a_full_tree_refuses_guesses_but_never_the_heir() -> None:
    tree = taken_root(max_nodes=2)
    grow(tree, tree.root, 1, -0.5)
    assert tree.add(tree.root, 2, -0.5) is None
    heir, _ = tree.advance(9)
    assert tree.size == 1
    assert tree.add(heir, 4, -0.5) is not None


def test_unevaluated_heirs_queue_in_order() -> None:
    """A drafter may hear of several tokens before it has evaluated the first of them."""
    tree = taken_root()
    heirs = [tree.advance(token)[0] for token in (1, 2, 3)]
    assert drain(tree) == [1, 2, 3]
    assert heirs[1].parent is heirs[0], "its row has yet to name its parent"


def test_unsent_nodes_do_not_collect_the_dead() -> None:
    tree = taken_root(max_nodes=8)
    for token in range(1000):
        for child in range(6):
            tree.add(tree.root, child, -1.0)
        tree.take(tree.root)
        tree.advance(token % 7)
        assert len(tree._unsent) <= SLACK + tree.size
        assert tree.size == 1 + len(descendants(tree.root)) <= tree.max_nodes


def test_the_dead_leave_nothing_to_the_garbage_collector() -> None:
    tree = taken_root(max_nodes=100)
    gc.collect()
    gc.disable()
    try:
        for bury in (tree.prune, lambda: tree.advance(9)):
            leaf = tree.root
            for token in range(5):
                leaf = grow(tree, leaf, token, -0.1)
            bury()
        del leaf
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("depth", [1, 5])
def test_descendants_come_parents_first(depth: int) -> None:
    tree = taken_root()
    node = tree.root
    for token in range(depth):
        node = grow(tree, node, token, -0.1)
    assert [seen.position for seen in descendants(tree.root)] == list(range(5, 5 + depth))


def test_prune_forgets_every_guess_and_nothing_else() -> None:
    tree = taken_root()
    a, b = grow(tree, tree.root, 1, -0.5), grow(tree, tree.root, 2, -0.6)
    below = grow(tree, a, 10, -0.5)
    tree.take(a)
    assert set(tree.prune()) == {a, b, below}
    assert not any(node.alive for node in (a, b, below))
    assert (tree.size, tree.best(), tree.root.alive, tree.root.children) == (1, None, True, {})
    assert tree.add(a, 5, -0.1) is None, "nothing grows on what is forgotten"
    again = grow(tree, tree.root, 1, -0.5)
    assert again is not a
    assert tree.best() is again


def test_prune_of_a_bare_tree_is_nothing() -> None:
    tree = Tree(7, 4, 100)
    assert tree.prune() == []
    assert tree.best() is tree.root


def test_prune_leaves_what_was_passed_and_is_still_to_be_evaluated() -> None:
    tree = taken_root()
    heirs = [tree.advance(token)[0] for token in (1, 2)]
    grow(tree, heirs[1], 3, -0.1)
    tree.prune()
    assert drain(tree) == [1, 2]


def test_a_renewed_root_is_taken_once_more() -> None:
    tree = taken_root()
    child = grow(tree, tree.root, 1, -0.5)
    tree.renew()
    assert tree.best() is tree.root
    tree.take(tree.root)
    assert tree.best() is child
    assert drain(tree) == [1]


def test_renewing_twice_is_renewing_once() -> None:
    tree = taken_root()
    for _ in range(3):
        tree.renew()
    assert drain(tree) == [7]


def test_a_guess_that_was_renewed_away_comes_back_pending() -> None:
    """What a drafter does on RESTART: forget, and evaluate the root again."""
    tree = taken_root()
    old = grow(tree, tree.root, 1, -0.5)
    tree.take(old)
    tree.prune()
    tree.renew()
    tree.take(tree.root)
    new = grow(tree, tree.root, 1, -0.5)
    assert new.pending
    assert drain(tree) == [1]
