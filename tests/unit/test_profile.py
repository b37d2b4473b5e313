"""Where the time goes: what the profile measures is what happened, and it says when a budget is exceeded."""

from __future__ import annotations

import pytest

from benchmarks.profiling import jobs, machines, tables
from benchmarks.profiling.costs import Cost, Stopwatch
from benchmarks.profiling.jobs import Job
from pipeinfer.core.messages import Run
from pipeinfer.core.ports import Send
from pipeinfer.sim.replay import Recorder
from pipeinfer.sim.world import World, make_job_spec
from speculation.schedules.policy import CONTINUOUS, PLAIN, Policy
from tests.unit.crowd import crowd


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(jobs, "TOKENS", 32)
    return jobs.simulated(CONTINUOUS)


def test_a_cost_is_compared_by_its_mean() -> None:
    assert Cost("a", [1.0, 2.0, 6.0], budget_us=3.0).row()["ok"]
    assert not Cost("a", [1.0, 2.0, 6.1], budget_us=3.0).row()["ok"]
    assert "NO" in Cost("a", [4.0], budget_us=3.0).line()
    assert Cost("a", [4.0]).row()["ok"], "no budget, no verdict"


def test_a_stopwatch_gives_back_what_it_timed() -> None:
    watch = Stopwatch()
    assert watch(sum, range(100_000)) == sum(range(100_000))
    (us,) = watch.us
    assert us > 100


def test_every_role_of_a_recorded_job_is_timed(job: Job) -> None:
    found = {cost.what: cost for cost in machines.costs("job", job)}
    for role in ("orchestrator", "stage", "drafter"):
        told = [step for step in job.steps if jobs.role_of(step) == role]
        assert len(found[f"job: {role}, all events"].us) == len(told)
    assert [what for what, cost in found.items() if cost.budget_us] == ["job: orchestrator, all events"]


def test_a_job_that_goes_otherwise_is_not_timed(job: Job) -> None:
    job.steps.remove(next(step for step in job.steps if jobs.kind_of(step.event) == "Nodes"))
    with pytest.raises(SystemExit, match="this is not how it was"):
        list(machines.costs("job", job))


def test_a_job_s_slots_can_be_leased_again(job: Job) -> None:
    assert {cost.what.split(",")[0] for cost in tables.slot_table(job)} == {
        "slots: apply", "slots: living", "slots: allocate",
        *(f"allocator: {name}" for name in ("operations", "lease", "commit", "release", "free")),
    }  # fmt: skip
    assert [cost.what.split(",")[0] for cost in tables.wire(job)][:2] == ["wire: encode Run", "wire: decode Run"]


def test_slots_of_many_requests_with_forks_and_preemptions_can_be_leased_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS", 4)  # so small a crowd has no longer runs
    spec, recorder = crowd(CONTINUOUS), Recorder()
    World(spec, (recorder,)).run()
    found = {cost.what: cost for cost in tables.slot_table(Job(make_job_spec(spec), recorder.trace))}
    assert found["allocator: fork"].us
    launched = [c.message.body for step in recorder.trace for c in step.commands if isinstance(c, Send)]
    runs = [body for body in launched if isinstance(body, Run) and not body.is_canonical]
    assert len({row.sequence for run in runs for row in run.rows}) > 6
    shown = {run.run for run in runs if len(run.rows) == tables.ROWS}
    assert shown
    assert len(found["slots: apply, runs of 4 rows"].us) == tables.TELLINGS * len(shown)


@pytest.mark.parametrize("policy", [PLAIN, CONTINUOUS], ids=lambda policy: policy.name)
def test_what_a_token_takes_is_all_that_the_orchestrator_took(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "CROWD", 5)
    monkeypatch.setattr(jobs, "CROWD_TOKENS", 12)
    told, *kinds = machines.per_token("crowd", jobs.crowded(policy), 1.0)
    assert told.what == "crowd: orchestrator, a token"
    row = told.row()
    assert row["ceiling_tokens_per_s"] == pytest.approx(1e6 / told.us[0])
    assert "at most " in told.line()
    frequent = sum(sum(cost.us) for cost in kinds)
    assert 0 < frequent <= told.us[0] * 5 * 12 * 1.0001
    assert {cost.what for cost in kinds} >= {f"crowd: orchestrator, {kind}" for kind in ("Result", "Credit")}
