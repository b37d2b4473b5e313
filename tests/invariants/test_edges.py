"""Worlds at the edge, one by one; every invariant is checked in each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeinfer.core.errors import StallError
from pipeinfer.core.links import Link
from pipeinfer.core.messages import MAX_ROWS, Cancel, Result
from pipeinfer.core.ports import Received, Request, Sampling
from pipeinfer.sim.history import oracle
from pipeinfer.sim.network import Network
from pipeinfer.sim.random_worlds import check_world, every_invariant
from pipeinfer.sim.replay import Recorder
from pipeinfer.sim.world import Answer, World, WorldSpec
from speculation.drafter.machine import MOST_FAULTY
from speculation.schedules.policy import Policy, read_policy
from stages.models.emulated import EmulatedSpec, spread

POLICY = Policy("edge", max_rows=4, topk=2, draft_batch=2, max_ahead=12)
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
    "max_ahead 0": of_policy(max_ahead=0),
    "max_ahead 0, one leaf": of_policy(max_ahead=0, draft_batch=1, topk=1, max_rows=1),
    "nothing is worth a row": of_policy(min_path_prob=1.0),
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
    "no slots for guesses": replace(BASE, guess_slots=0),
    "one slot for guesses": replace(BASE, guess_slots=1),
    "two slots for guesses": replace(BASE, guess_slots=2),
    "no slot to spare": replace(BASE, context=29, guess_slots=1),
    "never right": replace(BASE, model=replace(MODEL, ranks=(0.0,))),
    "always right": replace(BASE, model=replace(MODEL, ranks=(1.0,)), policy=replace(POLICY, topk=1)),
    "right but thinks it is wrong": replace(BASE, model=replace(MODEL, ranks=(1.0,), claims=(1e-6,))),
    "wrong but thinks it is right": replace(BASE, model=replace(MODEL, ranks=(0.0,), claims=(1.0, 1.0))),
    "two words in all": replace(BASE, model=replace(MODEL, vocab=2)),
    "far apart": replace(BASE, link=Link(delay_s=9.0)),
    "a thin wire": replace(BASE, link=Link(bandwidth=64.0)),
    "one slow stage": replace(BASE, stage_s=(0.1, 0.1, 4.0, 0.1)),
}

SMALL = replace(BASE, requests=(LONG,), model=replace(MODEL, layers=4))


def small(**changes: Any) -> WorldSpec:
    return replace(SMALL, policy=replace(POLICY, **changes))


SCHEDULES = {
    "plain": Policy("plain", speculate=False),
    "rounds": Policy("edge", schedule="rounds", num_steps=3, max_rows=6, topk=2, draft_batch=2, max_ahead=12),
    "pipeinfer": Policy(
        "edge", schedule="pipeinfer", max_rows=3, max_ahead=12, p_accept=0.3, p_recovery=0.2, cancel="relay"
    ),
    "continuous": POLICY,
}
DRAWN = Sampling(0.75, top_k=5, seed=2**63 + 7)
PENALISED = Sampling(repetition_penalty=1.5)
LIES = {
    "thinks it is right": EmulatedSpec(4, 40, ranks=(0.0,), claims=(1.0, 1.0)),
    "thinks it is wrong": EmulatedSpec(4, 40, ranks=(1.0,), claims=(1e-6,)),
    "takes its second choice for its best": EmulatedSpec(4, 40, ranks=(0.2, 0.7), claims=(0.9, 0.05)),
}
ROWS_LOST = {
    "lost": Link(control_loss=1.0),
    "twice and late": Link(control_repeat=1.0, jitter_s=3.0),
    "twice and at once": Link(control_repeat=1.0),
    "half of them": Link(control_loss=0.5, delay_s=0.3),
}
ONE_FALLS_SILENT = replace(BASE, silent_s=9.0, drafter_beside_orchestrator=False)
LOOKUP_ONLY = replace(
    small(prompt_lookup=8, topk=1), model=EmulatedSpec(4, vocab=2, ranks=(0.0,)), requests=(Request((1, 0, 1), 48),)
)
EDGES |= {f"three drafters, {name}": replace(SMALL, policy=policy, drafters=3) for name, policy in SCHEDULES.items()}
EDGES |= {
    f"three drafters elsewhere, {name}": replace(
        SMALL, policy=policy, drafters=3, drafter_beside_orchestrator=False, link=Link(delay_s=0.2, jitter_s=0.5)
    )
    for name, policy in SCHEDULES.items()
}
EDGES |= {
    f"{slots} slots for guesses, {name}": replace(SMALL, policy=policy, guess_slots=slots)
    for name, policy in SCHEDULES.items()
    for slots in (0, 1, 2)
}
EDGES |= {
    f"cancels of rows, {cancel}, {how}": replace(
        small(cancel=cancel, max_rows=8, topk=3, draft_batch=3, max_ahead=18, cancel_rows=True), link=link, row_cost=0.3
    )
    for cancel in ("direct", "relay")
    for how, link in ROWS_LOST.items()
}
EDGES |= {f"a draft that {how}, calibrated": replace(small(calibrate=True), model=lie) for how, lie in LIES.items()}
EDGES |= {
    f"greedy, then drawn, then greedy, {name}": replace(
        SMALL, policy=policy, requests=(LONG, replace(LONG, sampling=DRAWN), LONG)
    )
    for name, policy in SCHEDULES.items()
}
QUEUED = replace(SMALL, requests=(LONG, Request((7,), 3), replace(LONG, prompt=(2, 7)), Request((9,), 8)), at_once=True)
USERS: dict[str, dict[str, Any]] = {
    "all requests at once": {},
    "all at once, some aborted": {"aborts": ((6.0, 0), (3.0, 2), (3.0, 2), (1e4, 1))},
    "all at once, all aborted at once": {"aborts": tuple((0.0, number) for number in (2, 0, 1, 3))},
    "closed while requests wait": {"closes_s": 12.0},
    "closed before anybody is ready": {"closes_s": 0.0, "link": Link(delay_s=3.0)},
}
EDGES |= {
    f"{user}, {name}": replace(QUEUED, policy=policy, **does)
    for name, policy in SCHEDULES.items()
    for user, does in USERS.items()
}
FAULTS: dict[str, dict[str, Any]] = {
    "rows that are not finite": {"faulty": 0.02, "seed": 10},
    "many such rows, two stages": {"faulty": 0.3},
    "such rows in the draft": {"draft_faulty": 0.3},
    "a draft of nothing else": {"draft_faulty": 1.0},
    "in the first token": {"faulty": 1.0},
}
EDGES |= {
    f"{fault}, {name}": replace(
        QUEUED, policy=policy, at_once=False, model=replace(MODEL, **shares), stages=4 - 2 * (fault[0] == "m")
    )
    for name, policy in SCHEDULES.items()
    for fault, shares in FAULTS.items()
    if policy.speculate or "draft" not in fault
}
EDGES |= {
    f"a draft made for {positions} positions, {name}": replace(SMALL, policy=policy, draft_contexts=(positions,))
    for name, policy in SCHEDULES.items()
    for positions in (3, 12)
    if policy.speculate
}
EDGES |= {
    "a draft of nothing finite, one rank": replace(
        small(govern=True, launch_delay=True),
        placement="alone",
        stages=1,
        model=replace(MODEL, layers=4, draft_faulty=1.0),
    ),
    "rows that are not finite, one rank": replace(
        small(govern=True, launch_delay=True), placement="alone", stages=1, model=replace(MODEL, layers=4, faulty=0.05)
    ),
}
EDGES |= {
    f"repetition is penalised, {name}": replace(
        SMALL,
        policy=policy,
        model=replace(MODEL, vocab=5),
        requests=(replace(LONG, sampling=PENALISED), replace(LONG, sampling=replace(DRAWN, repetition_penalty=1.5))),
    )
    for name, policy in SCHEDULES.items()
}
EDGES |= {
    "a drafter falls silent": ONE_FALLS_SILENT,
    "two of three drafters fall silent": replace(ONE_FALLS_SILENT, drafters=3, drafter_beside_orchestrator=True),
    "a drafter was never heard of again": replace(ONE_FALLS_SILENT, silent_s=1e-3),
    "nothing wrong survives": small(reuse=False),
    "nothing wrong survives, three drafters": replace(small(reuse=False, prompt_lookup=5), drafters=3),
    "lookup only": LOOKUP_ONLY,
    "lookup only, rounds": replace(LOOKUP_ONLY, policy=replace(SCHEDULES["rounds"], prompt_lookup=8, topk=1)),
    "lookup beside a drafter": replace(LOOKUP_ONLY, model=replace(MODEL, vocab=2)),
    "lookup of a silent drafter": replace(LOOKUP_ONLY, silent_s=1e-3, drafter_beside_orchestrator=False),
    "rounds without drafts": replace(SMALL, policy=replace(SCHEDULES["rounds"], speculate=False)),
    "rounds without a drafter": replace(SMALL, policy=SCHEDULES["rounds"], drafters=0),
    "rounds of what was looked up": replace(
        LOOKUP_ONLY, policy=replace(SCHEDULES["rounds"], prompt_lookup=8, topk=1), drafters=0
    ),
    "PipeInfer's without a drafter": replace(SMALL, policy=replace(SCHEDULES["pipeinfer"], p_decay=0.1), drafters=0),
    "lookup without a drafter": replace(LOOKUP_ONLY, drafters=0),
    "governed lookup without a drafter": replace(small(prompt_lookup=8, govern=True), drafters=0),
    "governed": small(govern=True),
    "governed, and ranks share cores": replace(
        small(govern=True, max_rows=8), placement="oversubscribed", requests=(LONG,) * 4
    ),
    "one rank": replace(BASE, placement="alone", stages=1),
    "one rank of several stages": replace(BASE, placement="alone"),
    "one rank, governed": replace(
        small(govern=True, launch_delay=True, max_rows=8), placement="alone", stages=1, requests=(LONG,) * 4
    ),
    "governed, and every row costs": replace(small(govern=True, max_rows=8), row_cost=0.5, requests=(LONG,) * 4),
    "the published numbers of PipeInfer": replace(
        SMALL, policy=replace(SCHEDULES["pipeinfer"], max_ahead=512, window=64, p_accept=0.1, p_recovery=0.0)
    ),
    "a cutoff that nothing passes": replace(SMALL, policy=replace(SCHEDULES["pipeinfer"], p_accept=1.0)),
    "a cutoff that falls with every refusal": replace(
        SMALL, policy=replace(SCHEDULES["pipeinfer"], p_accept=0.95, p_decay=0.05)
    ),
}


@pytest.mark.parametrize("spec", EDGES.values(), ids=EDGES)
def test_every_invariant_holds(spec: WorldSpec) -> None:
    check_world(spec)


def answers(spec: WorldSpec) -> list[Answer]:
    return World(spec, every_invariant(spec)).run()


def test_what_was_drawn_before_does_not_matter() -> None:
    """The second of these is drawn; before and after it the same greedy request has the same answer."""
    first, drawn, last = (answer.tokens for answer in answers(EDGES["greedy, then drawn, then greedy, continuous"]))
    assert first == last != drawn
    assert drawn == answers(replace(SMALL, requests=(replace(LONG, sampling=DRAWN),)))[0].tokens
    other = replace(LONG, sampling=replace(DRAWN, seed=7))
    assert drawn != answers(replace(SMALL, requests=(other,)))[0].tokens


@pytest.mark.parametrize("name", ["lookup only", "lookup only, rounds", "lookup of a silent drafter"])
def test_what_is_looked_up_is_accepted_without_any_draft(name: str) -> None:
    (answer,) = answers(EDGES[name])
    assert answer.stats is not None
    assert answer.stats.accepted >= 6, "two words are soon repeated"


def test_a_silent_drafter_costs_time_only() -> None:
    talking, silent = answers(replace(ONE_FALLS_SILENT, silent_s=None)), answers(ONE_FALLS_SILENT)
    assert [answer.tokens for answer in silent] == [answer.tokens for answer in talking]
    told, told_before = silent[1].stats, talking[1].stats
    assert told is not None
    assert told_before is not None
    assert told.drafted == 0 < told_before.drafted


def test_rows_that_are_not_finite_end_a_request_where_plain_decoding_ends_and_no_other() -> None:
    told = answers(EDGES["rows that are not finite, continuous"])
    assert {answer.reason for answer in told} == {"error", "length"}
    assert any(answer.tokens for answer in told if answer.reason == "error"), "what was decoded before stands"


@pytest.mark.parametrize("name", sorted(SCHEDULES.keys() - {"plain"}))
def test_a_draft_whose_numbers_are_never_finite_costs_little(name: str) -> None:
    def seconds(spec: WorldSpec) -> float:
        world = World(spec)
        world.run()
        return world.now

    policy = replace(SCHEDULES[name], launch_delay=name == "continuous", govern=name == "continuous")
    for spec in (SMALL, replace(SMALL, placement="alone", stages=1)):
        broken = replace(spec, policy=policy, model=replace(spec.model, draft_faulty=1.0), draft_s=0.5)
        assert seconds(broken) < seconds(replace(broken, drafters=0)) + 2 * MOST_FAULTY * broken.draft_s


def test_calibration_stops_believing_a_liar() -> None:
    """Its guesses are thought certain and are never right: with min_path_prob they are soon not worth a row."""
    lie = replace(small(calibrate=True, min_path_prob=0.1), model=LIES["thinks it is right"], requests=(LONG,) * 3)
    learned, believed = (answers(replace(lie, policy=replace(lie.policy, calibrate=is_on))) for is_on in (True, False))
    drafted = [answer.stats.drafted for answer in learned if answer.stats]
    assert drafted[2] < drafted[0] / 4
    assert believed[2].stats is not None
    assert drafted[2] < believed[2].stats.drafted / 4


def test_a_late_advance_of_several_tokens() -> None:
    """Found by seed 747: two accepted tokens in one pass of the drafter, the first not yet committed."""
    policy = Policy("late", max_rows=6, topk=4, draft_batch=2, max_ahead=22, window=2, prefill_chunk=16)
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


def test_advice_too_long_for_one_message_goes_in_several() -> None:
    policy = Policy("wide", max_rows=128, topk=16, draft_batch=64, max_ahead=2000)
    model = EmulatedSpec(16, 5000, 1, (0.5, *[0.03] * 15))
    spec = WorldSpec(1, policy, 16, (Request((1, 2, 3), 40),), model, draft_s=0.05, context=64)
    recorder = Recorder()
    (answer,) = World(spec, (recorder,)).run()
    assert tuple(answer.tokens) == oracle(model, spec.requests[0])
    received = [step.event.message.body for step in recorder.trace if isinstance(step.event, Received)]
    assert max(len(body.rows) for body in received if isinstance(body, Cancel)) == MAX_ROWS


def test_a_draft_that_is_always_right_is_always_accepted() -> None:
    spec = replace(EDGES["always right"], draft_s=0.001)
    for answer in World(spec, every_invariant(spec)).run():
        assert answer.stats is not None
        assert answer.stats.accepted > 16
        assert answer.stats.tombstones == answer.stats.cancelled_runs or answer.stats.corrections <= 8


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
        return [] if isinstance(message.body, Result) else when

    monkeypatch.setattr(Network, "arrivals", lose)
    with pytest.raises(StallError, match="in flight"):
        check_world(BASE)


BASELINES = sorted((Path(__file__).parents[2] / "benchmarks" / "baselines").glob("*.toml"))


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_every_rival_keeps_every_invariant(path: Path) -> None:
    check_world(replace(SMALL, policy=read_policy(str(path)), drafter_beside_orchestrator=False))
