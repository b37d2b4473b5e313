"""What a timeline says of a job is what the job did: which rows were accepted, who was cancelled, what was said."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from pipeinfer.core.addresses import FIRST_STAGE, ORCHESTRATOR, drafter_address, stage_address
from pipeinfer.core.errors import UserError
from pipeinfer.core.links import Link
from pipeinfer.core.messages import Cancel, Result, Run
from pipeinfer.core.ports import Emit, Finish, Idle, Request
from pipeinfer.runtime.timeline import Outcome, Span, Timeline, read_timeline
from pipeinfer.runtime.trace import Trace
from pipeinfer.sim.world import WorldSpec
from speculation.schedules.policy import CONTINUOUS, PLAIN, Policy, read_policy
from stages.models.emulated import EmulatedSpec, spread
from tests.house.source import ROOT
from tests.invariants.traced import trace_world

BASELINES = sorted((ROOT / "benchmarks" / "baselines").glob("*.toml"))
REQUESTS = (Request((1, 2, 3), 50), Request((4, 5, 6, 7), 30))
LAST_STAGE = stage_address(3)


def world(policy: Policy, seed: int = 1, top1: float = 0.7, link: Link | None = None) -> WorldSpec:
    model = EmulatedSpec(layers=8, vocab=40, seed=seed, ranks=spread(top1))
    return WorldSpec(seed, policy, 4, REQUESTS, model, draft_s=0.3, link=link or Link())


def traced(spec: WorldSpec, folder: Path) -> list[Trace]:
    return [Trace(path) for path in trace_world(spec, folder / "world")]


def spans_of(timeline: Timeline, address: int) -> list[Span]:
    return [span for span in timeline.spans if span.address == address]


@pytest.mark.parametrize("policy", ["plain", "continuous", *map(str, BASELINES)], ids=lambda name: Path(name).stem)
def test_every_token_but_a_requests_last_has_one_accepted_row(policy: str, tmp_path: Path) -> None:
    """Of the prompt's last token the row is the prompt's own. No other row is accepted, at any stage."""
    timeline = read_timeline(traced(world(read_policy(policy)), tmp_path))
    assert sum(tokens for _, tokens in timeline.emitted) == 80
    for address in (FIRST_STAGE, LAST_STAGE):
        assert sum(span.accepted for span in spans_of(timeline, address)) == 78
        prefills = [span for span in spans_of(timeline, address) if span.outcome is Outcome.PREFILL]
        assert [span.rows for span in prefills] == [3, 4]


def test_the_stats_agree(tmp_path: Path) -> None:
    """What it counts as accepted are drafted rows; others carry what nobody had guessed."""
    traces = traced(world(CONTINUOUS), tmp_path)
    tallies = [command.stats for step in traces[0].steps() for command in step.commands if isinstance(command, Idle)]
    timeline = read_timeline(traces)
    launched = [
        word for word in timeline.words if isinstance(word.message.body, Run) and word.message.dest == FIRST_STAGE
    ]
    skipped = [word for word in timeline.words if word.is_tombstone and isinstance(word.message.body, Result)]
    assert len(launched) == sum(stats.runs + stats.prefill_runs for stats in tallies)
    assert len(skipped) == sum(stats.tombstones for stats in tallies) > 0
    corrections = sum(stats.corrections for stats in tallies)
    ended_by_one = 78 - sum(stats.accepted for stats in tallies)
    assert corrections - len(REQUESTS) <= ended_by_one <= corrections
    assert timeline.in_flight[-1][1] == 0
    assert max(runs for _, runs in timeline.in_flight) <= CONTINUOUS.most_runs(4)


def test_plain_decoding_wastes_nothing_and_a_draft_that_is_never_right_everything(tmp_path: Path) -> None:
    plain = read_timeline(traced(world(PLAIN), tmp_path))
    assert {span.outcome for span in plain.spans} == {Outcome.PREFILL, Outcome.ACCEPTED}
    (tmp_path / "wrong").mkdir()
    policy = read_policy("continuous", ["prompt_lookup=0", "govern=false"])
    never = EmulatedSpec(layers=8, vocab=40, seed=1, ranks=(0.0,), claims=(0.9,))
    wrong = read_timeline(traced(WorldSpec(1, policy, 4, REQUESTS, never), tmp_path / "wrong"))
    assert {span.accepted for span in spans_of(wrong, LAST_STAGE)} == {0, 1}, "only what nobody guessed was right"
    assert Outcome.WASTED in {span.outcome for span in spans_of(wrong, FIRST_STAGE)}


def test_a_cancelled_pass_was_told_of_it(tmp_path: Path) -> None:
    timeline = read_timeline(traced(world(CONTINUOUS), tmp_path))
    cancelled = [
        span for span in timeline.spans if span.outcome is Outcome.CANCELLED and span.address < drafter_address(0)
    ]
    assert cancelled
    for span in cancelled:
        told = [
            word.heard_s
            for word in timeline.words
            if isinstance(word.message.body, Cancel) and word.message.dest == span.address and span.number in word.runs
        ]
        assert any(heard_s is not None and heard_s <= span.ended_s for heard_s in told)
        assert span.accepted == 0


def test_a_role_does_one_thing_at_a_time_and_words_arrive_after_they_left(tmp_path: Path) -> None:
    timeline = read_timeline(traced(world(CONTINUOUS), tmp_path))
    for address in timeline.ranks:
        for earlier, later in pairwise(spans_of(timeline, address)):
            assert earlier.ended_s <= later.began_s
    for word in timeline.words:
        assert word.heard_s is not None
        is_at_home = timeline.ranks[word.message.source] == timeline.ranks[word.message.dest]
        assert word.heard_s == word.sent_s if is_at_home else word.heard_s > word.sent_s
    assert (timeline.execution, timeline.ranks[ORCHESTRATOR]) == ("simulated", 0)


def test_advice_that_was_lost_is_heard_by_nobody(tmp_path: Path) -> None:
    timeline = read_timeline(traced(world(CONTINUOUS, link=Link(control_loss=0.5, control_repeat=0.5)), tmp_path))
    lost = [word for word in timeline.words if word.heard_s is None]
    advice = [word for word in timeline.words if isinstance(word.message.body, Cancel)]
    assert {type(word.message.body) for word in lost} == {Cancel}
    assert 0.2 * len(advice) < len(lost) < 0.8 * len(advice)


def test_what_had_not_ended_is_unfinished(tmp_path: Path) -> None:
    """All traces are cut at one time, as if the job had been killed."""
    traces = traced(world(CONTINUOUS), tmp_path)
    end_s = 12.25
    for trace in traces:
        header, *lines = trace.path.read_text().splitlines(keepends=True)
        trace.path.write_text(header + "".join(line for line in lines if json.loads(line)[0] < end_s))
    timeline = read_timeline(traces)
    unfinished = [span for span in timeline.spans if span.outcome is Outcome.UNFINISHED]
    assert len(unfinished) == len({span.address for span in unfinished}) > 1
    assert all(span.ended_s == timeline.ended_s for span in unfinished)
    assert [word for word in timeline.words if word.heard_s is None]


def test_clocks_of_several_hosts_are_compared(tmp_path: Path) -> None:
    traces = traced(world(CONTINUOUS), tmp_path)
    before = read_timeline(traces)
    for number, trace in enumerate(traces):
        header, *steps = [json.loads(line) for line in trace.path.read_text().splitlines()]
        header |= {"host": f"node {number}", "wall_s": 5e8 - 1000.0 * number}
        moved = [[step[0] + 1000.0 * number, *step[1:]] for step in steps]
        trace.path.write_text("".join(f"{json.dumps(line)}\n" for line in (header, *moved)))
    after = read_timeline([Trace(trace.path) for trace in traces])
    assert after.hosts == {number: f"node {number}" for number in range(5)}
    assert after.began_at == pytest.approx(5e8)
    was, now = ([(s.address, s.number, s.outcome, s.accepted) for s in one.spans] for one in (before, after))
    assert sorted(was) == sorted(now)
    assert after.ended_s == pytest.approx(before.ended_s, abs=1e-3)


def test_without_the_head_nobody_knows_what_was_accepted(tmp_path: Path) -> None:
    traces = traced(world(PLAIN), tmp_path)
    with pytest.raises(UserError, match="world.rank1 does not tell what was accepted; give the trace of the rank"):
        read_timeline(traces[1:])


def test_emissions_are_those_of_the_trace(tmp_path: Path) -> None:
    traces = traced(world(CONTINUOUS), tmp_path)
    steps = list(traces[0].steps())
    counts = [len(command.tokens) for step in steps for command in step.commands if isinstance(command, Emit)]
    ends = [step.now for step in steps for command in step.commands if isinstance(command, Finish)]
    timeline = read_timeline(traces)
    assert [tokens for _, tokens in timeline.emitted] == counts
    assert timeline.emitted[-1][0] == ends[-1]
