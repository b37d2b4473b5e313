from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pytest

from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.messages import Credit, Message
from pipeinfer.core.ports import (
    Abandon,
    Batch,
    Command,
    Compute,
    Computed,
    Emit,
    Event,
    Finish,
    Halt,
    Idle,
    Note,
    Received,
    SampledToken,
    Sampling,
    SamplingInputs,
    Send,
    Started,
    Wake,
    Woke,
)
from pipeinfer.core.slots import batch_in_order
from pipeinfer.runtime.executor import SCORED_ROWS, Executor


class Script:
    """A machine that answers its n-th event with the n-th list of commands, and keeps what it was told."""

    def __init__(self, address: int, *answers: Sequence[Command]) -> None:
        self.address = address
        self.heard: list[Event] = []
        self._answers = list(answers)

    def handle(self, event: Event, now: float) -> list[Command]:
        self.heard.append(event)
        return list(self._answers.pop(0)) if self._answers else []


class Layers:
    """A shard that counts its layers."""

    weight_nbytes = 0
    faults = {1: 4}  # noqa: RUF012

    def __init__(self, layers: int, rest: float = 1.0) -> None:
        self.done = 0
        self.closed = False
        self.given: list[Any] = []
        self.draws: list[SamplingInputs | None] = []
        self._layers, self._rest = layers, rest

    def forward(self, batch: Batch, hidden: Any) -> Generator[float, None, Any]:
        self.given.append(hidden)
        try:
            for _ in range(self._layers):
                yield self._rest
                self.done += 1
        except GeneratorExit:
            self.closed = True
            raise
        return np.arange(len(batch.tokens)) * 10

    def sample(
        self, hidden: Any, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
    ) -> list[list[SampledToken]]:
        self.draws.append(draw)
        return [[(int(hidden[row]), 0.0)] * count for row in rows]


class Outside:
    def __init__(self) -> None:
        self.sent: list[Send] = []
        self.told: list[Emit | Finish | Idle] = []

    def send(self, command: Send, now: float) -> None:
        self.sent.append(command)

    def tell(self, command: Emit | Finish | Idle, now: float) -> None:
        self.told.append(command)


def batch(rows: int = 2) -> Batch:
    return batch_in_order([1] * rows)


def word(source: int, dest: int) -> Send:
    return Send(Message(source, dest, Credit(1)))


def test_a_computation_rests_between_layers_and_reports_its_end() -> None:
    role, shard = Script(1, [Compute(5, batch())]), Layers(3)
    executor = Executor([role], {1: shard}, Outside())
    assert executor.step(0.0) is None
    executor.deliver(1, Started(), 0.0)
    assert [executor.step(0.0) for _ in range(5)] == [1.0, 1.0, 1.0, 0.0, None]
    done = role.heard[-1]
    assert isinstance(done, Computed)
    assert (done.job, done.choices) == (5, None)


def test_a_computation_took_what_passed_since_its_turn_began() -> None:
    """Not since it was commanded: another role of the rank may have been at work."""
    role, other, shard = Script(2, [Compute(5, batch())]), Script(1, [Compute(6, batch())]), Layers(1)
    executor = Executor([role, other], {1: Layers(2), 2: shard}, Outside())
    executor.deliver(2, Started(), 0.0)
    executor.deliver(1, Started(), 0.0)
    for now in (10.0, 11.0, 12.5, 20.0, 23.0):
        executor.step(now)
    ended = [[event.seconds for event in one.heard if isinstance(event, Computed)] for one in (other, role)]
    assert ended == [[2.5], [3.0]]


def test_choices_are_asked_of_the_shard() -> None:
    draw = SamplingInputs((Sampling(0.5),) * 2, np.array([4, 6]))
    role, shard = Script(1, [Compute(5, batch(3), rows=(0, 2), choices=2, draw=draw)]), Layers(1)
    executor = Executor([role], {1: shard}, Outside())
    executor.deliver(1, Started(), 0.0)
    while executor.step(0.0) is not None:
        pass
    assert role.heard[-1] == Computed(5, choices=[[(0, 0.0)] * 2, [(20, 0.0)] * 2], faults={1: 4})
    assert shard.draws == [draw]


def test_rows_of_a_prompt_go_through_the_head_some_at_a_time() -> None:
    """Logits of all rows of a long chunk would need much memory."""
    count = 2 * SCORED_ROWS + 3
    draw = SamplingInputs((Sampling(),) * count, np.arange(count), given=tuple(range(count)))
    role = Script(1, [Compute(5, batch(count + 1), rows=tuple(range(1, count + 1)), choices=1, draw=draw)])
    executor = Executor([role], {1: (shard := Layers(1))}, Outside())
    executor.deliver(1, Started(), 0.0)
    while executor.step(0.0) is not None:
        pass
    assert role.heard[-1] == Computed(5, choices=[[(10 * row, 0.0)] for row in range(1, count + 1)], faults={1: 4})
    assert [len(part.given) for part in shard.draws if part] == [SCORED_ROWS, SCORED_ROWS, 3]
    assert [token for part in shard.draws if part for token in part.given] == list(range(count))


def test_dead_rows_are_left_out_of_the_activations() -> None:
    shard = Layers(1)
    executor = Executor([Script(1, [Compute(5, batch(2), np.array([7, 8, 9]), keep=(0, 2))])], {1: shard}, Outside())
    executor.deliver(1, Started(), 0.0)
    executor.step(0.0)
    assert shard.given[0].tolist() == [7, 9]


