"""A timeline in Chrome's trace event format, which ui.perfetto.dev and chrome://tracing open.

Ranks are processes and roles their threads. Passes are slices named by what came of them, for viewers colour by name.
Requests are the threads of one more process; their slices are the phases of request_times.py.
Whenever a role sends or hears something that is a slice too, a *turn*: viewers tie an arrow to the slice that is on top
where it ends. A turn has no length of its own in a trace; here it has a microsecond, or less if something else happens
so soon, and a pass begins after the turn that ordered it.

Times are whole eighths of a microsecond. Floats hold them exactly, so slices that touch do not overlap by a rounding.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeinfer.core.addresses import FIRST_DRAFTER, ORCHESTRATOR, address_name
from pipeinfer.core.files import write_whole
from pipeinfer.runtime.request_times import Phase, RequestTimes
from pipeinfer.runtime.timeline import Outcome, Span, Timeline, Word

TICKS = 8
"""In a microsecond, which is the unit of the format."""
COLOURS = {
    Outcome.PREFILL: "generic_work",
    Outcome.ACCEPTED: "good",
    Outcome.PARTLY: "olive",
    Outcome.WASTED: "bad",
    Outcome.CANCELLED: "terrible",
    Outcome.DRAFT: "thread_state_runnable",
    Outcome.UNFINISHED: "black",
}
"""Chrome's own names of colours; other viewers choose theirs."""
PHASE_COLOURS = {
    Phase.WAITING: "grey",
    Phase.PREFILL: "generic_work",
    Phase.DECODING: "good",
    Phase.PREEMPTED: "bad",
}
FIRST_REQUEST = 1 << 20
"""Thread of the first request; a job has no such rank."""
PLACES = {"M": 0, "X": 1, "s": 2, "f": 3, "C": 4, "i": 5}
"""Of what happens at one time: slices, arrows that hold on to them, and marks, which to viewers are slices as well."""

Json = dict[str, Any]


def write_perfetto(timeline: Timeline, path: Path) -> None:
    """Write ``timeline`` to ``path``. Raises UserError where that cannot be done."""
    header = timeline.header
    about = {
        "execution": timeline.execution,
        "policy": timeline.policy,
        "ranks": header.ranks,
        "version": header.version,
    }
    words = {"traceEvents": trace_events(timeline), "displayTimeUnit": "ms", "otherData": about}
    write_whole(path, json.dumps(words, separators=(",", ":")) + "\n")


def trace_events(timeline: Timeline) -> list[Json]:
    """The events, in the order of time; of slices that begin at one time the longer one comes first."""
    events = _Events(timeline)
    found = [*events.names(), *events.slices(), *events.arrows(), *events.counters(), *events.requests()]
    return sorted(found, key=lambda event: (event.get("ts", -1), PLACES[event["ph"]], -event.get("dur", 0)))


def _ticks(seconds: float) -> int:
    return round(1e6 * TICKS * seconds)


def _us(seconds: float) -> float:
    return _ticks(seconds) / TICKS


def _what(word: Word) -> str:
    """A message as a slice is named: its kind and the runs that it is about."""
    runs = ", ".join(map(str, word.runs))
    dead = " (tombstone)" if word.is_tombstone else ""
    return f"{word.message.kind} {runs}{dead}" if runs else word.message.kind


