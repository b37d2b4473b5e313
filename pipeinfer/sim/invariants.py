"""The invariants: checkers that watch a simulated world and name the broken one, with place and run.

    L1  exact: the emitted tokens are those of plain decoding, stop tokens included
    L2  every run ends once, by the time its request is idle; no node is verified twice (but by rivals)
    L3  slots: free + leased + canonical = all; no slot leased twice, shared (but by a fork) or lost; canonical slots
        hold accepted tokens: slot_invariants.py; a row attends to its own path: visible_invariants.py
    L4  per edge the transaction number grows by one; results return in launch order
    L5  live: the next token of each request comes within a bounded time: lively.py (World.run itself sees an agenda
        that runs dry)
    L6  advice: only dead runs are cancelled or skipped, only dead rows dropped; so losing advice costs time only
    L7  decode(encode(m)) == m for every message, and activations arrive as they left: replay.py
    L8  every queue, window, tree and buffer has a bound: bounds.py
    L9  a trace replays to identical commands: replay.py
    L10 a draft that is always or never right is accepted accordingly; what is verified was guessed: draft_invariants.py
    L11 a schedule does what it is named for: schedule_invariants.py

What the checkers believe they derive from the messages on their own (history.py), so that no machine vouches for
itself. Tables, allocators and bounds have no other way in than the machines' private attributes: slot_invariants.py and
bounds.py are the two files that peek. L1, L2, L4, L6 and the rest of L10 are here.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from itertools import zip_longest

from pipeinfer.core.addresses import ORCHESTRATOR, address_name
from pipeinfer.core.messages import NO_SLOT, NO_TOKEN, Cancel, Message, Result, Run, Wants
from pipeinfer.core.ports import (
    Command,
    Emit,
    Event,
    Finish,
    Idle,
    Output,
    Received,
    Request,
    SampledToken,
    Score,
    Send,
    Submitted,
)
from pipeinfer.sim.history import History, InvariantBroken, Launched, Reader, ending, oracle, scores
from pipeinfer.sim.world import Answer, World, WorldSpec


class Exact(Reader):
    """L1."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._emitted: dict[int, list[int]] = {}  # by request
        self._scored: dict[int, list[tuple[float, tuple[SampledToken, ...]]]] = {}  # likewise

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker: every emitted token must equal plain decoding's, so the first wrong one is reported; so must the
        target's token after every accepted token, even if the orchestrator ignores it."""
        if address == ORCHESTRATOR and isinstance(event, Received) and isinstance(event.message.body, Result):
            self._listen(event.message.body)
        for command in commands:
            if isinstance(command, Score):
                told = zip(command.logps, command.tops or [()] * len(command.logps), strict=True)
                self._scored.setdefault(command.number, []).extend(told)
            if isinstance(command, Emit):
                self._compare_scores(command.number, world.spec)
                self._compare(command, world.spec)

    def _compare_scores(self, number: int, spec: WorldSpec, is_whole: bool = True) -> None:
        """The log-probabilities of its prompt are there before the first token, and are those of one row at a time."""
        told, truth = self._scored.get(number, []), scores(spec.model, spec.requests[number])
        if told == truth[: len(told)] and (len(told) == len(truth) or not is_whole):
            return
        at = next((at for at, pair in enumerate(zip(told, truth, strict=False)) if pair[0] != pair[1]), len(told))
        what = f"{told[at] if at < len(told) else 'nothing'}, wanted is {truth[at] if at < len(truth) else 'nothing'}"
        raise InvariantBroken(f"L1: request {number}: of token {at + 1} of its prompt the user saw {what}")

    def _compare(self, emit: Emit, spec: WorldSpec) -> None:
        emitted, truth = self._emitted.setdefault(emit.number, []), oracle(spec.model, spec.requests[emit.number])
        emitted += emit.tokens
        if tuple(emitted) != truth[: len(emitted)]:
            pairs = enumerate(zip_longest(emitted, truth))
            at, token, wanted = next((at, token, wanted) for at, (token, wanted) in pairs if token != wanted)
            where = f"request {emit.number}, new token {at}"
            raise InvariantBroken(f"L1: {where}: the token is {token}, plain decoding gives {wanted}")

    def _listen(self, result: Result) -> None:
        launched = self.history.runs.get(result.run)
        if launched is None:
            return  # EndsOnce says why not
        for row in result.rows:
            written, after = launched.written.get(row.slot), row.position + 1
            if written is None or row.sequence != written.record.sequence:
                raise InvariantBroken(f"L1: run {result.run} of sequences {[*launched.records]} finds {row}")
            record = written.record
            is_accepted = row.position < len(record.text) and not record.is_dead(written)
            where = f"request {record.number}: run {result.run}"
            if row.token < 0:
                if is_accepted and record.fault is None:
                    raise InvariantBroken(f"L1: {where} finds {row}, which is accepted")
                continue
            if is_accepted and after < len(record.truth) and row.token != record.truth[after]:
                what = f"{row.token} after position {row.position}, plain decoding gives {record.truth[after]}"
                raise InvariantBroken(f"L1: {where} found {what}")

    def on_idle(self, world: World, answer: Answer, request: Request) -> None:
        """See Checker."""
        spec = world.spec
        tokens, fault = ending(spec.model, request)
        wanted = list(tokens)
        ends = [when for when, number in spec.aborts if number == answer.number]
        ends += [spec.closes_s] if spec.closes_s is not None else []
        if answer.reason == "aborted" and any(when <= world.now for when in ends):
            wanted, fault = wanted[: len(answer.tokens)], None  # nobody waited for the rest
        self._compare_scores(answer.number, spec, answer.reason in ("stop", "length"))
        if answer.tokens != wanted:
            raise InvariantBroken(f"L1: request {answer.number}: the user saw {answer.tokens}, wanted {wanted}")
        reason = "error" if fault is not None else "length"
        if fault is None and wanted[-1:] and wanted[-1] in request.stop_tokens:
            reason = "stop"
        if answer.fault != fault:
            raise InvariantBroken(
                f"L1: request {answer.number} ended by layer {answer.fault}, plain decoding by {fault}"
            )
        if answer.reason not in (reason, "aborted" if ends else reason):
            raise InvariantBroken(f"L1: request {answer.number} finished by {answer.reason!r}, not by {reason!r}")


