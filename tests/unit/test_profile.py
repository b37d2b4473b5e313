"""Where the time goes: what the profile measures is what happened, and it says when a budget is exceeded."""

from __future__ import annotations

import pytest

from benchmarks.profiling import jobs, machines, tables
from benchmarks.profiling.costs import Cost, Stopwatch
from benchmarks.profiling.jobs import Job
from speculation.schedules.policy import CONTINUOUS


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
        "slots: apply", "slots: living", "slots: allocate", "allocator: operations", "allocator: lease",
    }  # fmt: skip
    assert [cost.what.split(",")[0] for cost in tables.wire(job)][:2] == ["wire: encode Run", "wire: decode Run"]
