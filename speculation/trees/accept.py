"""Acceptance: how far the target's choices carry the tree.

The rule is the exact one: the emitted token is always the target's own choice after the last accepted token. A guess is
accepted when it is that very token; then its own choice, already computed, is the next token. So the text is that of
plain decoding whatever was guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeinfer.core.messages import TopToken, fault_layer
from speculation.trees.tree import Node, Tree


@dataclass(slots=True)
class Acceptance:
    """The outcome of one walk: nodes that became accepted, in order, the target's log-probabilities of their
    tokens, the most probable tokens in their places, nodes that died, whether a stop token came, and the layer
    whose numbers are not finite for the last one, if any."""

    accepted: list[Node] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    tops: list[tuple[TopToken, ...]] = field(default_factory=list)
    died: list[Node] = field(default_factory=list)
    stopped: bool = False
    fault: int | None = None


def accept(
    tree: Tree, most: int, stop_tokens: frozenset[int], on_verified: Callable[[Node], None] = lambda node: None
) -> Acceptance:
    """Advance ``tree`` while its root is verified, by at most ``most`` tokens, up to and including a stop token or
    a root after which there is no choice, because its numbers are not finite.

    ``on_verified`` sees each root once its choice is known, with the guesses below it still there."""
    outcome = Acceptance()
    while tree.root.choice is not None and len(outcome.accepted) < most and not outcome.stopped:
        outcome.fault = fault_layer(tree.root.choice)
        if outcome.fault is not None:
            break
        on_verified(tree.root)
        outcome.logps.append(tree.root.choice_logp)
        outcome.tops.append(tree.root.choice_top)
        heir, died = tree.advance(tree.root.choice)
        outcome.accepted.append(heir)
        outcome.died.extend(died)
        outcome.stopped = heir.token in stop_tokens
    return outcome