class EndsOnce(Reader):
    """L2: runs, and requests, which begin in the order in which they were submitted and end in any."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._open: dict[int, set[int]] = {}  # runs in flight, and the requests of each
        self._ended: dict[int, bool] = {}  # by request that is not idle: whether it has finished
        self._heard: Counter[int] = Counter()  # results with rows of a sequence from which no emission came

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR:
            return
        if isinstance(event, Submitted):
            self._ended[event.number] = False
        living = self.history.living
        if len(living) > world.spec.max_num_seqs:
            raise InvariantBroken(f"L2: {len(living)} requests are decoded at once: {[one.number for one in living]}")
        if isinstance(event, Received) and isinstance(event.message.body, Result):
            self._returned(event.message.body)
        for record, command, _ in self.history.told:
            if isinstance(command, Emit):
                self._heard[record.sequence] -= 1
                if self._heard[record.sequence] < 0:
                    raise InvariantBroken(f"L2: {command} came of no result with rows of sequence {record.sequence}")
        for command in commands:
            if isinstance(command, Send) and isinstance(command.message.body, Run):
                launched = self.history.runs[command.message.body.run]
                self._open[launched.run.run] = {record.number for record in launched.records.values()}
            elif isinstance(command, Output):
                self._received(command)
        for number, has_finished in self._ended.items():
            if has_finished and not self._out(number):
                raise InvariantBroken(f"L2: request {number} has finished, its runs are back, and it is not idle")

    def _returned(self, result: Result) -> None:
        if result.run not in self._open:
            raise InvariantBroken(f"L2: a result of run {result.run}, which is not in flight")
        del self._open[result.run]
        self._heard.update({row.sequence for row in result.rows})

    def _received(self, command: Output) -> None:
        number = command.number
        if number not in self._ended or self._ended[number] != isinstance(command, Idle):
            raise InvariantBroken(f"L2: {command} of a request that has ended already, or not yet: {self._ended}")
        if isinstance(command, Finish):
            self._ended[number] = True
        elif isinstance(command, Idle):
            if out := self._out(number):
                raise InvariantBroken(f"L2: request {number} is idle, with runs {out} still out")
            del self._ended[number]

    def _out(self, number: int) -> list[int]:
        """The runs in flight with rows of request ``number``."""
        return [run for run, numbers in self._open.items() if number in numbers]


class InOrder(Reader):
    """L4."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._sent: dict[tuple[int, int], int] = {}
        self._taken: dict[tuple[int, int], int] = {}
        self._flight: deque[int] = deque()

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if isinstance(event, Received):
            self._grow(self._taken, "took", event.message)
            body = event.message.body
            if isinstance(body, Result) and (not self._flight or self._flight.popleft() != body.run):
                raise InvariantBroken(f"L4: the result of run {body.run} is out of order")
        for command in commands:
            if isinstance(command, Send):
                self._grow(self._sent, "sent", command.message)
                if address == ORCHESTRATOR and isinstance(command.message.body, Run):
                    self._flight.append(command.message.body.run)

    @staticmethod
    def _grow(seen: dict[tuple[int, int], int], verb: str, message: Message) -> None:
        edge = (message.source, message.dest)
        if message.is_control:
            return
        expected = seen.get(edge, 0) + 1
        if message.txn != expected:
            who = address_name(message.source if verb == "sent" else message.dest)
            raise InvariantBroken(f"L4: {who} {verb} {message.kind} as transaction {message.txn}, expected {expected}")
        seen[edge] = expected


