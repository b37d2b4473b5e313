"""Worlds at the edge, one by one; every law is checked in each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeinfer.errors import StallError
from pipeinfer.ports import Request
from pipeinfer.protocol import Kind
from pipeinfer.sim.chronicle import oracle
from pipeinfer.sim.network import Link, Network
from pipeinfer.sim.random_worlds import check_world, every_law
from pipeinfer.sim.world import World, WorldSpec
from speculation.policy import Policy
from stages.emulated import EmulatedSpec, spread

POLICY = Policy("edge", rows=4, width=2, leaves=2, lead=12)
MODEL = EmulatedSpec(layers=12, vocab=40, ranks=spread(0.6, choices=3))
LONG = Request((3, 1, 4, 1, 5), 24)
BASE = WorldSpec(seed=1, policy=POLICY, stages=4, requests=(LONG, LONG), model=MODEL, context=64)


def of_policy(**changes: Any) -> WorldSpec:
    return replace(BASE, policy=replace(POLICY, **changes))


def of_request(*requests: Request) -> WorldSpec:
    return replace(BASE, requests=requests)


FIRST = oracle(MODEL, LONG)[0]
LATER = next(token for token in oracle(MODEL, LONG)[5:] if token not in oracle(MODEL, LONG)[:5])
EDGES = {
    "as it is": BASE,
    "one-token prompt": of_request(Request((7,), 24), Request((7,), 1)),
    "one new token": of_request(Request((7, 8, 9), 1)),
    "stop at once": of_request(replace(LONG, stop_tokens=frozenset({FIRST})), LONG),
    "stop later": of_request(replace(LONG, stop_tokens=frozenset({LATER})), LONG),
    "everything stops": of_request(replace(LONG, stop_tokens=frozenset(range(40)))),
    "window of one": of_policy(window=1),
    "window of two": of_policy(window=2),
    "no lead": of_policy(lead=0),
    "no lead, one leaf": of_policy(lead=0, leaves=1, width=1, rows=1),
    "nothing is worth a row": of_policy(floor=1.0),
    "plain": of_policy(speculate=False),
    "a prompt token per run": of_policy(prefill_chunk=1),
    "one stage": replace(BASE, stages=1),
    "twelve stages": replace(BASE, stages=12),
    "all advice lost": replace(BASE, link=Link(control_loss=1.0)),
    "all advice twice and late": replace(BASE, link=Link(control_repeat=1.0, jitter_s=3.0)),
    "advice relayed twice": replace(of_policy(cancel="relay"), link=Link(control_repeat=1.0, jitter_s=1.0)),
    "slow drafter": replace(BASE, draft_s=5.0),
    "slow drafter elsewhere": replace(BASE, draft_s=5.0, drafter_beside_orchestrator=False),
    "quick drafter elsewhere": replace(BASE, draft_s=0.001, drafter_beside_orchestrator=False),
    "no cells for guesses": replace(BASE, guess_cells=0),
    "one cell for guesses": replace(BASE, guess_cells=1),
    "two cells for guesses": replace(BASE, guess_cells=2),
    "no cell to spare": replace(BASE, context=29, guess_cells=1),
    "never right": replace(BASE, model=replace(MODEL, ranks=(0.0,))),
    "always right": replace(BASE, model=replace(MODEL, ranks=(1.0,)), policy=replace(POLICY, width=1)),
    "right but thinks it is wrong": replace(BASE, model=replace(MODEL, ranks=(1.0,), claims=(1e-6,))),
    "wrong but thinks it is right": replace(BASE, model=replace(MODEL, ranks=(0.0,), claims=(1.0, 1.0))),
    "two words in all": replace(BASE, model=replace(MODEL, vocab=2)),
    "far apart": replace(BASE, link=Link(delay_s=9.0)),
    "a thin wire": replace(BASE, link=Link(bandwidth=64.0)),
    "one slow stage": replace(BASE, stage_s=(0.1, 0.1, 4.0, 0.1)),
}


@pytest.mark.parametrize("spec", EDGES.values(), ids=EDGES)
def test_every_law_holds(spec: WorldSpec) -> None:
    check_world(spec)


def test_late_news_of_several_tokens() -> None:
    """Found by seed 747: two accepted tokens in one pass of the drafter, the first not yet committed."""
    policy = Policy("late", rows=6, width=4, leaves=2, lead=22, window=2, prefill_chunk=16)
    check_world(
        WorldSpec(
            seed=747,
            policy=policy,
            stages=1,
            requests=(Request((5,), 8),),
            model=EmulatedSpec(layers=2, vocab=60),
            stage_s=(0.2,),
            draft_s=1.0,
            drafter_beside_orchestrator=False,
        )
    )


def test_a_draft_that_is_always_right_is_always_accepted() -> None:
    spec = replace(EDGES["always right"], draft_s=0.001)
    for answer in World(spec, every_law(spec)).run():
        assert answer.tally is not None
        assert answer.tally.accepted > 16
        assert answer.tally.tombstones == answer.tally.cancelled_runs or answer.tally.corrections <= 8


def test_speculation_saves_time_and_a_useless_draft_costs_little() -> None:
    def seconds(spec: WorldSpec) -> float:
        world = World(spec)
        world.run()
        return world.now

    plain, useless = seconds(EDGES["plain"]), seconds(EDGES["never right"])
    assert seconds(replace(EDGES["always right"], draft_s=0.01)) < plain / 2
    assert useless < 1.5 * plain


def test_a_world_where_nothing_can_happen_says_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = Network.arrivals

    def lose(net: Network, source: int, dest: int, message: Any, *rest: Any) -> list[float]:
        when = arrivals(net, source, dest, message, *rest)
        return [] if message.kind is Kind.RESULT else when

    monkeypatch.setattr(Network, "arrivals", lose)
    with pytest.raises(StallError, match="in flight"):
        check_world(BASE)
