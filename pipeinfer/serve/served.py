"""What the server knows of one request that the engine decodes."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

from pipeinfer.core.ports import RequestStats
from pipeinfer.engine.answer import Completion, Handle

if TYPE_CHECKING:
    from launch.requests import RequestOutput

MOST_SHOWN = 400  # characters
_numbers = itertools.count(1)


class Served:
    """One sequence that the engine decodes, for the choices ``indices`` of a response: several where greedy decoding
    gives all of them the same tokens. ``prompt``: its text, where the response repeats it."""

    def __init__(self, indices: range, prompt: str | None = None, priority: int = 0) -> None:
        self.number = next(_numbers)
        self.indices, self.prompt, self.priority = indices, prompt, priority
        self.began_at = time.monotonic()
        self.stats: RequestStats | None = None  # once the request is over
        self.gaps_s: list[float] = []  # between emissions
        self.runs_in_flight = 0  # of the whole engine, at the last emission
        self.kv_usage = 0.0  # the same, of its KV slots
        self.emitted_at: float | None = None
        self.tail = ""  # the end of the text so far
        self._handle: Handle | None = None

    @property
    def handle(self) -> Handle:
        """The engine's answer."""
        assert self._handle is not None
        return self._handle

    @handle.setter
    def handle(self, handle: Handle) -> None:
        self._handle = handle

    @property
    def completion(self) -> Completion:
        """What has been decoded so far."""
        return self.handle.completion

    def watch(self, output: RequestOutput) -> None:
        """See Engine.submit."""
        if output.tokens:
            if self.emitted_at is not None:
                self.gaps_s.append(output.at_s - self.emitted_at)
            self.emitted_at = output.at_s
            self.runs_in_flight, _, self.kv_usage = output.load
        self.stats = output.stats or self.stats

    def take(self, piece: str) -> None:
        """More text has come."""
        self.tail = (self.tail + piece)[-MOST_SHOWN:]

    def speculation(self) -> dict[str, Any] | None:
        """vLLM's block of this name, None for an answer without drafts. A step ends with a correction: a token that no
        row in flight held. The prompt's own successor ends none."""
        stats = self.stats
        if stats is None or not stats.drafted:
            return None
        histogram = steps_of(stats)
        steps = sum(histogram)
        return {
            "mean_acceptance_length": 1.0 + stats.accepted / max(1, steps),
            "draft_acceptance_rate": stats.accepted / stats.drafted,
            "num_spec_steps": steps,
            "num_accepted_draft_tokens": stats.accepted,
            "num_draft_tokens": stats.drafted,
            "acceptance_histogram": histogram,
        }


def steps_of(stats: RequestStats) -> list[int]:
    """How many steps accepted 0, 1, ... drafted tokens. The end of the answer ends the last one, too."""
    told = stats.acceptance_histogram
    last = stats.accepted - sum(length * count for length, count in enumerate(told))
    histogram = told + [0] * (last + 1 - len(told))
    if last:
        histogram[last] += 1
    return histogram
