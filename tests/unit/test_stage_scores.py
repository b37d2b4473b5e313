"""A stage whose runs carry the next tokens of a prompt: what the last one computes, and what others pass on."""

from __future__ import annotations

from pipeinfer.core.messages import NO_SLOT, NO_TOKEN, Result, Row, Run, Wants
from pipeinfer.core.ports import Computed, Sampling
from tests.unit.test_stage import LAST, TREE, Neighbours, compute_of, sent


def test_log_probabilities_of_a_prompt_are_asked_of_the_last_stage() -> None:
    around = Neighbours(LAST)
    around.tell(Sampling(0.5, repetition_penalty=2.0, prompt_logprobs=2).settings(2, 3))
    rows = (Row(7, 2, NO_SLOT, 2, 1), Row(5, 4, NO_SLOT, 0, 2), Row(4, 5, NO_SLOT, 1, 2), Row(3, 6, NO_SLOT, 2, 2))
    given = (NO_TOKEN, 4, 3, NO_TOKEN)
    command = compute_of(around.run(2, *rows, is_canonical=True, wants=Wants.LAST, next_tokens=given))
    assert command.draw is not None
    assert (command.rows, command.draw.given) == ((0, 1, 2, 3), given)
    beside = Sampling(top_logprobs=2)
    assert command.draw.samplings[1:3] == (beside, beside), "nothing is drawn there"
    assert [tokens.tolist() for tokens in command.draw.seen] == [[], [], [], [3, 4, 5]]
    choices = [[(9, -0.5)], [(4, -2.0), (6, -0.5), (4, -2.0)], [(3, -1.0), (3, -1.0), (2, -3.0)], [(8, -0.25)]]
    (result,) = sent(around.stage.handle(Computed(2, None, choices, 0.0), 0.0), Result)
    assert [(row.token, row.logp, row.top_count) for row in result.rows] == [
        (9, -0.5, 0), (4, -2.0, 2), (3, -1.0, 2), (8, -0.25, 0),
    ]  # fmt: skip


def test_a_chunk_of_which_no_token_is_wanted_may_be_asked_for_them() -> None:
    around = Neighbours(LAST)
    rows = (Row(5, 4, NO_SLOT, 0, 2), Row(4, 5, NO_SLOT, 1, 2))
    command = compute_of(around.run(2, *rows, is_canonical=True, wants=Wants.NOTHING, next_tokens=(4, 3)))
    assert command.draw is not None
    assert (command.rows, command.choices, command.draw.given) == ((0, 1), 1, (4, 3))


def test_next_tokens_go_on_with_their_rows() -> None:
    around = Neighbours()
    around.cancel((2, 3))
    around.run(2, *TREE, next_tokens=(20, 21, 22, 23))
    (passed_on,) = sent(around.computed(2), Run)
    assert (passed_on.rows, passed_on.next_tokens) == ((TREE[0], TREE[2]), (20, 22))
