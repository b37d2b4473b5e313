"""Faults of log-probabilities of prompts: rows that are not computed, wrong tokens, what is told twice or never."""

from __future__ import annotations

from typing import Any

import pytest

from pipeinfer.core.messages import Run
from pipeinfer.core.ports import SamplingInputs
from pipeinfer.orchestrator.flight import InFlight
from pipeinfer.orchestrator.pool import Pool
from pipeinfer.orchestrator.session import Session
from stages.stage.machine import Stage
from tests.invariants.hunt import Mutant, roll, wrap

SCORES: list[Mutant] = []
SCORES_OF_MANY: list[Mutant] = []
mutant, mutant_of_many = roll(SCORES), roll(SCORES_OF_MANY, many=True)


@mutant("L1")
def a_row_is_scored_by_its_own_token(patch: pytest.MonkeyPatch) -> None:
    def next_token(original: Any, session: Session, position: int) -> int:
        return session.text[position] if original(session, position) >= 0 else -1

    wrap(patch, Session, "next_token", next_token)


@mutant("L1")
def a_token_that_is_given_is_drawn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SamplingInputs, "gives", lambda draw, row: False)


@mutant("L1")
def scores_of_the_first_chunk_are_lost(patch: pytest.MonkeyPatch) -> None:
    def scores(original: Any, run: InFlight, result: Any, session: Session) -> Any:
        is_first = session.scored == 1
        told = original(run, result, session)
        return [] if is_first else told

    wrap(patch, InFlight, "scores", scores)


@mutant("L6")
def a_stage_passes_on_no_next_tokens(patch: pytest.MonkeyPatch) -> None:
    def send(original: Any, stage: Stage, dest: int, body: Any, payload: Any = None) -> Any:
        return original(stage, dest, body._replace(next_tokens=()) if isinstance(body, Run) else body, payload)

    wrap(patch, Stage, "_send", send)


@mutant_of_many("L1")
def a_prompt_that_is_scored_shares_slots(patch: pytest.MonkeyPatch) -> None:
    def begin(original: Any, pool: Pool, session: Session, *rest: Any) -> Any:
        scored, session.scored = session.scored, len(session.request.prompt)
        shared = original(pool, session, *rest)
        session.scored = scored
        return shared

    wrap(patch, Pool, "begin", begin)


@mutant_of_many("L1")
def a_preempted_request_tells_its_prompt_again(patch: pytest.MonkeyPatch) -> None:
    def begin(original: Any, session: Session, *rest: Any) -> None:
        original(session, *rest)
        if session.request.sampling.prompt_logprobs is not None:
            session.scored = 1

    wrap(patch, Session, "begin", begin)