def test_an_abandoned_computation_ends_at_the_next_layer() -> None:
    role, shard = Script(1, [Compute(5, batch())], [Abandon(5)]), Layers(9)
    executor = Executor([role], {1: shard}, Outside())
    executor.deliver(1, Started(), 0.0)
    executor.step(0.0)
    executor.step(0.0)
    executor.deliver(1, Started(), 0.0)
    assert len(role.heard) == 2, "not before the layer ends"
    assert executor.step(0.0) == 0.0
    assert role.heard[-1] == Computed(5)
    assert (shard.done, shard.closed) == (1, True)


def test_one_abandoned_before_it_began_computes_nothing() -> None:
    role, shard = Script(1, [Compute(5, batch()), Abandon(5)]), Layers(9)
    executor = Executor([role], {1: shard}, Outside())
    executor.deliver(1, Started(), 0.0)
    assert executor.step(0.0) == 0.0
    assert role.heard[-1] == Computed(5)
    assert shard.given == []


def test_an_abandon_that_comes_too_late_is_ignored() -> None:
    role, shard = Script(1, [Compute(5, batch())], [Compute(6, batch()), Abandon(5)]), Layers(0)
    executor = Executor([role], {1: shard}, Outside())
    executor.deliver(1, Started(), 0.0)
    executor.step(0.0)
    executor.step(0.0)
    done = role.heard[-1]
    assert isinstance(done, Computed)
    assert done.job == 6
    assert done.hidden is not None


def test_a_role_has_one_job_at_a_time() -> None:
    executor = Executor([Script(1, [Compute(5, batch()), Compute(6, batch())])], {1: Layers(1)}, Outside())
    with pytest.raises(LocalProtocolError, match="job 6"):
        executor.deliver(1, Started(), 0.0)


def test_choices_without_a_number_are_our_own_fault() -> None:
    executor = Executor([Script(1, [Compute(5, batch(), rows=(0,))])], {1: Layers(0)}, Outside())
    executor.deliver(1, Started(), 0.0)
    with pytest.raises(LocalProtocolError, match="choices"):
        executor.step(0.0)


def test_the_target_goes_before_the_draft_but_never_between_its_layers() -> None:
    stage, drafter = Script(1, [Compute(1, batch())]), Script(0x8000, [Compute(2, batch())])
    shards = {1: Layers(2), 0x8000: Layers(2)}
    executor = Executor([drafter, stage], shards, Outside())
    executor.deliver(0x8000, Started(), 0.0)
    executor.step(0.0)
    executor.deliver(1, Started(), 0.0)
    for _ in range(2):
        executor.step(0.0)
    assert (len(drafter.heard), shards[1].done) == (2, 0)
    executor.deliver(0x8000, Started(), 0.0)
    executor.step(0.0)
    assert shards[1].given == [None]


def test_words_for_a_role_on_this_rank_stay_here_in_order() -> None:
    outside = Outside()
    first, second = Script(1, [word(1, 2), word(1, 9), word(1, 2)]), Script(2, [word(2, 1)])
    seen: list[tuple[int, int]] = []
    watch = lambda at, event, now, commands: seen.append((at, len(commands)))  # noqa: E731
    executor = Executor([first, second], {}, outside, watch)
    executor.deliver(1, Started(), 0.0)
    assert [send.message.dest for send in outside.sent] == [9]
    assert seen == [(1, 3), (2, 1), (2, 0), (1, 0)]
    assert all(isinstance(event, Received) for event in second.heard)


def test_outputs_go_to_the_user() -> None:
    outside = Outside()
    Executor([Script(0, [Emit((1, 2)), Finish("stop")])], {}, outside).deliver(0, Started(), 0.0)
    assert outside.told == [Emit((1, 2)), Finish("stop")]


def test_an_observer_sees_every_event_and_what_was_raised() -> None:
    class Failing(Script):
        def handle(self, event: Event, now: float) -> list[Command]:
            if len(self.heard) == 1:
                raise LocalProtocolError("enough")
            return super().handle(event, now)

    seen: list[Any] = []
    executor = Executor([Failing(1, [Abandon(7)])], {}, Outside(), lambda *what: seen.append(what))
    executor.deliver(1, Started(), 0.5)
    with pytest.raises(LocalProtocolError, match="enough"):
        executor.deliver(1, Computed(7), 1.5)
    raised = [Note("raised LocalProtocolError: enough")]
    assert seen == [(1, Started(), 0.5, [Abandon(7)]), (1, Computed(7), 1.5, raised)]


def test_a_halted_role_hears_nothing_and_its_job_is_dropped() -> None:
    role, shard = Script(1, [Compute(5, batch())], [Halt()]), Layers(3)
    executor = Executor([role], {1: shard}, Outside())
    executor.deliver(1, Started(), 0.0)
    executor.step(0.0)
    executor.deliver(1, Started(), 0.0)
    assert executor.is_halted
    executor.deliver(1, Started(), 0.0)
    assert executor.step(0.0) is None
    assert len(role.heard) == 2


def test_an_alarm_that_was_moved_meanwhile_rings_at_its_new_time() -> None:
    """Waking the first role sends the second one a message, upon which that asks to be woken later."""
    first = Script(1, [Wake(1.0)], [word(1, 2)])
    second = Script(2, [Wake(1.0)], [Wake(5.0)])
    executor = Executor([first, second], {}, Outside())
    for address in (1, 2):
        executor.deliver(address, Started(), 0.0)
    executor.ring(1.0)
    assert [type(event) for event in second.heard] == [Started, Received]
    assert executor.alarm == 5.0
    executor.ring(5.0)
    assert isinstance(second.heard[-1], Woke)
