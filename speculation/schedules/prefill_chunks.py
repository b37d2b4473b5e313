"""How many prompt tokens a run holds. For P prompt tokens in runs of n over S stages that compute at the same time:

    first token after   (ceil(P / n) + S - 1) (T(n) + d)
    n                   argmin of that; of several the largest; at most ``prefill_chunk``, at least 1 / SMALLEST of it

T(n) is the latency model of a pass (cost_curve.py), from pass times and from runs of prompts that have returned. d is
the time of a run of decoding, if any sequence is decoded: runs of prompts and of decoding take turns. Large runs use a
processor better, small ones fill the pipeline earlier. Stages that share their cores compute no sooner for being
several, and count as one. Chunks of a prompt are equally long: a pipeline waits for the longest one.
"""

from __future__ import annotations

from speculation.schedules.cost_curve import CostCurve, Costs
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import Placement

SMALLEST = 8


class PrefillChunks:
    """Chooses the chunks of prompts. ``prior``: what is known of T before anything is measured."""

    def __init__(self, policy: Policy, stages: int = 1, placement: Placement = "spread", prior: Costs = ()) -> None:
        self._most, self._least = policy.prefill_chunk, -(-policy.prefill_chunk // SMALLEST)
        is_fitted = policy.fit_chunks and placement == "spread"
        self._others = stages - 1 if is_fitted else 0  # stages that compute beside the first one
        self._curve = CostCurve(prior)
        self._decoding_s = 0.0

    @property
    def depend_on_costs(self) -> bool:
        """Whether what passes cost makes a difference."""
        return self._others > 0

    def most_runs(self, prompt: int) -> int:
        """How many runs a prompt of ``prompt`` tokens takes at most, unless slots are short."""
        return -(-prompt // self._least)

    def rows(self, prompt: int, is_decoding: bool) -> int:
        """The rows of each run of a prompt of ``prompt`` tokens. ``is_decoding``: whether sequences are decoded."""
        if not self.depend_on_costs:
            return self._most
        beside_s = self._decoding_s if is_decoding else 0.0

        def first_token_s(rows: int) -> float:
            return (-(-prompt // rows) + self._others) * (self._curve.seconds(rows) + beside_s)

        rows = min(range(self._most, self._least - 1, -1), key=first_token_s)
        return -(-prompt // -(-prompt // rows))

    def prefilled(self, rows: int, slowest_s: float) -> None:
        """A run of ``rows`` prompt tokens took ``slowest_s`` at the slowest stage."""
        self._curve.observe(rows, slowest_s)

    def decoded(self, slowest_s: float) -> None:
        """A run of decoding took ``slowest_s`` at the slowest stage."""
        self._decoding_s = slowest_s
