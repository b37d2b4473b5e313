"""Cancel messages: which stages receive them, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

from pipeinfer.core.addresses import ORCHESTRATOR
from pipeinfer.core.messages import MAX_ROWS, NO_SLOT, Cancel, Cancelled, Message
from pipeinfer.core.ports import Command, Send
from pipeinfer.orchestrator.flight import InFlight
from speculation.schedules.policy import Policy


class Advice:
    """The cancel messages of ``policy`` to ``stages`` (addresses in pipeline order).

    ``policy.cancel``: "direct" sends to every stage at once; "relay" sends to the last stage, and each stage passes
    the message on to the one before it (PipeInfer, SC'24); "off" sends nothing."""

    def __init__(self, policy: Policy, stages: Sequence[int]) -> None:
        self._policy = policy
        self._stages = stages

    def cancel(self, runs: Sequence[InFlight], rows: Sequence[Cancelled], now: float) -> list[Command]:
        """Cancel ``runs`` at ``now``, and ``rows`` of others."""
        policy = self._policy
        for run in runs:
            run.cancelled_at = now
            for session in run.sessions:
                session.stats.cancelled_runs += not run.is_prefill
        whole = [Cancelled(run.number, NO_SLOT, run.sessions[0].sequence) for run in runs]
        dead = (*whole, *(rows if policy.cancel_rows else ()))
        if not dead or policy.cancel == "off":
            return []
        is_relay = policy.cancel == "relay"
        parts = [Cancel(is_relay, dead[start : start + MAX_ROWS]) for start in range(0, len(dead), MAX_ROWS)]
        stages = self._stages[-1:] if is_relay else self._stages
        return [Send(Message(ORCHESTRATOR, stage, part)) for stage in stages for part in parts]
