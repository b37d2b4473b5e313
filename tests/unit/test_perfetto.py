"""The file for viewers keeps to their rules: slices nest, arrows have two ends that lie in slices."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeinfer.core.errors import UserError
from pipeinfer.core.messages import Cancel
from pipeinfer.runtime.perfetto import PLACES, trace_events, write_perfetto
from pipeinfer.runtime.timeline import Outcome, Timeline, read_timeline
from pipeinfer.runtime.trace import Trace
from speculation.schedules.policy import CONTINUOUS
from tests.invariants.traced import trace_world
from tests.unit.crowd import crowd
from tests.unit.test_timeline import world

Event = dict[str, Any]
Track = tuple[int, int]


@pytest.fixture(scope="module")
def timeline(tmp_path_factory: pytest.TempPathFactory) -> Timeline:
    paths = trace_world(world(CONTINUOUS), tmp_path_factory.mktemp("perfetto") / "world")
    return read_timeline([Trace(path) for path in paths])


@pytest.fixture(scope="module")
def events(timeline: Timeline) -> list[Event]:
    return trace_events(timeline)


def by_track(events: list[Event], phase: str) -> dict[Track, list[Event]]:
    found: dict[Track, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == phase:
            found[event["pid"], event["tid"]].append(event)
    return found


def test_every_event_is_of_a_kind_that_viewers_know(events: list[Event]) -> None:
    assert {event["ph"] for event in events} == PLACES.keys()
    for event in events:
        assert isinstance(event["name"], str) and event["name"]
        assert isinstance(event["pid"], int) and event["pid"] > 0
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert (1000 * event["dur"]).is_integer()
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    assert all((1000 * time).is_integer() for time in times), "a viewer's nanoseconds are exact"


def test_ranks_are_processes_and_roles_their_threads(events: list[Event]) -> None:
    named = [event for event in events if event["ph"] == "M"]
    processes = {event["pid"]: event["args"]["name"] for event in named if event["name"] == "process_name"}
    assert processes == {1 + rank: f"rank {rank} on a world" for rank in range(5)} | {6: "requests"}
    threads = {(event["pid"], event["args"]["name"]) for event in named if event["name"] == "thread_name"}
    assert {name for pid, name in threads if pid == 6} == {"request 0", "request 1"}
    named = [event for event in named if event["pid"] != 6]
    threads = {(pid, name) for pid, name in threads if pid != 6}
    stages = {(2 + index, f"stage {index}") for index in range(4)}
    assert threads == {(1, "orchestrator"), (1, "drafter 0"), *stages}
    tids = [event["tid"] for event in named if event["name"] == "thread_name"]
    assert len(set(tids)) == len(tids) == 6
    assert not set(tids) & processes.keys()


def test_passes_of_a_track_do_not_overlap_and_everything_nests(events: list[Event], timeline: Timeline) -> None:
    passes = 0
    for slices in by_track(events, "X").values():
        ours = [event for event in slices if event["cat"] in list(Outcome)]
        passes += len(ours)
        for earlier, later in pairwise(ours):
            assert earlier["ts"] + earlier["dur"] <= later["ts"]
        open_until: list[float] = []
        for event in slices:
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            assert not open_until or event["ts"] + event["dur"] <= open_until[-1]
            open_until.append(event["ts"] + event["dur"])
    assert passes == len(timeline.spans)


def test_slices_say_what_came_of_a_run(events: list[Event], timeline: Timeline) -> None:
    told = Counter(event["cat"] for event in events if event["ph"] == "X" and event["cat"] not in ("turn", "request"))
    assert told == Counter(span.outcome for span in timeline.spans)
    partly = next(event for event in events if event.get("cat") == Outcome.PARTLY)
    assert partly["name"] == f"partly accepted: run {partly['args']['run']}"
    assert 0 < partly["args"]["accepted_rows"] < partly["args"]["rows"]
    assert partly["cname"] == "olive"


def test_arrows_pair_up_and_hold_on_to_turns(events: list[Event], timeline: Timeline) -> None:
    """Viewers go through the events in order and tie an end to the slice that is then on top of the track."""
    on_top: dict[Track, Event] = {}
    starts: dict[int, Event] = {}
    ends: dict[int, Event] = {}
    for event in events:
        track = event["pid"], event.get("tid", 0)
        if event["ph"] == "X":
            on_top[track] = event
        elif event["ph"] in "sf":
            assert event["id"] not in (starts if event["ph"] == "s" else ends)
            (starts if event["ph"] == "s" else ends)[event["id"]] = event
            assert (on_top[track]["cat"], on_top[track]["ts"]) == ("turn", event["ts"])
            assert event["ph"] == "s" or event["id"] in starts
    assert starts.keys() == ends.keys()
    assert len(starts) == len(timeline.words)
    for number, start in starts.items():
        end = ends[number]
        assert (start["name"], start["cat"], end["bp"]) == (end["name"], end["cat"], "e")
    cancels = [event for event in starts.values() if event["cat"] == "cancel"]
    assert len(cancels) == sum(isinstance(word.message.body, Cancel) for word in timeline.words) > 0


def test_an_arrow_leaves_after_the_pass_that_made_it(events: list[Event]) -> None:
    """A stage's run goes on when it has been computed: the arrow must not start in the next pass."""
    tracks = {track: [e for e in slices if e["cat"] != "turn"] for track, slices in by_track(events, "X").items()}
    sent = [event for event in events if event["ph"] == "s" and event["cat"] == "run" and event["pid"] > 1]
    assert sent
    for event in sent:
        spans = tracks[event["pid"], event["tid"]]
        place = bisect_right([span["ts"] for span in spans], event["ts"]) - 1
        assert spans[place]["ts"] + spans[place]["dur"] <= event["ts"]