class Advice(Reader):
    """L6: what is skipped on advice is dead, and no stage changes the rows it passes on."""

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        for command in commands:
            if not isinstance(command, Send):
                continue
            body = command.message.body
            if isinstance(body, Cancel):
                self._cancelled(body, address)
            elif isinstance(body, Run | Result) and address != ORCHESTRATOR:
                self._compare(body, self.history.runs.get(body.run), address_name(address))

    def _cancelled(self, cancel: Cancel, address: int) -> None:
        for dead in cancel.rows:
            launched = self.history.runs.get(dead.run)
            if launched is None:
                continue  # its request is idle
            if dead.sequence not in launched.records:
                raise InvariantBroken(f"L6: {dead} is of another sequence than {[*launched.records]}")
            kept = set() if dead.slot == NO_SLOT else launched.written.keys() - {dead.slot}
            self._must_be_dead(launched, kept, f"{address_name(address)} cancels")
            if dead.slot != NO_SLOT and launched.written[dead.slot].record.sequence != dead.sequence:
                raise InvariantBroken(f"L6: {dead} names a row of another sequence")

    def _compare(self, body: Run | Result, launched: Launched | None, who: str) -> None:
        if launched is None:
            raise InvariantBroken(f"L6: {who} passes on run {body.run}, which was never launched")
        run = launched.run
        if isinstance(body, Run):
            if body.ops != run.ops:
                raise InvariantBroken(f"L6: {who} changes the operations of run {body.run}")
            tokens = {row.slot: row.token for row in run.rows}
            # A row whose numbers were not finite travels on without its token.
            rows = {row._replace(token=tokens.get(row.slot, 0) if row.token < 0 else row.token) for row in body.rows}
            slots = [row.slot for row in run.rows]
            given = dict(zip(slots, run.next_tokens, strict=True)) if run.next_tokens else {}
            is_changed = body.next_tokens != (tuple(given[row.slot] for row in body.rows) if given else ())
            if is_changed or not rows <= set(run.rows):
                raise InvariantBroken(f"L6: {who} changes the rows of run {body.run}")
            self._must_be_dead(launched, {row.slot for row in body.rows}, f"{who} skips")
        elif run.wants is not Wants.NOTHING or run.next_tokens:
            kept = {row.slot for row in body.rows}
            if run.wants is not Wants.EVERY:
                wanted = {row.sequence: row.slot for row in run.rows if run.wants is Wants.LAST}.values()
                scored = [row.slot for row, token in zip(run.rows, run.next_tokens, strict=False) if token != NO_TOKEN]
                kept |= launched.written.keys() - {*wanted, *scored}  # nothing is wanted after those
            self._must_be_dead(launched, kept, f"{who} skips")

    def _must_be_dead(self, launched: Launched, kept: Collection[int], deed: str) -> None:
        for slot, written in launched.written.items():
            if slot not in kept and not self.history.is_useless(written):
                what = f"token {written.token} at position {written.position} of run {launched.run.run}"
                raise InvariantBroken(f"L6: {deed} {what}, which is alive")


class Forced(Reader):
    """L10, and the statistics' own arithmetic."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._firsts: Counter[int] = Counter()  # by request: sequences of which a token came
        self._counted: set[int] = set()  # those sequences

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker: a draft with ``topk`` 1 that is always right never sends a row in vain."""
        spec, history = world.spec, self.history
        if address != ORCHESTRATOR:
            return
        for record, command, _ in history.told:
            if isinstance(command, Emit) and record.sequence not in self._counted:
                self._counted.add(record.sequence)
                self._firsts[record.number] += 1
        if spec.model.ranks[0] < 1.0 or spec.policy.topk > 1 or spec.policy.prompt_lookup:
            return
        for command in commands:
            if isinstance(command, Send) and isinstance(command.message.body, Run):
                launched = history.runs[command.message.body.run]
                for row in launched.run.rows:
                    truth = launched.records[row.sequence].truth
                    if row.position < len(truth) and row.token != truth[row.position]:
                        raise InvariantBroken(
                            f"L10: a draft that is always right guessed {row.token} at {row.position}"
                        )

    def on_idle(self, world: World, answer: Answer, request: Request) -> None:
        """See Checker: a draft that is never right is never accepted, and plain decoding has an accept_length of 1. The
        first token of a sequence comes of its prompt."""
        spec, stats, firsts = world.spec, answer.stats, self._firsts.pop(answer.number, 0)
        if stats and not spec.policy.speculate and stats.verifications != len(answer.tokens) - firsts:
            raise InvariantBroken(f"L10: plain decoding took {stats} for {len(answer.tokens)} tokens")
        if stats is None or stats.accepted + stats.corrections != len(answer.tokens):
            raise InvariantBroken(f"L10: {len(answer.tokens)} tokens, counted as {stats}")
        never = sum(spec.model.ranks) == 0.0 and spec.policy.topk < spec.model.vocab and not spec.policy.prompt_lookup
        if stats.accepted and (never or not spec.policy.speculate):
            raise InvariantBroken(f"L10: a draft that is never right had {stats.accepted} guesses accepted")
