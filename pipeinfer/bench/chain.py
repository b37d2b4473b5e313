"""Greedy decoding of one text with a chain of guesses: the draft proposes some tokens, the target checks all at once.

Both models are anything that evaluates tokens at positions, ours or another implementation's. This is the usual loop of
a program that decodes one text with a draft, in its simplest form: one thing after the other, in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pipeinfer.core.ports import Batch, Payload, ShardModel
from pipeinfer.core.slots import batch_in_order


class Evaluator(Protocol):
    """A model with the keys and values of one text."""

    def choices(self, tokens: Sequence[int], first: int, wanted: int) -> list[int]:
        """The most probable token after each of the last ``wanted`` of ``tokens``, which stand at the positions from
        ``first`` on. What was at these positions, and after them, is forgotten."""
        ...


def decode(
    target: Evaluator,
    draft: Evaluator | None,
    prompt: Sequence[int],
    count: int,
    length: int = 0,
    emitted: Callable[[int], None] = lambda count: None,
) -> list[int]:
    """``count`` tokens after ``prompt``, with chains of up to ``length`` guesses of ``draft``. ``emitted`` is told how
    many tokens each pass of ``target`` has given."""
    text = [*prompt, *target.choices(prompt, 0, 1)]
    known = 0  # tokens of the text that the draft has keys and values of
    if draft is not None:
        draft.choices(prompt, 0, 1)
        known = len(prompt)
    emitted(1)
    end = len(prompt) + count
    while len(text) < end:
        guesses: list[int] = []
        if draft is not None:
            for _ in range(min(length, end - len(text) - 1)):
                guesses += draft.choices((text + guesses)[known:], known, 1)
                known = len(text) + len(guesses) - 1
        found = target.choices([text[-1], *guesses], len(text) - 1, 1 + len(guesses))
        right = 0
        while right < len(guesses) and guesses[right] == found[right]:
            right += 1
        text += found[: right + 1]
        known = min(known, len(text) - 1)
        emitted(right + 1)
    return text[len(prompt) :]


class ShardEvaluator:
    """A whole model of ours as an Evaluator; the token at a position is in the slot of that number."""

    def __init__(self, shard: ShardModel) -> None:
        self._shard = shard

    def choices(self, tokens: Sequence[int], first: int, wanted: int) -> list[int]:
        """See Evaluator."""
        hidden = run_pass(self._shard, batch_in_order(tokens, first))
        rows = range(len(tokens) - wanted, len(tokens))
        return [found[0][0] for found in self._shard.sample(hidden, rows, 1)]


def run_pass(shard: ShardModel, batch: Batch, hidden: Payload | None = None) -> Payload:
    """What ``shard`` makes of ``batch`` without a pause."""
    passing = shard.forward(batch, hidden)
    while True:
        try:
            next(passing)
        except StopIteration as done:
            return done.value