def test_counters_end_where_the_job_does(events: list[Event]) -> None:
    runs = [event["args"]["in flight"] for event in events if event["ph"] == "C" and event["name"] == "runs"]
    tokens = [event["args"]["committed"] for event in events if event["ph"] == "C" and event["name"] == "tokens"]
    assert min(runs) == runs[-1] == 0
    assert max(runs) > 3
    assert tokens == sorted(tokens)
    assert tokens[-1] == 80


def test_tombstones_are_marked(events: list[Event], timeline: Timeline) -> None:
    marks = [event for event in events if event["ph"] == "i" and event["cat"] == "tombstone"]
    assert len(marks) == sum(word.is_tombstone for word in timeline.words) > 0
    assert {event["s"] for event in marks} == {"t"}


def test_the_file_is_json_and_says_what_it_is_of(timeline: Timeline, events: list[Event], tmp_path: Path) -> None:
    write_perfetto(timeline, tmp_path / "run.json")
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["traceEvents"] == json.loads(json.dumps(events))
    assert found["displayTimeUnit"] == "ms"
    assert found["otherData"] == {"execution": "simulated", "policy": "continuous", "ranks": 5, "version": ""}
    with pytest.raises(UserError, match="cannot be written"):
        write_perfetto(timeline, tmp_path / "no" / "run.json")


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Timeline:
    paths = trace_world(crowd(CONTINUOUS), tmp_path_factory.mktemp("crowd") / "world")
    return read_timeline([Trace(path) for path in paths])


def test_each_request_is_a_track_with_its_phases(crowded: Timeline) -> None:
    events = trace_events(crowded)
    (process,) = {event["pid"] for event in events if event.get("args") == {"name": "requests"}}
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == process]
    assert names == [f"request {number}" for number in range(9)]
    tracks = [slices for (pid, _), slices in sorted(by_track(events, "X").items()) if pid == process]
    assert len(tracks) == 9
    for slices, request in zip(tracks, crowded.requests, strict=True):
        assert [event["name"] for event in slices] == [
            span.phase for span in request.phases if span.ended_s > span.began_s
        ]
        for earlier, later in pairwise(slices):
            assert earlier["ts"] + earlier["dur"] == later["ts"]
        ended = {"tokens": len(request.text), "preemptions": request.preemptions, "reason": "length"}
        assert slices[-1]["args"].items() >= ended.items()
        assert sum("tokens" in event["args"] for event in slices) == 1
    marks = [event for event in events if event.get("cat") == "emission"]
    assert len(marks) == len(crowded.emitted)
    assert sum(int(event["name"].split()[0]) for event in marks) == sum(len(one.text) for one in crowded.requests)


def test_a_counter_says_how_many_requests_are_in_each_phase(crowded: Timeline) -> None:
    counts = [e["args"] for e in trace_events(crowded) if e["ph"] == "C" and e["name"] == "requests"]
    assert counts[0]["waiting"] + counts[0]["prefill"] == 9
    assert all(min(one.values()) >= 0 for one in counts)
    assert max(one["decoding"] for one in counts) == 6
    assert max(one["preempted"] for one in counts) > 0
    assert set(counts[-1].values()) == {0}


def test_a_run_says_how_many_rows_are_whose(crowded: Timeline) -> None:
    events = trace_events(crowded)
    runs = [event for event in events if event.get("cat") in list(Outcome) and "outcome" in event["args"]]
    shared = [event for event in runs if event["args"]["requests"] > 1]
    assert shared
    for event in shared:
        shares = [words.split() for name, words in event["args"].items() if name.startswith("request ")]
        assert len(shares) == event["args"]["requests"]
        assert sum(int(words[2]) for words in shares) == event["args"]["rows"]
        assert sum(int(words[0]) for words in shares) == event["args"]["accepted_rows"]
        assert event["name"].endswith(f": run {event['args']['run']} of {len(shares)} requests")
