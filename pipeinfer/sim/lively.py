"""L5: whoever has a sequence gets its next token within a bounded time, and before a bounded number of runs is back.

Where many requests are decoded at once, each of them waits for the others at most: for their prompts, and for a turn of
each. A request that lost its sequence waits for slots, as one that has none yet does; so it must not be the first one.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeinfer.core.addresses import ORCHESTRATOR
from pipeinfer.core.messages import Result
from pipeinfer.core.ports import Command, Emit, Event, Idle, Received
from pipeinfer.orchestrator.machine import RUNS_AHEAD
from pipeinfer.sim.history import History, InvariantBroken, Reader, SequenceRecord
from pipeinfer.sim.world import World, WorldSpec
from speculation.schedules.prefill_chunks import PrefillChunks


@dataclass(slots=True)
class _Wait:
    """Since when a sequence waits for a token, for how many chunks of prompts at most, and how many results came."""

    record: SequenceRecord
    since: float
    own: int  # chunks of its own prompt
    chunks: int = 0
    results: int = 0


class Lively(Reader):
    """L5: no more than a stated time passes between two emissions, before the first, and before a request is idle."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        spec = history.spec
        self.patience = patience(spec) * spec.max_num_seqs
        self._most_results = 4 * (spec.stages + spec.policy.most_runs(spec.stages) + spec.max_num_seqs)
        # Who drafts to order keeps the target waiting until the draft model has seen the prompt, too.
        self._is_free = spec.policy.schedule == "continuous" and spec.placement != "alone"
        self._waits: dict[int, _Wait] = {}  # by sequence

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR:
            return
        if isinstance(event, Received) and isinstance(event.message.body, Result):
            for wait in self._waits.values():
                wait.results += 1
        for wait in self._waits.values():
            self._check(wait, now)
        for record, command, begins in self.history.told:
            if begins:
                self._begin(record, now)
            elif isinstance(command, Emit) and record.sequence in self._waits:
                wait = self._waits[record.sequence]
                wait.since, wait.results, wait.chunks = now, 0, self._chunks(wait)
            elif isinstance(command, Idle):
                self._waits.pop(record.sequence, None)
        for wait in [wait for wait in self._waits.values() if wait.record.dropped]:
            del self._waits[wait.record.sequence]
            self._left(wait.record)

    def _begin(self, record: SequenceRecord, now: float) -> None:
        chunks = PrefillChunks(self.history.spec.policy).most_runs(len(record.prompt))
        for wait in self._waits.values():
            wait.chunks += chunks
        self._waits[record.sequence] = begun = _Wait(record, now, chunks)
        begun.chunks = self._chunks(begun)

    def _chunks(self, mine: _Wait) -> int:
        """How many chunks of prompts may still delay the next token of ``mine``."""
        late = [wait for wait in self._waits.values() if not wait.record.has_begun or not self._is_free]
        return sum(wait.own for wait in late)

    def _check(self, wait: _Wait, now: float) -> None:
        most = self.patience * (1 + wait.chunks)
        what = f"L5: request {wait.record.number}: {now - wait.since:.3f} s and {wait.results} results without a token"
        if now - wait.since > most:
            raise InvariantBroken(f"{what}, the bound is {most:.3f} s")
        results = self._most_results * (1 + wait.chunks)
        if self.history.spec.max_num_seqs > 1 and wait.record.is_living and wait.results > results:
            raise InvariantBroken(f"{what}, the bound is {results}")

    def _left(self, record: SequenceRecord) -> None:
        """A sequence is no more; if its request is not over, one that comes before it must live on."""
        if not record.over and not any(one.rank < record.rank for one in self.history.living):
            raise InvariantBroken(f"L5: request {record.number} loses its sequence, and none before it lives on")


def patience(spec: WorldSpec) -> float:
    """A bound on the virtual time between two tokens: the next one waits for what is in flight (a window of the slowest
    passes), then goes once through the pipeline; and the orchestrator may share its host with a draft's layer. Where
    all share one host the drafters may have as many turns before as a run has rows. Ranks of a group may be late, and
    exchanges take their time."""
    policy, link, model = spec.policy, spec.link, spec.model
    window = policy.most_runs(spec.stages)
    most_rows = max(policy.max_rows, policy.prefill_chunk)
    drafted_rows = max(policy.draft_batch, policy.prefill_chunk)

    def longest_s(pass_s: float, rows: int, layers: int) -> float:
        return (pass_s * (1 + spec.row_cost * rows) + 2 * spec.exchange_s * layers) * (1 + spec.late)

    layers = -(-model.layers // spec.stages)
    passes = [longest_s(spec.stage_s[index % len(spec.stage_s)], most_rows, layers) for index in range(spec.stages)]
    # Activations of a row: 8 bytes. A result or a run may queue on the wire behind a window of others.
    message_s = (32 + 16 * (policy.max_rows + 2 * window * policy.max_rows + 8) + 24 * most_rows) / link.bandwidth
    hop = link.delay_s + 3 * link.jitter_s + (window + 1) * message_s
    draft_pass = longest_s(spec.draft_s, drafted_rows, model.layers)
    draft_layer = draft_pass / model.layers
    turns = spec.drafters * policy.max_rows if spec.placement == "alone" else 0
    ordered = {"rounds": policy.num_steps, "pipeinfer": policy.max_rows, "continuous": turns}[policy.schedule]
    order_s = ordered * draft_pass + 2 * hop
    return 3 * order_s + sum(passes) + (window + RUNS_AHEAD) * max(passes) + (spec.stages + 3) * hop + 4 * draft_layer
