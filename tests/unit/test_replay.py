"""Where two answers differ, said so that a person finds it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipeinfer.core.messages import Body, Close, Hello, Message, Result, ResultRow, Row, Run
from pipeinfer.core.ports import Command, Emit, Event, Halt, Note, Started, Wake, Woke
from pipeinfer.runtime.replay import difference, retell
from pipeinfer.runtime.trace import Step


def run(*rows: Row) -> Message:
    return Message(0, 1, Run(1, rows=rows))


def result(logp: float) -> Message:
    return Message(1, 0, Result(1, rows=(ResultRow(1, 2, 3, logp),)))


def told(body: Body) -> Message:
    return Message(1, 0, body, txn=7)


FIRST, SECOND = Row(1, 2, 3, 4), Row(5, 6, 7, 8)
OTHER_NAN = float("nan")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (1, 1, ""),
        (1, 2, "commands was 1, is 2"),
        (1, 1.0, "commands was 1, is 1.0"),
        (1.0, math.nextafter(1.0, 2.0), "commands was 1.0, is 1.0000000000000002"),
        (math.nan, OTHER_NAN, ""),
        ([1, (2, 3)], [1, (2, 4)], "commands.1.1 was 3, is 4"),
        ((Wake(1.0), Halt()), (Wake(1.0),), "commands.1 was Halt(), is None"),
        ((), (Halt(),), "commands.0 was None, is Halt()"),
        ((Emit((1,)),), (Halt(),), "commands.0 was Emit(tokens=(1,), logps=(), number=0, tops=()), is Halt()"),
        (Emit((1, 2)), Emit((1, 3)), "commands.tokens.1 was 2, is 3"),
        (run(FIRST, SECOND), run(FIRST, SECOND), ""),
        (run(FIRST, SECOND), run(FIRST, Row(5, 6, 9, 8)), "commands.body.rows.1.parent was 7, is 9"),
        (run(FIRST), run(FIRST._replace(sequence=2)), "commands.body.rows.0.sequence was 0, is 2"),
        (result(math.nan), result(OTHER_NAN), ""),
        (result(-0.5), result(-0.25), "commands.body.rows.0.logp was -0.5, is -0.25"),
        (told(Hello(3)), told(Close(3)), "commands.body was Hello(digest=3), is Close(sequence=3)"),
        ({"a": 1, "b": [OTHER_NAN]}, {"b": [math.nan], "a": 1}, ""),
        ({"a": 1}, {"a": 1, "b": 2}, "commands.b was None, is 2"),
        ("a" * 200, "b", f"commands was '{'a' * 159} ..., is 'b'"),
        (np.arange(3), np.arange(3), ""),
        (np.arange(3), np.array([0, 1, 7]), "commands[2] was 2, is 7"),
        (np.eye(2), np.array([[1.0, 0.0], [0.5, 1.0]]), "commands[1, 0] was 0.0, is 0.5"),
        (np.arange(3), np.arange(4), "commands was int64[3], is int64[4]"),
        (np.zeros(2, np.int64), np.zeros(2, np.bool_), "commands was int64[2], is bool[2]"),
        (np.array([math.nan]), np.array([math.nan]), ""),
        (np.array([0.0]), np.array([-0.0]), "commands[0] was 0.0, is -0.0"),
    ],
)
def test_difference(old: Any, new: Any, said: str) -> None:
    assert difference(old, new) == said


class Counting:
    """A machine that ends when it has been told ``most`` times, and does not like to be told more often."""

    address = 1

    def __init__(self, most: int = 2) -> None:
        self.told, self._most = 0, most

    def handle(self, event: Event, now: float) -> list[Command]:
        self.told += 1
        if self.told > self._most:
            raise KeyError(self.told)
        return [Wake(now + self.told), *([Halt()] if self.told == self._most else [])]


def test_a_replay_counts_what_was_the_same_and_who_ended() -> None:
    steps = [Step(1, Started(), 0.5, (Wake(1.5),)), Step(1, Woke(), 1.5, (Wake(3.5), Halt()))]
    retold = retell({1: Counting()}, steps)
    assert (retold.events, retold.commands, retold.difference, retold.ended) == (2, 3, "", {1})


def test_a_replay_ends_at_the_first_difference() -> None:
    machine = Counting()
    retold = retell({1: machine}, [Step(1, Started(), 0.5, (Wake(1.5),)), *[Step(1, Woke(), 1.5, (Wake(3.4),))] * 3])
    assert retold.difference == "stage 0 answers event 2 (Woke) differently: commands.0.at was 3.4, is 3.5"
    assert (retold.events, machine.told) == (1, 2)


def test_what_raised_must_raise_the_same() -> None:
    steps = [Step(1, Started(), 0.0, (Note("raised KeyError: 1"),))]
    assert retell({1: Counting(0)}, steps).difference == ""
    assert "raised KeyError: 1" in retell({1: Counting(1)}, steps).difference
