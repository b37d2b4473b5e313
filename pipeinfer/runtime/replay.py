"""Replaying: fresh machines are told what others were told, and must command the same (invariant L9).

So a trace from anywhere, a simulated world or a real rank, can be taken home and debugged; and a machine that looks at
a clock, a seedless random number or the order of a set is found out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeinfer.core.addresses import address_name
from pipeinfer.core.messages import Message
from pipeinfer.core.ports import Halt, Machine
from pipeinfer.runtime.trace import Step, raised

MOST_SHOWN = 160
"""Letters of a value in a difference."""


@dataclass(slots=True)
class Retold:
    """What came of a replay: so many ``events`` and ``commands`` were the same; the first ``difference``, if any; the
    roles that have ended."""

    events: int = 0
    commands: int = 0
    difference: str = ""
    ended: set[int] = field(default_factory=set)


def retell(machines: Mapping[int, Machine], steps: Iterable[Step]) -> Retold:
    """Tell fresh ``machines``, by address, what others were told in ``steps``, up to the first difference."""
    retold = Retold()
    for number, step in enumerate(steps, 1):
        try:
            commands = machines[step.address].handle(step.event, step.now)
        except Exception as error:  # which may be what happened the first time, too
            commands = [raised(error)]
        what = difference(step.commands, tuple(commands))
        if what:
            event = type(step.event).__name__
            retold.difference = f"{address_name(step.address)} answers event {number} ({event}) differently: {what}"
            break
        retold.events += 1
        retold.commands += len(commands)
        retold.ended |= {step.address for command in commands if isinstance(command, Halt)}
    return retold


def difference(old: Any, new: Any, path: str = "commands") -> str:
    """Where and how ``new`` differs from ``old``; empty if it does not."""
    if old is new:
        return ""
    if type(old) is not type(new):
        return f"{path} was {_short(old)}, is {_short(new)}"
    if isinstance(old, np.ndarray):
        return _array_difference(old, new, path)
    if isinstance(old, Message) and old == new and type(old.body) is type(new.body):
        return ""  # the common case, quickly
    if is_dataclass(old):
        parts = [(member.name, getattr(old, member.name), getattr(new, member.name)) for member in fields(old)]
    elif isinstance(old, tuple) and (names := getattr(old, "_fields", ())):
        parts = list(zip(names, old, new, strict=True))
    elif isinstance(old, tuple | list):
        parts = [(str(index), was, now) for index, (was, now) in enumerate(zip_longest(old, new))]
    elif isinstance(old, dict):
        parts = [(str(name), old.get(name), new.get(name)) for name in {**old, **new}]
    else:
        is_same = old == new or (old != old and new != new)  # no number equals no number
        return "" if is_same else f"{path} was {_short(old)}, is {_short(new)}"
    return next((found for name, was, now in parts if (found := difference(was, now, f"{path}.{name}"))), "")


def _array_difference(old: npt.NDArray[Any], new: npt.NDArray[Any], path: str) -> str:
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{path} was {old.dtype}{list(old.shape)}, is {new.dtype}{list(new.shape)}"
    if old.tobytes() == new.tobytes():
        return ""
    pairs = enumerate(zip(old.flat, new.flat, strict=True))
    first = next(index for index, (was, now) in pairs if was.tobytes() != now.tobytes())
    place = [int(index) for index in np.unravel_index(first, old.shape)]
    return f"{path}{place} was {old.flat[first]}, is {new.flat[first]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} ..."