class _Events:
    """Makes the events of ``timeline``. Times are whole ticks until they are written."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._instants: defaultdict[int, dict[int, list[str]]] = defaultdict(
            dict
        )  # by role and time: what it is called
        for word in timeline.words:
            if word.heard_s is not None:
                self._instants[word.message.dest].setdefault(_ticks(word.heard_s), []).append(_what(word))
        for word in timeline.words:
            names = self._instants[word.message.source].setdefault(_ticks(word.sent_s), [])
            if not names:  # it has heard nothing: it has computed, or was woken
                names.append(f"sends {_what(word)}")
        self._cuts: dict[int, list[int]] = {}  # by role: when a turn begins or a pass ends
        for address, instants in self._instants.items():
            ends = {_ticks(span.ended_s) for span in timeline.spans if span.address == address}
            self._cuts[address] = sorted(ends | instants.keys())

    def _place(self, address: int) -> Json:
        """Process and thread of a role. To viewers 0 is an idle processor, and a thread numbered like its process the
        main one."""
        return {"pid": 1 + self._timeline.ranks[address], "tid": 1000 + list(self._timeline.ranks).index(address)}

    def _instant_end(self, address: int, began: int) -> int:
        """When the turn that a role begins at ``began`` is over, by convention."""
        cuts = self._cuts.get(address, [])
        after = bisect_right(cuts, began)
        return min([began + TICKS, *cuts[after : after + 1]])

    def names(self) -> Iterator[Json]:
        """Who is who."""
        for rank, host in self._timeline.hosts.items():
            args = {"name": f"rank {rank} on {host}" if host else f"rank {rank}"}
            yield {"ph": "M", "name": "process_name", "pid": 1 + rank, "args": args}
            yield {"ph": "M", "name": "process_sort_index", "pid": 1 + rank, "args": {"sort_index": rank}}
        for address in self._timeline.ranks:
            yield {"ph": "M", "name": "thread_name", **self._place(address), "args": {"name": address_name(address)}}

    def slices(self) -> Iterator[Json]:
        """Passes, turns, and a mark where a stage skipped a run."""
        for span in self._timeline.spans:
            yield self._slice(span)
        for address, instants in self._instants.items():
            for began, names in instants.items():
                name = "; ".join(dict.fromkeys(names))
                yield self._complete(address, name, "turn", began, self._instant_end(address, began))
        for word in self._timeline.words:
            if word.is_tombstone:
                about = {"ph": "i", "name": f"tombstone of run {word.runs[0]}", "cat": "tombstone", "s": "t"}
                yield {**about, **self._place(word.message.source), "ts": _us(word.sent_s)}

    def _slice(self, span: Span) -> Json:
        began, ended = _ticks(span.began_s), _ticks(span.ended_s)
        if began in self._instants[span.address]:
            began = min(self._instant_end(span.address, began), ended)
        what = "pass" if span.address >= FIRST_DRAFTER else "run"
        name = str(span.outcome) if span.outcome is Outcome.DRAFT else f"{span.outcome}: {what}"
        name = f"{name} {span.number}"
        args: Json = {what: span.number, "rows": span.rows, "requests": span.sequences}
        if what == "run":
            args |= {"outcome": span.outcome, "accepted_rows": span.accepted}
        if len(span.shares) > 1:
            args |= {
                f"request {share.request}": f"{share.accepted} of {share.rows} rows accepted" for share in span.shares
            }
        if span.sequences > 1:
            name = f"{name} of {span.sequences} requests"
        about = {"cname": COLOURS[span.outcome], "args": args}
        return self._complete(span.address, name, span.outcome, began, ended) | about

    def _complete(self, address: int, name: str, category: str, began: int, ended: int) -> Json:
        times = {"ts": began / TICKS, "dur": (ended - began) / TICKS}
        return {"ph": "X", "name": name, "cat": category, **self._place(address), **times}

    def arrows(self) -> Iterator[Json]:
        """A flow for every message that was heard."""
        for number, word in enumerate(self._timeline.words):
            if word.heard_s is None:
                continue
            message = word.message
            about = {"name": _what(word), "cat": message.kind.lower(), "id": number}
            yield {"ph": "s", **about, **self._place(message.source), "ts": _us(word.sent_s)}
            yield {"ph": "f", "bp": "e", **about, **self._place(message.dest), "ts": _us(word.heard_s)}

    def counters(self) -> Iterator[Json]:
        """Runs in flight, and tokens that are final."""
        place = self._place(ORCHESTRATOR)
        for at_s, runs in self._timeline.in_flight:
            yield {"ph": "C", "name": "runs", **place, "ts": _us(at_s), "args": {"in flight": runs}}
        total = 0
        for at_s, tokens in self._timeline.emitted:
            total += tokens
            yield {"ph": "C", "name": "tokens", **place, "ts": _us(at_s), "args": {"committed": total}}

    def requests(self) -> Iterator[Json]:
        """A track for each request with its phases and what it emitted, and how many were in each phase."""
        requests = self._timeline.requests
        pid = 2 + max(self._timeline.ranks.values())
        if requests:
            yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": "requests"}}
            yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": -1}}
        for index, request in enumerate(requests):
            place = {"pid": pid, "tid": FIRST_REQUEST + index}
            yield {"ph": "M", "name": "thread_name", **place, "args": {"name": f"request {request.number}"}}
            yield {"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": index}}
            yield from _phases(request, place)
        yield from _in_phases(requests, pid)


def _phases(request: RequestTimes, place: Json) -> Iterator[Json]:
    """The phases of ``request``, and a mark for each emission."""
    for span in request.phases:
        began, ended = _ticks(span.began_s), _ticks(span.ended_s)
        if began == ended and span is not request.phases[-1]:
            continue  # a preempted request may begin again at once
        args: Json = {"request": request.number, "prompt_tokens": len(request.request.prompt)}
        if span is request.phases[-1]:
            args |= {"tokens": len(request.text), "preemptions": request.preemptions}
            args["reason"] = request.reason or "unfinished"
        times = {"ts": began / TICKS, "dur": (ended - began) / TICKS}
        about = {"name": span.phase, "cat": "request", "cname": PHASE_COLOURS[span.phase], "args": args}
        yield {"ph": "X", **about, **place, **times}
    for at_s, tokens in request.emitted:
        name = "1 token" if tokens == 1 else f"{tokens} tokens"
        yield {"ph": "i", "name": name, "cat": "emission", "s": "t", **place, "ts": _us(at_s)}


def _in_phases(requests: list[RequestTimes], pid: int) -> Iterator[Json]:
    """A counter: how many requests are in each phase."""
    changes: defaultdict[int, list[tuple[Phase, int]]] = defaultdict(list)  # by time
    for request in requests:
        for span in request.phases:
            changes[_ticks(span.began_s)].append((span.phase, 1))
            changes[_ticks(span.ended_s)].append((span.phase, -1))
    counts = dict.fromkeys(Phase, 0)
    for ticks, found in sorted(changes.items()):
        for phase, change in found:
            counts[phase] += change
        yield {"ph": "C", "name": "requests", "pid": pid, "ts": ticks / TICKS, "args": {**counts}}
